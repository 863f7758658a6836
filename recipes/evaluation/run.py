"""One evaluation from names to a document: loads the models, measures what was asked for, in one readable order."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rehead.checkpoints.manifest import versions
from rehead.console import Progress
from rehead.data.beginning import text_start
from rehead.data.tokens import load_tokenizer, require_known, token_stream
from rehead.errors import UnsupportedError, UsageError
from rehead.models.live import resolve_device
from rehead.models.positions import check_positions
from rehead.models.predictions import vocabulary
from rehead.options import takes
from rehead.recipes import evaluation_schema as schema
from rehead.recipes.evaluation import divergence, gates, perplexity
from rehead.recipes.evaluation.damage import layer_damage, patch_damage
from rehead.recipes.evaluation.kv_cache import cache_note, cache_row, measure_cache
from rehead.recipes.evaluation.models import (
    JudgedModel,
    load_model,
    open_named,
    read_patches,
    require_same_tokenizer,
    tokenizer_of,
)
from rehead.recipes.evaluation.needle import needle_cells, require_length
from rehead.recipes.evaluation.options import EvaluateOptions
from rehead.recipes.evaluation.recalling import recall_rows
from rehead.recipes.evaluation.speed import speed_rows
from rehead.version import __version__

#: What is read where no text is named.
HELD_OUT = "built-in:heldout"


@dataclass(frozen=True)
class TokenisedText:
    """A text as the models read it.

    Attributes:
        name: as the user wrote it.
        tokens: int64 [T].
        start: int64 [p], how the tokenizer begins a text.
        bytes: UTF-8 bytes that they stand for.
    """

    name: str
    tokens: Tensor
    start: Tensor
    bytes: int


@takes(EvaluateOptions)
def evaluate(
    model: str,
    *,
    baseline: str | None = None,
    control: str | None = None,
    data: Sequence[str] = (),
    progress: Progress | None = None,
    **options: Any,
) -> schema.Evaluation:
    """Measure what is left of a model beside the one that it was made from.

    ::

        found = evaluate("llama-2-7b-gqa8", baseline="meta-llama/Llama-2-7b-hf", data=["speeches.txt"], damage=True)
        found.divergence[0].mean, found.perplexity[0].ratio
        evaluate("Qwen/Qwen3-0.6B", patches=["window:size=1k,sinks=4"])

    With a baseline and data: perplexity under each convention with the ratio to the baseline's, and the divergence from
    the baseline's predictions. With data alone: perplexity. The KV cache's size always; the rest when asked for.

    Args:
        model: the model that is judged: a folder, a Hub id, or ``id@revision``.
        baseline: what it was made from; of a model that is patched, the model as it is unless another is named.
        control: the baseline trained on the same tokens, so that what a text taught is not taken for recovery.
        data: texts, as ``rehead.data.sources.read_documents`` takes them; ``built-in:heldout`` where none is named and
            the model has a tokenizer.
        progress: called with (stage, done, total).

    Raises:
        UsageError: an option, a text or a model that is invalid; different vocabularies.
        UnsupportedError: a model that does not load or whose logits are not finite.
    """
    chosen = EvaluateOptions.parse(options)
    if chosen.patches:
        read_patches(chosen.patches)
        baseline = baseline or model
    notes = []
    if not data and tokenizer_of(open_named(baseline or model)) is not None:
        data = (HELD_OUT,)
    elif not data:
        notes.append("perplexity and divergence left out: the model has no tokenizer to read a text with")
    _check_request(chosen, model, baseline, data)
    manager = None
    if chosen.tasks:
        from rehead.recipes.evaluation.tasks import require_harness, task_manager

        require_harness()
        manager = task_manager(chosen.tasks, chosen.tasks_dir)
    device = resolve_device(chosen.device)
    texts = _texts(data, baseline or model, chosen)
    if texts:
        require_length(texts[0].tokens, chosen.needle)
    loaded = _load({"baseline": baseline, "control": control, "model": model}, chosen, device, progress)
    run = _Evaluation(loaded, texts, chosen, progress)
    facts = {item.who: item.facts() for item in loaded}
    found = schema.Evaluation(
        model=facts["model"],
        baseline=facts.get("baseline"),
        control=facts.get("control"),
        conditions=_conditions(device, loaded[0], texts, chosen),
        kv_cache=[cache_row(item.who, item.model, item.dtype, item.layouts()) for item in loaded],
    )
    found.notes += [*notes, *run.notes(found)]
    if texts:
        run.quality(found)
    if chosen.damage:
        run.damage(found)
    if chosen.needle:
        run.needle(found)
    if chosen.recall:
        run.recall(found)
    if chosen.tasks:
        run.tasks(found, manager)
    if chosen.speed:
        run.speed(found)
    found.gates = gates.judge(found, chosen.fail_above, chosen.fail_below)
    return found


def _check_request(chosen: EvaluateOptions, model: str, baseline: str | None, data: Sequence[str]) -> None:
    """Refuse what cannot be measured before anything is loaded."""
    asked = [("--damage", chosen.damage), ("--needle", bool(chosen.needle)), ("--recall", bool(chosen.recall))]
    for flag, wanted in asked:
        if wanted and not data:
            raise UsageError(f"{flag}: is measured on a text; give --data")
    if chosen.damage and chosen.patches and baseline != model:
        raise UsageError("--damage: takes the layers of a checkpoint or of a patch; leave out --baseline or --patch")
    if chosen.damage and baseline is None:
        raise UsageError("--damage: puts layers into the baseline; give --baseline")
    measured = {word for word, there in (
        ("baseline", baseline is not None), ("data", bool(data)), ("damage", chosen.damage),
        ("needle", bool(chosen.needle)), ("recall", bool(chosen.recall)),
    ) if there}  # fmt: skip
    gates.missing(chosen.fail_above, chosen.fail_below, measured)


def _load(
    names: Mapping[schema.Who, str | None], chosen: EvaluateOptions, device: torch.device, progress: Progress | None
) -> list[JudgedModel]:
    """The models that are named, in that order; all read a text as the same tokens."""
    wanted = {who: name for who, name in names.items() if name is not None}
    loaded: list[JudgedModel] = []
    for done, (who, name) in enumerate(wanted.items()):
        if progress is not None:
            progress("loading", done, len(wanted))
        patches = chosen.patches if who == "model" else ()
        loaded.append(
            load_model(who, name, device=device, dtype=chosen.dtype, attention=chosen.attention, patches=patches)
        )
        require_same_tokenizer(loaded[0], loaded[-1])
    if progress is not None:
        progress("loading", len(wanted), len(wanted))
    return loaded


def _texts(data: Sequence[str], name: str, chosen: EvaluateOptions) -> list[TokenisedText]:
    """The texts as tokens of a checkpoint's tokenizer; read before any model is, since texts are what is mistyped."""
    if not data:
        return []
    tokenizer = load_tokenizer(open_named(name))
    found = []
    for source in data:
        tokens = token_stream([source], tokenizer, chosen.tokens)
        if len(tokens) < chosen.window:
            raise UsageError(
                f"--data {source}: has {len(tokens)} tokens, less than one window of {chosen.window}; "
                "give more text or a smaller --window"
            )
        text = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        found.append(TokenisedText(source, tokens, text_start(tokenizer), len(text.encode("utf-8"))))
    return found


