"""Whole numbers as people write them, and for each kind of thing that is counted how many there may be."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

_FACTORS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}
_FACTORS |= {"ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


def parse_count(value: Any) -> Any:
    """Read ``"8M"`` as 8,000,000, ``"32k"`` as 32,000 and ``"32Ki"`` as 32,768; other types are returned unchanged.

    Raises:
        ValueError: the text is not a whole number.
    """
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(-?\d+(?:\.\d+)?)([a-z]*)", value.strip().replace("_", "").replace(",", "").lower())
    number = Fraction(match[1]) * _FACTORS[match[2]] if match and match[2] in _FACTORS else None
    if number is None or number.denominator != 1:
        raise ValueError("is not a whole number; write 8000000, 8M or 32Ki")
    return int(number)


def power_of_two(value: int) -> int:
    """A check for ``field_validator``.

    Raises:
        ValueError: the number is not a power of two.
    """
    if value & (value - 1):
        raise ValueError("give a power of two")
    return value


def at_most(most: int, why: str, remedy: str | None = None) -> Callable[[int], int]:
    """A check that a number is no larger than a run can come to the end of.

    Args:
        most: the largest number.
        why: what is wrong with a larger one.
        remedy: what to do instead; by default, to give ``most`` or less.
    """

    def check(value: int) -> int:
        if value > most:
            raise ValueError(f"{why}; {remedy or f'give {most:,} or less'}")
        return value

    return check


LONGEST = 1 << 24
"""The most tokens of one text: positions become angles in float32, which tells whole numbers apart up to here."""
longest = at_most(LONGEST, f"float32 tells no more than {LONGEST} positions of a text apart", "give that or less")
"""A check of a number of tokens in one text."""

Whole = Annotated[int, BeforeValidator(parse_count)]
"""A whole number as people write it: 8M, 32k, 32Ki."""
Count = Annotated[Whole, AfterValidator(at_most(10**6, "no model and no run has so many"))]
"""A number of steps, samples, trials, heads, channels, rows: of anything but tokens."""
Tokens = Annotated[Whole, AfterValidator(at_most(10**14, "no run reads so many tokens"))]
"""A number of tokens that are read one after another."""
Held = Annotated[Whole, AfterValidator(at_most(LONGEST, "no machine holds the hidden states of so many tokens"))]
"""A number of tokens that are held at once, with what a model makes of them."""
Seed = Annotated[Whole, Field(ge=0, lt=1 << 32)]
"""What random numbers are drawn from, as every library takes it."""
Length = Annotated[Whole, AfterValidator(longest)]
"""A number of tokens within one text, :data:`LONGEST` at most."""
