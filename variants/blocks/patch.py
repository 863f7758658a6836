"""The patches ``"parallel"`` and ``"serial"``: blocks of a live model in the other form, or fused, and back again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rehead.errors import UnsupportedError, UsageError, VerificationError, first_line
from rehead.models import probing
from rehead.models.distance import Distances, difference, distances
from rehead.models.predictions import Predictions, predict
from rehead.patches import prove as proof
from rehead.patches.patch import Patch, UndoLog, register_patch
from rehead.variants.blocks.anatomy import PARALLEL, SERIAL, Block, check_live, find_blocks
from rehead.variants.blocks.measure import BlockMeasure, batches, block_errors
from rehead.variants.blocks.parts import FusedLinear
from rehead.variants.blocks.redirect import redirect
from rehead.variants.blocks.report import BlockRecord, BlockReport, FusionProof
from rehead.variants.fuse.fused import Fusion

ALL, AUTO = "all", "auto"


class BlockPatch(Patch):
    """Base of both patches: everything but the form they give."""

    form: ClassVar[str]

    @dataclass
    class Options:
        """Options of both block patches.

        Attributes:
            layers: indices of the layers, or ``"all"``, or ``"auto"``: those that lose least, within ``kl_budget``.
            fused: fold the norms into the matrices that read them, and compute in as few products as the form allows.
            calibration: int ``[B, S]`` token ids that the report, and ``"auto"``, measure on; see
                ``calibration_tokens`` in measure.py. Without them, random tokens, which say little.
            kl_budget: for ``"auto"``: most nats a token that the changed model may be off by.
        """

        layers: Any = ALL
        fused: bool = False
        calibration: Tensor | None = None
        kl_budget: float | None = None

    options: Options  # type: ignore[assignment]

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__(model, **options)
        given = self.options.layers
        named = isinstance(given, str)
        if named and given not in (ALL, AUTO):
            raise UsageError(f"layers must be 'all', 'auto' or a list of indices, not {given!r}")
        if not named and not (isinstance(given, Sequence) and all(type(i) is int for i in given) and len(given)):
            raise UsageError(f"layers must be 'all', 'auto' or a list of indices, not {given!r}")
        if (given == AUTO) != (self.options.kl_budget is not None):
            raise UsageError("layers='auto' and kl_budget= go together; give both or neither")
        if self.options.calibration is not None:
            batches(self.options.calibration, model)
        self._measured: BlockMeasure | None = None
        self._measured_on = ""
        self._fusions: list[Fusion] = []
        self._chosen: list[int] | None = None
        self._ready: dict[str, dict[str, FusedLinear]] | None = None

    @property
    def exact(self) -> bool:
        """Whether no block changed its form (fusing alone changes nothing); False before the patch was applied."""
        return bool(self._records) and all(record.was == record.now for record in self._records)

    @property
    def layers(self) -> list[int]:
        """Indices of the blocks that the patch changed or fused."""
        return [record.index for record in self._records if isinstance(record, BlockRecord)]

    def _check(self) -> None:
        check_live(self.model)

    def _apply(self, undo: UndoLog) -> None:
        blocks = find_blocks(self.model)
        chosen = self._choose(blocks)
        picked = [block for block in blocks if block.index in chosen]
        if not self.options.fused:
            picked = [block for block in picked if block.form != self.form]
        if not picked:
            raise UsageError(f"every chosen layer is {self.form} already; choose others, or fused=True")
        self._untouched = [block.name for block in blocks if block not in picked]
        self._fusions, records = [], []
        for block in picked:
            how = "fused" if self.options.fused else "redirected"
            module = type(block.layer).__name__
            records.append(BlockRecord(block.name, module, block.form, self.form, how, index=block.index))
        self._records = list(records)
        changed = [(b, r) for b, r in zip(picked, records) if b.form != self.form]
        if not self.options.fused:
            self._pairs = changed
            for block, record in changed:
                redirect(block, record, undo)
            return
        self._pairs = []
        fusions = [Fusion(block, self.form, record) for block, record in zip(picked, records)]
        want, moved = self._unfused_logits(changed, [block.name for block in picked])
        for fusion in fusions:
            fusion.apply(undo, (self._ready or {}).get(fusion.block.name))
        self._fusions = fusions
        self._check_fusion(want, moved)
        for record in records:
            record.calls = 0
        undo.set_attribute(self.model, "save_pretrained", _refuse_saving)

    def _choose(self, blocks: list[Block]) -> set[int]:
        given, known = self.options.layers, [block.index for block in blocks]
        if given == ALL:
            return set(known)
        if given == AUTO:
            if self._chosen is None:
                from rehead.variants.blocks.ranking import choose_layers

                tokens = self.options.calibration
                if tokens is None:
                    raise UsageError("layers='auto' measures on text: give calibration=, token ids [sequences, length]")
                found = choose_layers(self.model, tokens, form=self.form, kl_budget=self.options.kl_budget)
                if not found.layers:
                    raise UsageError(
                        f"no layer can be made {self.form} within kl_budget={self.options.kl_budget}; the best alone "
                        f"costs {found.alone[0].kl:.4f}; give more"
                    )
                self._chosen = found.layers
            return set(self._chosen)
        wrong = [index for index in given if index not in known]
        if wrong:
            raise UsageError(f"layers: {wrong[0]} is not a layer with attention; choose from {known[0]} to {known[-1]}")
        return set(given)

    def _unfused_logits(self, changed: list[tuple[Block, BlockRecord]], names: list[str]) -> tuple[Predictions, float]:
        """Logits of a small probe in the new form, unfused, and what one more rounding of each named block does."""
        undo = UndoLog()
        try:
            for block, record in changed:
                redirect(block, record, undo)
            want = self._probe_logits()
            with probing.frozen(self.model):
                return want, probing.rounding(self.model, names, self._probe(), want)
        finally:
            undo.run()

    def _probe(self) -> dict[str, Any]:
        return {"input_ids": probing.probe_tokens(self.model, 8, 2, seed=1)}

    def _probe_logits(self) -> Predictions:
        with probing.frozen(self.model):
            return predict(self.model, self._probe())

    def _check_fusion(self, want: Predictions, moved: float) -> None:
        """What reads a norm past the matrices that were found, or runs in another order, shows here."""
        try:
            got = self._probe_logits()
        except (KeyError, RuntimeError, AssertionError) as error:
            raise UnsupportedError(
                f"{type(self.model).__name__} does not run fused ({first_line(error, 100)}); patch it with fused=False"
            ) from error
        limit = proof.allowance(want)
        gap = difference(got, want)
        if not gap <= limit and not gap <= max(limit, proof.by_rounding(self.model, moved, want)):
            raise UnsupportedError(
                f"{type(self.model).__name__} computes something else when fused (by {gap:.1e}, {limit:.1e} allowed): "
                "its norms are read by more than its matrices; patch it with fused=False"
            )

    def revert(self) -> None:
        """Take the model back: bit for bit, or, where it was trained while fused, to the same function as trained.

        Trained weights go into the block's own parameters exactly; the norms, whose weights they hold, become ones.

        Raises:
            UsageError: the patch is not applied.
            UnsupportedError: weights trained while fused cannot be taken apart; the model stays fused.
        """
        pending: list[Callable[[], None] | None] = []
        if self.applied:
            pending = [fusion.trained() for fusion in self._fusions]
        if self._ready is not None:
            self._ready = {fusion.block.name: fusion.fused() for fusion in self._fusions}
        super().revert()
        for write_back in pending:
            if write_back is not None:
                write_back()
        self._fusions = []

    @contextmanager
    def _same_parameters(self) -> Iterator[None]:
        """Lets the patch be taken off and put back with the very fused parameters that an optimizer may hold."""
        if any(fusion.trained() is not None for fusion in self._fusions):
            raise UsageError(
                "weights were changed while fused, so there is no unfused model to compare with; revert() first"
            )
        self._ready = {}
        try:
            yield
        finally:
            self._ready = None

    def report(self, input_ids: Tensor | None = None) -> BlockReport:
        """Block by block: form before and after, calls, and how far off each is and the model are.

        An applied patch that changed forms is measured the first time, or anew on the tokens that are given.

        Args:
            input_ids: int ``[B, S]``; the patch's ``calibration`` otherwise, and random tokens without either.
        """
        if self.applied and not self.exact and (self._measured is None or input_ids is not None):
            self.measure(input_ids=input_ids)
        plain = super().report()
        return BlockReport(**{**plain.__dict__, "measured": self._measured, "on": self._measured_on})

    def _twin(self) -> BlockPatch:
        """The same change of form, unfused."""
        return type(self)(self.model, layers=self.layers)

    def measure(  # type: ignore[override]
        self, *, input_ids: Tensor | None = None, length: int | None = None
    ) -> BlockMeasure:
        """How far the changed model is from the original; kept for :meth:`report`.

        ``residual`` is what is left with the change switched off, or, for fused blocks, what fusing adds to it.

        Args:
            input_ids: int ``[B, S]``; by default the patch's ``calibration``, or random tokens.
            length: tokens a row of the random ones.

        Raises:
            UsageError: the patch is not applied, or changed no form.
        """
        if not self.applied:
            raise UsageError(f"patch {self.name!r} is not applied; measure it inside `with patch_model(...)`")
        if self.exact:
            return super().measure()
        given = input_ids if input_ids is not None else self.options.calibration
        on = "random tokens" if given is None else "the tokens given"
        if given is None:
            given = probing.probe_tokens(self.model, length or probing.default_length(self.model), 2, seed=0)
        parts = batches(given, self.model)
        fused = self.options.fused
        with self._same_parameters(), probing.frozen(self.model):
            variants = [self._logits(part) for part in parts] if fused else []
            with probing.unpatched(self):
                references = [self._logits(part) for part in parts]
                twin = self._twin()
                with twin:
                    share, update = block_errors(self.model, twin._pairs, torch.cat(parts))
                    plain = [self._logits(part) for part in parts]
                    now = [(record, record.now) for _, record in twin._pairs]
                    for record, _ in now:
                        record.now = record.was
                    off = self._logits(parts[0])
                    for record, form in now:
                        record.now = form
        variants = variants or plain
        apart = Distances.cat([distances(a, b) for a, b in zip(references, variants)])
        residual = max(difference(a, b) for a, b in zip(plain, variants)) if fused else difference(off, references[0])
        measured = BlockMeasure(
            kl=apart.mean_kl,
            difference=apart.largest,
            agreement=apart.top1_agreement,
            residual=residual,
            layers=share,
            updates=update,
            tokens=int(given.numel()),
        )
        for mine in self._records:
            if isinstance(mine, BlockRecord):
                mine.error, mine.update_error = share.get(mine.index, 0.0), update.get(mine.index, 0.0)
        self._measured, self._measured_on = measured, on
        return measured

    def _logits(self, tokens: Tensor) -> Predictions:
        return predict(self.model, {"input_ids": tokens})

    def prove(self, **options: Any) -> Any:
        """Fused equals unfused: with the original where no form changed, otherwise with the new form unfused.

        Raises:
            VerificationError: it does not.
            UsageError: the patch is not applied, or is not fused: then there is nothing exact about it.
        """
        if not self.applied:
            raise UsageError(f"patch {self.name!r} is not applied; prove it inside `with patch_model(...)`")
        if self.exact:
            with self._same_parameters():
                return proof.prove(self, **options)
        if not self.options.fused:
            return super().prove(**options)
        return self._prove_fusion(**options)

    def _prove_fusion(
        self,
        *,
        input_ids: Tensor | None = None,
        length: int | None = None,
        tolerance: float | None = None,
        padding: bool = True,
    ) -> proof.Proof:
        with self._same_parameters(), probing.frozen(self.model):
            probe = probing.make_probe(self.model, input_ids, length, padding)
            before = {record.name: record.calls for record in self._records}
            mine = probing.run_probe(self.model, probe)
            calls = {record.name: record.calls - before[record.name] for record in self._records}
            with probing.unpatched(self), self._twin():
                theirs = probing.run_probe(self.model, probe)
                limit, gap = proof.allowance(theirs.plain, tolerance), probing.gap_of(mine, theirs, probe)
                moved = 0.0
                if not gap <= limit and tolerance is None:
                    moved = probing.rounding(self.model, list(calls), probe.plain, theirs.plain)
        silent = [name for name, count in calls.items() if not count]
        if silent:
            raise VerificationError(f"{silent[0]} ran without its fused matrices; revert the patch")
        if not gap <= limit:
            limit = max(limit, proof.by_rounding(self.model, moved, theirs.plain))
        if not gap <= limit:
            raise VerificationError(
                f"the fused logits differ from the unfused ones by {gap:.2e}, over the {limit:.2e} allowed; "
                "revert the patch and report the model type"
            )
        leak, other = (difference(x.plain[:, : probe.cut], x.changed[:, : probe.cut]) for x in (mine, theirs))
        if leak > 4 * other and leak > limit:
            raise VerificationError(f"later tokens change earlier logits by {leak:.2e}; revert the patch")
        against = f"the {self.form} form unfused"
        return FusionProof(len(calls), sum(calls.values()), gap, limit, leak, other, [], against)


def _refuse_saving(*args: Any, **kwargs: Any) -> None:
    raise UsageError("a fused model's tensors are not those of its class; revert() the patch before save_pretrained")


@register_patch
class ParallelPatch(BlockPatch):
    """``z = x + Attn(N1 x) + MLP(N2 x)`` (arXiv 2204.02311), from ``y = x + Attn(N1 x); z = y + MLP(N2 y)``.

    Not the same function: see :meth:`measure`. Blocks that are parallel already can be fused, which is exact.
    """

    name: ClassVar[str] = "parallel"
    summary: ClassVar[str] = "serial blocks as parallel ones (approximate); fused=True computes them in two products"
    form: ClassVar[str] = PARALLEL


@register_patch
class SerialPatch(BlockPatch):
    """``y = x + Attn(N1 x); z = y + MLP(N2 y)``, from the parallel block; a norm that was shared is used twice.

    Not the same function: see :meth:`measure`. Blocks that are serial already can be fused, which is exact.
    """

    name: ClassVar[str] = "serial"
    summary: ClassVar[str] = "parallel blocks as serial ones (approximate); fused=True computes them in four products"
    form: ClassVar[str] = SERIAL
