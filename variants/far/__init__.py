"""A long prompt through a window, its first tokens, and one Gaussian for each head in place of the keys between."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field, field_validator
from torch import Tensor

from rehead.attention.attend import attend_with_lse, merge
from rehead.attention.blocks import SMALLEST, KeyBlocks
from rehead.attention.call import AttentionCall
from rehead.counts import LONGEST, Count, Length, power_of_two
from rehead.variants.contract import Compute, Variant, VariantOptions, register
from rehead.variants.far.gaussian import far_field


class FarOptions(VariantOptions):
    """Options of the variant ``far``."""

    size: Length = Field(1024, ge=1, description="Last keys that a row sees one by one, rounded up to blocks.")
    first: Count = Field(1, ge=0, description="Blocks at the beginning that a row sees one by one.")
    block: Length = Field(128, ge=SMALLEST, description="Rows and keys per block.")
    samples: Count = Field(32, ge=1, description="Rows that say which heads gain by the Gaussian.")
    heads: str = Field("auto", pattern="^(auto|all|none)$", description="Heads with a Gaussian; auto measures each.")

    _powers = field_validator("block")(power_of_two)


def attend(call: AttentionCall, options: FarOptions, state: Mapping[str, Tensor], compute: Compute) -> Tensor:
    """The layer's attention for a long prompt; short ones, decode steps and other masks pass unchanged."""
    others = (call.window, call.blocks, call.kv_start, call.kv_end, call.key_tail)
    plain = call.causal and call.positional_only and all(rule is None for rule in others)
    if not plain or call.query.shape[2] <= options.block:
        return compute(call)
    call = call.with_int_offset()
    begin, end = options.first, far_ends(call, options)
    if int(end.max()) <= begin:
        return compute(call)
    key = torch.arange(-(-call.key.shape[2] // options.block), device=end.device)
    near = KeyBlocks.of(((key < begin) | (key >= end[:, None]))[None, None], options.block, options.block)
    part = attend_with_lse(call.with_(blocks=near))
    if options.heads == "none":
        return part[0]
    far = far_field(call, begin, end, options.block)
    both = merge([part, far])[0]
    if options.heads == "all":
        return both
    return torch.where(better(call, part[0], both, options.samples)[:, None, :, None], both, part[0])


def far_ends(call: AttentionCall, options: FarOptions) -> Tensor:
    """For each block of rows the first key block of its window, int64 ``[row blocks]``."""
    rows = torch.arange(-(-call.query.shape[2] // options.block), device=call.query.device)
    # The first row of a block sees `size` keys or more, and so do the rows after it.
    return ((call.offset + rows * options.block + 1 - options.size) // options.block).clamp(min=options.first)


@torch.no_grad()
def better(call: AttentionCall, near: Tensor, both: Tensor, samples: int) -> Tensor:
    """Which heads the Gaussian brings nearer to the exact output, bool ``[B, H]``, on evenly spaced rows."""
    num_q, num_k = call.query.shape[2], call.key.shape[2]
    rows = torch.linspace(num_q // 4, num_q - 1, min(samples, num_q), device=near.device).long()
    group = call.query.shape[1] // call.key.shape[1]
    query = call.query[:, :, rows].unflatten(1, (-1, group)).float()
    scores = query @ call.key[:, :, None].float().transpose(-1, -2) * call.factor
    hidden = torch.arange(num_k, device=rows.device) > (rows + call.offset)[:, None]
    scores = scores.masked_fill(hidden, float("-inf")).flatten(1, 2)
    if call.sinks is not None:
        extra = call.sinks.float()[None, :, None, None].expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, extra], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    exact = (weights.unflatten(1, (-1, group)) @ call.value[:, :, None].float()).flatten(1, 2).transpose(1, 2)
    errors = [(part[:, rows].float() - exact).square().sum((1, 3)) for part in (both, near)]
    return errors[0] < errors[1]


VARIANT = register(
    Variant(
        name="far",
        summary="long prompts see size= keys and one Gaussian for each head beyond them (approximate)",
        source="Rehead; the second-order expansion of the log-sum-exp",
        options=FarOptions,
        exact=lambda options: options.size >= LONGEST,
        off=lambda options: options.but(size=LONGEST),
        attend=attend,
        reach=lambda options: options.size + (options.first + 1) * options.block,
    )
)
