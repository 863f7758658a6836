"""Exact attention on the CPU with the signature of the GPU kernels: tiles, log-sum-exp merges, linear memory.

The forward and the backward are registered as custom operators (``rehead::cpu_attention`` and its backward), so that
autograd, ``torch.compile`` and gradient checkpointing treat attention as one opaque node.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from rehead.attention.blocks import KeyBlocks
from rehead.attention.call import AttentionCall
from rehead.attention.cpu.masks import Row, TileMasks, read_row
from rehead.attention.cpu.plan import Extent, Rect, Tile, plan
from rehead.attention.cpu.tiles import flash_backward, flash_forward, math_backward, math_forward, merge_

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


STEP_ELEMENTS = 1 << 20
"""Largest query tensor for one kernel call; larger ones are split along heads to keep temporaries small."""


@dataclass
class Lane:
    """Batch rows that share one plan, in the layout of the tile functions.

    Attributes:
        rows: the batch rows.
        query, key, value: ``[N, G, Sq, D]`` and ``[N, 1 or G, Skv, D]``.
        tiles: the tiles to compute.
        masks: makes the mask of each masked tile.
    """

    rows: slice
    query: Tensor
    key: Tensor
    value: Tensor
    tiles: list[Tile]
    masks: TileMasks

    def mask(self, tile: Tile) -> tuple[Tensor | None, Tensor | None]:
        return self.masks(tile) if tile.kind == "masked" else (None, None)

    def keys(self, tile: Tile) -> tuple[Tensor, Tensor]:
        return self.key[:, :, tile.k0 : tile.k1], self.value[:, :, tile.k0 : tile.k1]

    def lay_out(self, tensor: Tensor) -> Tensor:
        """A tensor ``[rows, H, S, ...]`` reshaped to this lane's ``[N, G, S, ...]``."""
        return tensor.reshape(*self.query.shape[:2], *tensor.shape[2:])


def _rows(call: AttentionCall, batch: int, n_query: int, n_key: int) -> list[tuple[slice, Row]]:
    """Groups of batch rows that see the same keys; one group if all do."""
    per_row = (call.kv_start, call.ends, call.key_mask, call.q_segments)
    if batch == 0 or all(item is None for item in per_row):
        rows = [(slice(0, batch), Row([Rect(0, n_query, 0, n_key)]))]
    else:
        starts = [0] * batch if call.kv_start is None else call.kv_start.tolist()
        ends = [n_key] * batch if call.ends is None else call.ends.tolist()
        read = [
            read_row(
                n_query,
                n_key,
                starts[b],
                ends[b],
                None if call.key_mask is None else call.key_mask[b],
                None if call.q_segments is None else call.q_segments[b],
                None if call.kv_segments is None else call.kv_segments[b],
            )
            for b in range(batch)
        ]
        same = all(not row.irregular and row.rects == read[0].rects for row in read)
        rows = [(slice(0, batch), read[0])] if same else [(slice(b, b + 1), row) for b, row in enumerate(read)]
    if (call.bias is not None or call.alibi_slopes is not None) and len(rows) == 1 and batch > 1:
        # A mask that differs between heads is made for one batch row at a time.
        rows = [(slice(b, b + 1), rows[0][1]) for b in range(batch)]
    if call.blocks is not None:
        if call.blocks.starts.shape[0] > 1:
            rows = [(slice(b, b + 1), row) for span, row in rows for b in range(span.start, span.stop)]
        rows = [(span, replace(row, rects=_listed(row.rects, call.blocks, span.start))) for span, row in rows]
    return rows


def _listed(rects: list[Rect], blocks: KeyBlocks, batch: int) -> list[Rect]:
    """What is left of rectangles where each block of rows sees listed blocks of keys only, the same for every head."""
    parts = []
    for number, runs in enumerate(blocks.runs(batch)):
        for rect in rects:
            q0, q1 = max(rect.q0, number * blocks.rows), min(rect.q1, (number + 1) * blocks.rows)
            cut = (Rect(q0, q1, max(rect.k0, low), min(rect.k1, high)) for low, high in runs)
            parts += [part for part in cut if part.q0 < part.q1 and part.k0 < part.k1]
    return parts


