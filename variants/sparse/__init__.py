"""Block-sparse prefill: long prompts attend to the blocks of keys that carry the mass, within a bound."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from rehead.attention.blocks import SMALLEST
from rehead.attention.call import AttentionCall
from rehead.counts import Count, Length, Seed, power_of_two
from rehead.variants.contract import Compute, Variant, VariantOptions, register
from rehead.variants.sparse.hard import secure
from rehead.variants.sparse.select import FAILURE, Choice, choose, lost_mass

__all__ = ["CallReport", "SparseOptions", "choice_of", "lost_mass", "recorded"]


class SparseOptions(VariantOptions):
    """Options of the variant ``sparse``."""

    lost_mass: float = Field(0.05, ge=0, lt=1, description="Share of the softmax's mass that may be left out.")
    bound: Literal["sampled", "hard"] = Field(
        "sampled",
        description="How lost_mass is kept: for the mean of rows and heads, by rows drawn at random (it fails in one "
        f"call of {round(1 / FAILURE)} at most), or for each row, by centre and radius of the blocks left out (hard: "
        "always holds, and computes nearly everything on real heads).",
    )
    min_keys: Length = Field(4096, ge=1, description="Calls with no more keys than this stay dense.")
    block: Length = Field(128, ge=SMALLEST, description="Rows and keys per block; 128 is fast on Hopper.")
    samples: Count = Field(4, ge=1, le=16, description="Rows of each block that choose its key blocks.")
    first: Count = Field(1, ge=0, description="Blocks at the beginning of a sequence that are always computed.")
    local: Count = Field(1, ge=0, description="Blocks just before a block of rows that are always computed.")
    seed: Seed = Field(0, description="Of the rows that are drawn.")

    _powers = field_validator("block", "samples")(power_of_two)


@dataclass(frozen=True)
class CallReport:
    """What one sparse call did.

    Attributes:
        rows, keys: its size.
        density: computed blocks as a share of the blocks that causality leaves.
        estimate: mean lost mass of the rows that were checked.
        bound: what the lost mass does not exceed: on average, or in any row with ``bound="hard"``.
        lost: the mean lost mass of all rows, where :func:`recorded` was asked for it.
    """

    rows: int
    keys: int
    density: float
    estimate: float
    bound: float
    lost: float | None = None


_records: list[tuple[list[CallReport], bool]] = []


@contextmanager
def recorded(*, measure: bool = False) -> Iterator[list[CallReport]]:
    """Inside the block every sparse call adds a :class:`CallReport` to the list, in order.

    Args:
        measure: also compute the true lost mass, at the cost of two dense calls.
    """
    entry: tuple[list[CallReport], bool] = ([], measure)
    _records.append(entry)
    try:
        yield entry[0]
    finally:
        _records.remove(entry)


def attend(call: AttentionCall, options: SparseOptions, state: Mapping[str, Tensor], compute: Compute) -> Tensor:
    """The layer's attention over the chosen blocks; short calls, decode steps and other masks pass unchanged."""
    if options.lost_mass == 0 or not _long(call, options):
        return compute(call)
    call = call.with_int_offset()
    choice = choice_of(call.joined(), options)
    for reports, measure in _records:
        reports.append(_report(call, choice, measure))
    return compute(call.with_(blocks=choice.blocks))


def _long(call: AttentionCall, options: SparseOptions) -> bool:
    """Whether a call is a long causal prefill whose only other rules are bounds of the keys."""
    plain = call.causal and call.positional_only and call.window is None and call.blocks is None
    return plain and call.key.shape[2] > options.min_keys and call.query.shape[2] > options.block


@torch.compiler.disable
def choice_of(call: AttentionCall, options: SparseOptions) -> Choice:
    """The blocks that a call computes under some options."""
    with torch.no_grad():
        choice = choose(
            call,
            options.lost_mass,
            block=options.block,
            samples=options.samples,
            first=options.first,
            local=options.local,
            seed=options.seed,
        )
        return choice if options.bound == "sampled" else secure(call, choice, options.lost_mass, options.block)


def _report(call: AttentionCall, choice: Choice, measure: bool) -> CallReport:
    return CallReport(
        call.query.shape[2],
        call.key.shape[2],
        int(choice.blocks.starts[-1, -1, -1]) / choice.visible,
        float(choice.estimate),
        float(choice.bound),
        float(lost_mass(call, choice.blocks).mean()) if measure else None,
    )


VARIANT = register(
    Variant(
        name="sparse",
        summary="long prompts attend to the key blocks that carry the mass, all but lost_mass= of it (approximate)",
        source="after Xu et al. 2025, arXiv 2503.16428; Jiang et al. 2024, arXiv 2407.02490",
        options=SparseOptions,
        exact=lambda options: options.lost_mass == 0,
        off=lambda options: options.but(lost_mass=0.0),
        attend=attend,
        reach=lambda options: options.min_keys,
    )
)
