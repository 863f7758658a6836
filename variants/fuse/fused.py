"""Blocks in as few products as their form allows.

The norms' weights are folded into the matrices that read them. In a parallel block, q, k, v and the FFN's input are
then one product of the normalised input, and both outputs one product of what attention and FFN hand over. In a serial
block they are q, k, v in one product, and the FFN's inputs in another.

The block's own code keeps running: the norm makes the product, the matrices that it replaces hand out their share, and
in a parallel block attention's output matrix keeps its input for the joint product, made by the FFN's output matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rehead.errors import UnsupportedError
from rehead.models.live import LayerState
from rehead.models.undo import UndoLog
from rehead.variants.blocks.anatomy import PARALLEL, SERIAL, Block
from rehead.variants.blocks.redirect import redirect
from rehead.variants.fuse.norms import NormKind, fold, norm_kind, norm_parameters
from rehead.variants.fuse.parts import Exchange, FusedLinear, Hold, Join, NormAndProduct, PassOn, Piece

FUSED_IN, FUSED_FFN_IN, FUSED_OUT = "rehead_fused_in", "rehead_fused_ffn_in", "rehead_fused_out"
"""Names under which a block holds its fused matrices while it is fused."""


@dataclass(frozen=True)
class Reader:
    """A matrix that reads a norm: where it is (``part`` and ``name`` in it), itself, and the norm with its kind."""

    part: nn.Module
    name: str
    matrix: nn.Module
    norm: nn.Module
    kind: NormKind


class Fusion:
    """One block's matrices, fused; knows the way back.

    Args:
        block: as found in the unpatched model.
        form: the form that it shall have.
        state: counts calls.

    Raises:
        UnsupportedError: the block has something that does not fuse, by name; nothing was changed.
    """

    def __init__(self, block: Block, form: str, state: LayerState) -> None:
        self.block, self.form, self.state = block, form, state
        self._exchange = Exchange()
        size = self._hidden_size()
        kinds = [norm_kind(norm, size) for norm in (block.attention_norm, block.ffn_norm)]
        for norm, kind in zip((block.attention_norm, block.ffn_norm), kinds):
            if kind is None:
                raise self._refuse(f"{type(norm).__name__} is neither LayerNorm nor RMSNorm with a known eps")
        assert kinds[0] is not None
        assert kinds[1] is not None
        self.attention_kind, self.ffn_kind = kinds[0], kinds[1]
        if form == PARALLEL and not self.attention_kind.same_statistics(self.ffn_kind):
            raise self._refuse("its two norms differ in kind or eps")
        self._check_parts()
        self.readers = self._find_readers()
        self.writers = (
            block.attention.get_submodule(str(block.attention_writer)),
            block.ffn.get_submodule(str(block.ffn_writer)),
        )
        flags = {p.requires_grad for m in self.matrices() for p in m.parameters()}
        if len(flags) > 1:
            raise self._refuse("some of its matrices are frozen and some are not")
        if len({p.dtype for m in self.matrices() for p in m.parameters()}) > 1:
            raise self._refuse("its matrices have different dtypes")

    def _refuse(self, reason: str) -> UnsupportedError:
        return UnsupportedError(f"{self.block.name} cannot be fused: {reason}; patch it with fused=False")

    def _hidden_size(self) -> int:
        readers = [self.block.attention.get_submodule(n) for n in self.block.attention_readers]
        if not readers:
            raise self._refuse(f"no plain nn.Linear of {type(self.block.attention).__name__} reads the norm")
        return as_rows(readers[0])[0].shape[1]

    def _check_parts(self) -> None:
        block = self.block
        for part, readers, writer in (
            (block.attention, block.attention_readers, block.attention_writer),
            (block.ffn, block.ffn_readers, block.ffn_writer),
        ):
            if not readers or writer is None:
                end = "reads the norm" if not readers else "gives its output"
                raise self._refuse(f"no plain nn.Linear of {type(part).__name__} {end} (experts and adapters are not)")
            if len(set(readers)) != len(readers) or writer in readers:
                raise self._refuse(f"a matrix of {type(part).__name__} is used more than once")
            for name in (*readers, writer):
                module = part.get_submodule(name)
                hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
                if any(hooks) or "forward" in module.__dict__:
                    raise self._refuse(f"{name} has hooks (offloading?), which would be bypassed")

    def matrices(self) -> list[nn.Module]:
        """Every matrix that is replaced."""
        return [*(reader.matrix for reader in self.readers.values()), *self.writers]

    def _find_readers(self) -> dict[str, Reader]:
        """Every matrix that reads a norm, attention's first."""
        block, found = self.block, {}
        for key, part, names, norm, kind in (
            ("attention", block.attention, block.attention_readers, block.attention_norm, self.attention_kind),
            ("ffn", block.ffn, block.ffn_readers, block.ffn_norm, self.ffn_kind),
        ):
            for name in names:
                found[f"{key}.{name}"] = Reader(part, name, part.get_submodule(name), norm, kind)
        return found

    def inputs(self) -> dict[str, list[str]]:
        """Fused input matrix -> keys of the readers in it, in order."""
        keys = list(self.readers)
        if self.form == PARALLEL:
            return {FUSED_IN: keys}
        return {
            FUSED_IN: [key for key in keys if key.startswith("attention.")],
            FUSED_FFN_IN: [key for key in keys if key.startswith("ffn.")],
        }

    def fold_input(self, keys: list[str]) -> tuple[Tensor, Tensor | None, Tensor, dict[str, int]]:
        """(weight, bias, where the bias is the model's own, rows of each reader), from the block's own parameters."""
        weights, biases, own, sizes = [], [], [], {}
        for key in keys:
            reader = self.readers[key]
            weight, bias = as_rows(reader.matrix)
            own.append(torch.full((len(weight),), bias is not None, device=weight.device))
            weight, bias = fold(weight, bias, reader.kind, *norm_parameters(reader.norm))
            weights.append(weight)
            biases.append(bias)
            sizes[key] = len(weight)
        if all(bias is None for bias in biases):
            return torch.cat(weights), None, torch.cat(own), sizes
        filled = [w.new_zeros(len(w)) if b is None else b for w, b in zip(weights, biases)]
        return torch.cat(weights), torch.cat(filled), torch.cat(own), sizes

    def fold_output(self) -> tuple[Tensor, Tensor | None]:
        """(weight, bias) of the joint output matrix: attention's columns, then the FFN's; biases added."""
        rows = [as_rows(m) for m in self.writers]
        biases = [bias for _, bias in rows if bias is not None]
        # A bias that is alone must not be shared with the block's own parameter, which stays as it is while fused.
        return torch.cat([w for w, _ in rows], dim=1), sum(biases[1:], biases[0].clone()) if biases else None

    def fused(self) -> dict[str, FusedLinear]:
        """The fused matrices that are in place, by their names in the layer."""
        modules = self.block.layer._modules
        found = {name: modules.get(name) for name in (*self.inputs(), FUSED_OUT)}
        return {name: matrix for name, matrix in found.items() if isinstance(matrix, FusedLinear)}

    def apply(self, undo: UndoLog, ready: dict[str, FusedLinear] | None = None) -> None:
        """Put the fused matrices in, logging every replacement in ``undo``.

        Args:
            undo: takes the way back.
            ready: matrices fused before from the same parameters: the same objects, which an optimizer may hold.
        """
        block, layer, exchange = self.block, self.block.layer, self._exchange
        trains = any(p.requires_grad for m in self.matrices() for p in m.parameters())
        norms: dict[str, NormAndProduct] = {}
        with torch.no_grad():
            for attribute, keys in self.inputs().items():
                weight, bias, own, sizes = self.fold_input(keys)
                matrix = ready[attribute] if ready else FusedLinear(weight, bias, trains, own)
                _put(layer, attribute, matrix, undo)
                norms[attribute] = NormAndProduct(
                    exchange,
                    matrix,
                    self.attention_kind if attribute == FUSED_IN else self.ffn_kind,
                    sizes,
                    self.state,
                    getattr(getattr(block.attention, "config", None), "clip_qkv", None) is not None,
                )
            attention_norm = block.child_name(block.attention_norm)
            if not block.shared_norm:
                # The FFN's pieces come from the first norm (parallel), or from its own once attention has run.
                second = norms[FUSED_FFN_IN] if (block.form, self.form) == (SERIAL, SERIAL) else PassOn()
                _put(layer, block.child_name(block.ffn_norm), second, undo)
            _put(layer, attention_norm, norms[FUSED_IN], undo)
            if (block.form, self.form) == (PARALLEL, SERIAL):
                redirect(block, self.state, undo, norms[FUSED_IN], norms[FUSED_FFN_IN])
            for key, reader in self.readers.items():
                _put(reader.part, reader.name, Piece(exchange, key), undo)
            if self.form == PARALLEL:
                weight, bias = self.fold_output()
                matrix = ready[FUSED_OUT] if ready else FusedLinear(weight, bias, trains)
                _put(layer, FUSED_OUT, matrix, undo)
                _put(block.attention, str(block.attention_writer), Hold(exchange, len(weight)), undo)
                _put(block.ffn, str(block.ffn_writer), Join(exchange, matrix), undo)

    def trained(self) -> Callable[[], None] | None:
        """None if the fused matrices are what the block's own parameters give; otherwise what writes them back.

        Called while the block is fused; the result, once it is not. Parameters of the block that are elsewhere by now,
        or of another dtype, follow the fused ones.

        Raises:
            UnsupportedError: they were trained, and the block has no parameter for the bias that was folded in.
        """
        matrices = self.fused()
        place = matrices[FUSED_IN].weight
        changed = False
        with torch.no_grad():
            for name, matrix in matrices.items():
                weight, bias = self.fold_input(self.inputs()[name])[:2] if name != FUSED_OUT else self.fold_output()
                same = torch.equal(weight.to(place), matrix.weight)
                if bias is not None and same:
                    full = matrix.full_bias()
                    assert full is not None
                    same = torch.equal(bias.to(place), full)
                changed = changed or not same
        for module in (*self.matrices(), self.block.attention_norm, self.block.ffn_norm):
            module.to(device=place.device, dtype=place.dtype)
        if not changed:
            return None
        if any(m.fixed is not None and bool(m.fixed.any()) for m in matrices.values()):
            raise UnsupportedError(
                f"{self.block.name} was trained while fused, and the bias of its norm is in matrices that have none of "
                "their own, so the weights cannot be taken apart; keep it fused, or train with fused=False"
            )
        return lambda: self._write_back(matrices)

    @torch.no_grad()
    def _write_back(self, matrices: dict[str, FusedLinear]) -> None:
        """Trained matrices into the block's own parameters. The norms' learned part stays in the matrices, exactly."""
        for name, keys in self.inputs().items():
            matrix, start = matrices[name], 0
            full = matrix.full_bias()
            for key in keys:
                reader = self.readers[key]
                weight, bias = as_rows(reader.matrix)
                end = start + len(weight)
                weight.copy_(matrix.weight[start:end])
                if bias is not None and full is not None:
                    bias.copy_(full[start:end])
                start = end
                gain, shift = norm_parameters(reader.norm)
                if gain is not None:
                    gain.fill_(1.0 - reader.kind.offset)
                if shift is not None:
                    shift.zero_()
        if FUSED_OUT in matrices:
            matrix, first = matrices[FUSED_OUT], 0
            biases = []
            for writer in self.writers:
                weight, bias = as_rows(writer)
                weight.copy_(matrix.weight[:, first : first + weight.shape[1]])
                first += weight.shape[1]
                if bias is not None:
                    biases.append(bias.zero_())
            if biases and matrix.bias is not None:
                biases[-1].copy_(matrix.bias)


def as_rows(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight as ``[out, in]`` and bias of a Linear or Conv1D."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    bias: Tensor | None = module.bias  # type: ignore[assignment]
    return (weight.T if isinstance(module, Conv1D) else weight), bias


def _put(parent: nn.Module, name: str, module: nn.Module, undo: UndoLog) -> None:
    """Set a submodule by its dotted name within ``parent``, and remember the one that was there, in its place."""
    path, _, last = name.rpartition(".")
    owner = parent.get_submodule(path)
    # In eval and train mode alike, and without a shuffle of the order in which modules are listed.
    module.train(owner.training)
    undo.set_item(owner._modules, last, module)