def _heads(call: AttentionCall) -> Iterator[AttentionCall]:
    """The call's heads one by one, where each has lists of key blocks of its own."""
    assert call.blocks is not None
    heads = call.query.shape[1]
    group = heads // call.key.shape[1]
    for head in range(heads):
        own, shared = slice(head, head + 1), slice(head // group, head // group + 1)
        yield call.with_(
            query=call.query[:, own],
            key=call.key[:, shared],
            value=call.value[:, shared],
            blocks=replace(call.blocks, starts=call.blocks.starts[:, own]),
            alibi_slopes=None if call.alibi_slopes is None else call.alibi_slopes[own],
            sinks=None if call.sinks is None else call.sinks[own],
            bias=call.bias if call.bias is None or call.bias.shape[1] == 1 else call.bias[:, own],
        )


def _split_long(rows: list[tuple[slice, Row]], elements: int) -> list[tuple[slice, Row]]:
    """Split groups of long sequences into single batch rows, which saves copies; short ones stay, to save calls."""
    if elements <= STEP_ELEMENTS:
        return rows
    return [(slice(b, b + 1), row) for span, row in rows for b in range(span.start, span.stop)]


def _lanes(call: AttentionCall, *, tiled: bool) -> Iterator[Lane]:
    query, key, value = call.query, call.key, call.value
    batch, heads, n_query, _ = query.shape
    kv_heads, n_key = key.shape[1:3]
    group = heads // kv_heads
    work = torch.promote_types(query.dtype, torch.float32)
    mask_heads = heads if call.alibi_slopes is not None or (call.bias is not None and call.bias.shape[1] > 1) else 1
    layout = _rows(call, batch, n_query, n_key)
    if group > 1:
        layout = _split_long(layout, query.numel())
    for rows, row in layout:
        count = rows.stop - rows.start
        q, k, v = query[rows], key[rows], value[rows]
        alibi = call.alibi_slopes
        bias = None
        if call.bias is not None:
            bias = call.bias if call.bias.shape[0] == 1 else call.bias[rows]
        if group > 1:
            q = q.reshape(count * kv_heads, group, n_query, q.shape[-1])
            k, v = (x.reshape(count * kv_heads, 1, n_key, x.shape[-1]) for x in (k, v))
            alibi = None if alibi is None else alibi.view(kv_heads, group)
            if bias is not None and bias.shape[1] > 1:
                bias = bias.reshape(kv_heads, group, *bias.shape[2:])
        elif alibi is not None:
            alibi = alibi[None]
        rules = Extent(
            causal=call.causal,
            offset=call.offset,
            window=call.window,
            chunk=call.chunk,
            dense=row.irregular or alibi is not None or bias is not None,
            tiled=tiled,
            mask_heads=mask_heads,
        )
        yield Lane(rows, q, k, v, plan(row.rects, rules), TileMasks(rules, row, alibi, bias, work))


def _head_steps(lane: Lane, tile: Tile) -> list[slice]:
    """Slices of heads to compute a large tile in, so that the kernel's temporaries stay small."""
    count, group = lane.query.shape[:2]
    if (tile.q1 - tile.q0) * lane.query.shape[-1] * count * group <= STEP_ELEMENTS:
        return [slice(0, group)]
    step = max(1, -(-torch.get_num_threads() // count))
    return [slice(start, min(start + step, group)) for start in range(0, group, step)]


def _pick(tensor: Tensor | None, heads: slice) -> Tensor | None:
    """Some heads of a tensor whose second dimension may be broadcast."""
    return tensor if tensor is None or tensor.shape[1] == 1 else tensor[:, heads]


def _lane_forward(lane: Lane, call: AttentionCall, out: Tensor, lse: Tensor) -> None:
    """Fill ``out`` ``[N, G, Sq, D]`` (zeros) and ``lse`` ``[N, G, Sq]`` (-inf) of one lane."""
    filled = torch.zeros(lane.query.shape[2], dtype=torch.bool)
    for tile in lane.tiles:
        rows = slice(tile.q0, tile.q1)
        key, value = lane.keys(tile)
        mask, hidden = lane.mask(tile)
        merge = bool(filled[rows].any())
        filled[rows] = True
        for heads in _head_steps(lane, tile):
            args = (
                lane.query[:, heads, rows],
                *(key if key.shape[1] == 1 else key[:, heads], value if value.shape[1] == 1 else value[:, heads]),
                call.factor,
                _pick(mask, heads),
                tile.kind == "causal",
            )
            if call.softcap is None:
                part, part_lse = flash_forward(*args, _pick(hidden, heads))
            else:
                part, part_lse = math_forward(*args, call.softcap)
            if merge:
                merge_(out[:, heads, rows], lse[:, heads, rows], part, part_lse.to(lse.dtype))
            else:
                out[:, heads, rows], lse[:, heads, rows] = part, part_lse


def _decode(call: AttentionCall) -> tuple[Tensor, Tensor] | None:
    """Attention of one query token: a group's heads become the rows of one tile, so each KV head is read once."""
    query, key, value = call.query, call.key, call.value
    batch, heads, _, dim = query.shape
    kv_heads, n_key = key.shape[1:3]
    if any(item is not None for item in (call.softcap, call.alibi_slopes, call.bias, call.blocks)):
        return None
    low, high = 0, n_key
    if call.causal:
        high = min(high, call.offset + 1)
    if call.window is not None:
        low = max(low, call.offset - call.window + 1)
    if call.chunk is not None:
        start = call.offset // call.chunk * call.chunk
        low, high = max(low, start), min(high, start + call.chunk)
    if low >= high:
        return None
    seen = _seen_by_last(call, low, high)
    mask = hidden = None
    if seen is not None and not bool(seen.all()):
        mask = torch.where(seen, 0.0, float("-inf")).to(torch.promote_types(query.dtype, torch.float32))[:, None, None]
        hidden = ~seen.any(-1)[:, None, None]
    span = slice(low, high)
    packed = query.reshape(batch, kv_heads, heads // kv_heads, dim)
    out, lse = flash_forward(packed, key[:, :, span], value[:, :, span], call.factor, mask, False, hidden)
    return out.reshape(batch, 1, heads, dim).contiguous(), lse.reshape(batch, heads, 1).contiguous()


def _seen_by_last(call: AttentionCall, low: int, high: int) -> Tensor | None:
    """Which keys of ``[low, high)`` a single query sees under bounds, padding and segments, bool ``[B, n]``."""
    key = torch.arange(low, high)
    parts = []
    if call.kv_start is not None:
        parts.append(key >= call.kv_start[:, None])
    if call.ends is not None:
        parts.append(key < call.ends[:, None])
    if call.key_mask is not None:
        parts.append(call.key_mask[:, low:high])
    if call.q_segments is not None and call.kv_segments is not None:
        parts.append(call.kv_segments[:, low:high] == call.q_segments[:, :1])
    if not parts:
        return None
    seen = parts[0]
    for part in parts[1:]:
        seen = seen & part
    return seen


def _apply_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Add one logit per head to the denominator. ``out`` is ``[B, Sq, H, D]``, ``lse`` ``[B, H, Sq]``."""
    total = torch.logaddexp(lse, sinks.to(lse.dtype)[None, :, None])
    return (out * torch.exp(lse - total).transpose(1, 2)[..., None].to(out.dtype)), total


def forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Output ``[B, Sq, H, D]`` and log-sum-exp ``[B, H, Sq]`` (sinks included), both contiguous."""
    if call.blocks is not None and call.blocks.starts.shape[1] > 1:
        outs, lses = zip(*(forward(one) for one in _heads(call)), strict=True)
        return torch.cat(outs, 2), torch.cat(lses, 1)
    query = call.query
    heads, n_query, dim = query.shape[1:]
    result = _decode(call) if n_query == 1 else None
    if result is None:
        batch = query.shape[0]
        work = torch.promote_types(query.dtype, torch.float32)
        lanes = list(_lanes(call, tiled=call.softcap is not None))
        # Rows merged from several tiles are kept in float32 until they are complete.
        merged = any(sum(tile.q1 - tile.q0 for tile in lane.tiles) > n_query for lane in lanes)
        out = query.new_zeros(batch, n_query, heads, dim, dtype=work if merged else query.dtype)
        lse = query.new_full((batch, heads, n_query), float("-inf"), dtype=work)
        for lane in lanes:
            whole = out[lane.rows].transpose(1, 2)
            part = lane.lay_out(whole)
            _lane_forward(lane, call, part, lane.lay_out(lse[lane.rows]))
            if part.untyped_storage().data_ptr() != out.untyped_storage().data_ptr():
                # The reshape of grouped heads over several batch rows made a copy, not a view.
                whole.copy_(part.reshape(whole.shape))
        result = out.to(query.dtype), lse
    if call.sinks is not None:
        result = _apply_sinks(*result, call.sinks)
    return result


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, call: AttentionCall, bias_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, sinks and bias; the last two are empty if not needed.

    Args:
        grad_out, out: ``[B, Sq, H, D]``.
        grad_lse: ``[B, H, Sq]``, or None if the log-sum-exp is not used.
        lse: ``[B, H, Sq]`` with the sinks included.
        bias_grad: also differentiate with respect to ``call.bias``.
    """
    if call.blocks is not None and call.blocks.starts.shape[1] > 1:
        return _backward_by_head(grad_out, grad_lse, out, lse, call, bias_grad)
    dim = call.query.shape[-1]
    if grad_lse is not None:
        # A score's gradient is p (dp - delta + grad_lse), delta = sum(grad_out * out): one more column adds grad_lse.
        column = grad_lse.transpose(1, 2)[..., None].to(out.dtype)
        grad_out, out = torch.cat([grad_out, -column], -1), torch.cat([out, torch.ones_like(column)], -1)
        call = call.with_(query=F.pad(call.query, (0, 1)), key=F.pad(call.key, (0, 1)), value=F.pad(call.value, (0, 1)))
    query, key, value = call.query, call.key, call.value
    work = torch.promote_types(query.dtype, torch.float32)
    explicit = call.softcap is not None or bias_grad
    grads = [x.new_zeros(x.shape, dtype=work) for x in (query, key, value)]
    grad_bias = query.new_zeros(call.bias.shape if bias_grad and call.bias is not None else (0,), dtype=work)
    for lane in _lanes(call, tiled=explicit):
        grad_lane, out_lane = (lane.lay_out(x[lane.rows].transpose(1, 2)) for x in (grad_out, out))
        lse_lane = lane.lay_out(lse[lane.rows])
        # The sums are contiguous, so these are views, and tiles add directly into the result.
        sums = [
            g[lane.rows].view(like.shape) for g, like in zip(grads, (lane.query, lane.key, lane.value), strict=True)
        ]
        for tile in lane.tiles:
            rows, span = slice(tile.q0, tile.q1), slice(tile.k0, tile.k1)
            key_part, value_part = lane.keys(tile)
            mask, _ = lane.mask(tile)
            for some in _head_steps(lane, tile):
                own = key_part.shape[1] != 1
                args = (
                    grad_lane[:, some, rows],
                    lane.query[:, some, rows],
                    key_part[:, some] if own else key_part,
                    value_part[:, some] if own else value_part,
                    out_lane[:, some, rows],
                    lse_lane[:, some, rows],
                    call.factor,
                    _pick(mask, some),
                    tile.kind == "causal",
                )
                if explicit:
                    *parts, grad_mask = math_backward(*args, call.softcap)
                    if bias_grad:
                        _add_bias_grad(grad_bias, grad_mask, lane, tile, some)
                else:
                    parts = list(flash_backward(*args))
                for total, part, where in zip(sums, parts, (rows, span, span), strict=True):
                    _target(total, some)[:, :, where] += part
    grad_sinks = query.new_zeros(0)
    if call.sinks is not None:
        delta = (grad_out.to(work) * out.to(work)).sum(-1).transpose(1, 2)
        weight = torch.exp(call.sinks.to(work)[None, :, None] - lse)
        grad_sinks = -(weight * delta).sum((0, 2)).to(call.sinks.dtype)
    grad_q, grad_k, grad_v = (g[..., :dim].to(query.dtype).contiguous() for g in grads)
    if bias_grad and call.bias is not None:
        grad_bias = grad_bias.to(call.bias.dtype)
    return grad_q, grad_k, grad_v, grad_sinks, grad_bias


def _backward_by_head(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, call: AttentionCall, bias_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`backward` of each head on its own, where each has its own key blocks."""
    parts = []
    for head, one in enumerate(_heads(call)):
        own = slice(head, head + 1)
        of_lse = None if grad_lse is None else grad_lse[:, own]
        parts.append(backward(grad_out[:, :, own], of_lse, out[:, :, own], lse[:, own], one, bias_grad))
    query, key, value, sinks, bias = zip(*parts, strict=True)
    grouped = (torch.cat(grads, 1).unflatten(1, (call.key.shape[1], -1)).sum(2) for grads in (key, value))
    joined = torch.cat(bias, 1) if call.bias is not None and call.bias.shape[1] > 1 else torch.stack(bias).sum(0)
    return torch.cat(query, 1), *grouped, torch.cat(sinks), joined


def _target(total: Tensor, heads: slice) -> Tensor:
    """The part of a gradient for some heads; all heads of a group add to the same KV head."""
    return total if total.shape[1] == 1 else total[:, heads]


def _add_bias_grad(grad_bias: Tensor, grad_mask: Tensor, lane: Lane, tile: Tile, some: slice) -> None:
    """Add a tile's mask gradient, summed over the dimensions along which the bias is broadcast."""
    count = lane.rows.stop - lane.rows.start
    target = grad_bias if grad_bias.shape[0] == 1 else grad_bias[lane.rows]
    lane_heads = lane.query.shape[0] * lane.query.shape[1] // count
    # [rows, KV heads or 1, group, Sq, Skv]: in a lane the heads of a group are adjacent.
    part = grad_mask.reshape(count, -1, *grad_mask.shape[1:])
    if target.shape[1] == 1:
        part, target = part.sum((1, 2), keepdim=True), target[:, :, None]
    else:
        target = target.view(target.shape[0], part.shape[1], lane_heads // part.shape[1], *target.shape[2:])[:, :, some]
    for dim, (start, stop) in ((0, (0, count)), (3, (tile.q0, tile.q1)), (4, (tile.k0, tile.k1))):
        if target.shape[dim] == 1 and part.shape[dim] > 1:
            part = part.sum(dim, keepdim=True)
        elif dim and target.shape[dim] > 1:
            target = target.narrow(dim, start, stop - start)
    target += part
