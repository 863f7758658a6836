"""Numbers of tokens as people write them, the same in every command and recipe."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

_FACTORS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}
_FACTORS |= {"ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


def parse_count(value: Any) -> Any:
    """``"8M"`` as 8,000,000, ``"32k"`` as 32,000 and ``"32Ki"`` as 32,768; what is no text as it is.

    Raises:
        ValueError: a text that is no whole number.
    """
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(-?\d+(?:\.\d+)?)([a-z]*)", value.strip().replace("_", "").replace(",", "").lower())
    number = Fraction(match[1]) * _FACTORS[match[2]] if match and match[2] in _FACTORS else None
    if number is None or number.denominator != 1:
        raise ValueError("is no whole number; write 8000000, 8M or 32Ki")
    return int(number)