def _conditions(
    device: torch.device, model: JudgedModel, texts: list[TokenisedText], chosen: EvaluateOptions
) -> schema.Conditions:
    attention = chosen.attention or getattr(model.model.config, "_attn_implementation", None) or "its own"
    return schema.Conditions(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        dtype=perplexity.dtype_name(model.model),
        attention=attention,
        versions={**versions(), "rehead": __version__},
        seed=chosen.seed,
        data=[schema.Text(name=text.name, tokens=len(text.tokens), bytes=text.bytes) for text in texts],
        threads=torch.get_num_threads(),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


@dataclass
class _Evaluation:
    """The stages of an evaluation over the same models, texts and options; each fills in its section."""

    loaded: list[JudgedModel]
    texts: list[TokenisedText]
    chosen: EvaluateOptions
    progress: Progress | None

    def _stage(self, name: str) -> Callable[[float, float], None] | None:
        if self.progress is None:
            return None
        progress = self.progress
        return lambda done, total: progress(name, done, total)

    def _gated(self, name: str) -> bool:
        """Whether a gate waits for a figure: then it must not be left out with a note."""
        return name in {gate.lower() for gate in (*self.chosen.fail_above, *self.chosen.fail_below)}

    def _by_who(self) -> dict[schema.Who, JudgedModel]:
        return {item.who: item for item in self.loaded}

    def notes(self, found: schema.Evaluation) -> list[str]:
        """What a reader must know of the models before any figure.

        Raises:
            UsageError: a window is longer than a model has positions for, or a token is outside its vocabulary.
        """
        notes = [cache_note(row, found.facts()[row.who].model_type) for row in found.kv_cache]
        if self.texts:
            window = self.chosen.window
            for item in self.loaded:
                require_known(max(int(text.tokens.max()) for text in self.texts), vocabulary(item.model), "--data")
            # The last token of a window is only predicted, but for what begins with a prefix.
            read = window if "rolling" in self.chosen.conventions else window - 1
            notes += [check_positions(item.model, read, item.name, f"--window {window}") for item in self.loaded]
        return list(dict.fromkeys(note for note in notes if note))

    def quality(self, found: schema.Evaluation) -> None:
        """Perplexity and divergence on every text."""
        for text in self.texts:
            losses: dict[tuple[str, schema.Who], perplexity.WindowLosses] = {}
            if "baseline" in self._by_who():
                losses = self._compare(found, text)
            for convention in self.chosen.conventions:
                for item in self.loaded:
                    if (convention, item.who) not in losses:
                        losses[convention, item.who] = self._losses(item, text, convention)
            for convention in self.chosen.conventions:
                for item in self.loaded:
                    beside = None if item.who == "baseline" else losses.get((convention, "baseline"))
                    found.perplexity.append(
                        perplexity.described(
                            losses[convention, item.who], item.who, text.name, beside,
                            text.bytes / len(text.tokens) if text.bytes else None,
                            self.chosen.resamples, self.chosen.seed,
                        )
                    )  # fmt: skip

    def _compare(
        self, found: schema.Evaluation, text: TokenisedText
    ) -> dict[tuple[str, schema.Who], perplexity.WindowLosses]:
        """Divergences of the text; the losses that came with them spare the disjoint windows a second pass."""
        others = {item.who: item for item in self.loaded if item.who != "baseline"}
        compared = divergence.compare(
            self._by_who()["baseline"].model,
            {who: item.model for who, item in others.items()},
            text.tokens,
            self.chosen.window,
            start=text.start,
            batch_tokens=self.chosen.batch_tokens,
            names={item.who: item.name for item in self.loaded},
            progress=self._stage("divergence"),
        )
        losses: dict[tuple[str, schema.Who], perplexity.WindowLosses] = {}
        for who in others:
            result = compared[who]
            found.divergence.append(
                divergence.described(result, who, text.name, self.chosen.resamples, self.chosen.seed)
            )
            losses["disjoint", who] = result.losses
            losses["disjoint", "baseline"] = result.baseline_losses
        return losses

    def _losses(self, item: JudgedModel, text: TokenisedText, convention: str) -> perplexity.WindowLosses:
        return perplexity.window_losses(
            item.model,
            text.tokens,
            convention,
            self.chosen.window,
            self.chosen.stride,
            start=text.start,
            prefix=perplexity.prefix_token(item.tokenizer),
            batch_tokens=self.chosen.batch_tokens,
            name=item.name,
            progress=self._stage(f"{convention}, {item.who}"),
        )

    def damage(self, found: schema.Evaluation) -> None:
        """Each layer alone in the baseline, on a sample of the first text."""
        models = self._by_who()
        sample = self.texts[0].tokens[: max(self.chosen.damage_tokens, self.chosen.window)]
        try:
            options: dict[str, Any] = {
                "start": self.texts[0].start,
                "batch_tokens": self.chosen.batch_tokens,
                "name": models["model"].name,
                "progress": self._stage("damage"),
            }
            both = models["baseline"].model, models["model"].model
            if self.chosen.patches and models["model"].name == models["baseline"].name:
                patches = models["model"].patches
                found.damage = patch_damage(*both, patches, sample, self.chosen.window, **options)
            else:
                found.damage = layer_damage(*both, sample, self.chosen.window, **options)
        except UnsupportedError as error:
            if self._gated("damage"):
                raise
            found.notes.append(f"damage left out: {error}")
        else:
            if not found.damage:
                found.notes.append("damage left out: no layer differs from the baseline's")

    def needle(self, found: schema.Evaluation) -> None:
        """Retrieval at every length and depth, in passages of the first text."""
        cells, notes = needle_cells(
            {item.who: item.model for item in self.loaded},
            self.texts[0].tokens,
            self.loaded[0].tokenizer,
            self.chosen.needle,
            self.chosen.needle_depths,
            self.chosen.needle_trials,
            self.chosen.seed,
            progress=self._stage("needle"),
        )
        if not cells and self._gated("needle"):
            raise UnsupportedError(f"{notes[0]}; give smaller lengths or drop the gate")
        found.needle, found.notes = cells, [*found.notes, *notes]

    def recall(self, found: schema.Evaluation) -> None:
        """Copying and key-value recall at every distance, in passages of the first text."""
        rows, notes = recall_rows(
            {item.who: item.model for item in self.loaded},
            self.texts[0].tokens,
            self.loaded[0].tokenizer,
            self.chosen.recall,
            self.chosen.recall_trials,
            self.chosen.seed,
            progress=self._stage("recall"),
        )
        if not rows and (self._gated("copy") or self._gated("pairs")):
            raise UnsupportedError(f"{notes[0]}; give smaller distances or drop the gate")
        found.recall, found.notes = rows, [*found.notes, *notes]

    def tasks(self, found: schema.Evaluation, manager: Any) -> None:
        """The harness's tasks for each model."""
        from rehead.recipes.evaluation.tasks import task_scores

        for item in self.loaded:
            found.tasks += task_scores(
                item,
                self.chosen.tasks,
                manager,
                shots=self.chosen.shots,
                limit=self.chosen.task_limit,
                seed=self.chosen.seed,
                progress=self._stage(f"tasks, {item.who}"),
            )

    def speed(self, found: schema.Evaluation) -> None:
        """Prefill and decoding at every size."""
        caches = {item.who: measure_cache(item.model) for item in self.loaded}
        rows, notes = speed_rows(
            {item.who: item.model for item in self.loaded},
            {who: cache.bytes_per_token if cache else None for who, cache in caches.items()},
            self.chosen.speed_batch,
            self.chosen.speed_context,
            self.chosen.speed_repeats,
            self.chosen.seed,
            progress=self._stage("speed"),
        )
        found.speed, found.notes = rows, [*found.notes, *notes]
