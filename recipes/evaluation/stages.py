"""What an evaluation measures, a method for each section of its document."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rehead.console import Progress
from rehead.data.tokens import require_known
from rehead.errors import UnsupportedError
from rehead.models.positions import check_positions, position_limit
from rehead.models.predictions import vocabulary
from rehead.recipes import evaluation_schema as schema
from rehead.recipes.evaluation import divergence, perplexity
from rehead.recipes.evaluation.damage import layer_damage, patch_damage
from rehead.recipes.evaluation.kv_cache import cache_note, measure_cache
from rehead.recipes.evaluation.models import JudgedModel, wider_than_read
from rehead.recipes.evaluation.needle import needle_cells
from rehead.recipes.evaluation.options import EvaluateOptions
from rehead.recipes.evaluation.recalling import recall_rows
from rehead.recipes.evaluation.samples import samples
from rehead.recipes.evaluation.speed import speed_rows
from rehead.recipes.evaluation.texts import TokenisedText


@dataclass
class Stages:
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

    @property
    def _models(self) -> dict[schema.Who, Any]:
        return {item.who: item.model for item in self.loaded}

    @property
    def _beyond(self) -> bool:
        """Whether a patch is for texts beyond the trained length; every model is then tried on them."""
        return any(part.variant.longer for item in self.loaded for patch in item.patches for part in patch.parts)

    def notes(self, found: schema.Evaluation) -> list[str]:
        """What a reader must know of the models before any figure.

        Raises:
            UsageError: a window is longer than a model has positions for, or a token is outside its vocabulary.
        """
        notes = [cache_note(row, found.facts()[row.who].model_type) for row in found.kv_cache]
        notes += [wider_than_read(item, self.chosen) for item in self.loaded if self.texts]
        if self.texts:
            window = self.chosen.window
            for item in self.loaded:
                require_known(max(int(text.tokens.max()) for text in self.texts), vocabulary(item.model), "--data")
            # The last token of a window is only predicted, but for what begins with a prefix.
            read = window if "rolling" in self.chosen.conventions else window - 1
            notes += [check_positions(item.model, read, item.name, f"--window {window}") for item in self.loaded]
            if "baseline" in self._models and (compared := self._compared_window()) < window:
                notes.append(
                    f"KL and the most likely token: on windows of {compared:,} tokens, all that the original reads; "
                    f"perplexity on {window:,}"
                )
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
        """Divergences of the text; losses that came with them spare disjoint windows of that length a second pass."""
        others = {item.who: item for item in self.loaded if item.who != "baseline"}
        window = self._compared_window()
        compared = divergence.compare(
            self._by_who()["baseline"].model,
            {who: item.model for who, item in others.items()},
            text.tokens,
            window,
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
            if window == self.chosen.window:
                losses["disjoint", who] = result.losses
                losses["disjoint", "baseline"] = result.baseline_losses
        return losses

    def _compared_window(self) -> int:
        """Tokens in a window of the divergence: a model that reads more should differ beyond the baseline's length."""
        limit = position_limit(self._by_who()["baseline"].model)
        if limit is None or limit >= self.chosen.window:
            return self.chosen.window
        longer = any((position_limit(item.model) or 0) > limit for item in self.loaded if not item.patches)
        return limit if longer else self.chosen.window

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

    def samples(self, found: schema.Evaluation) -> None:
        """Pieces of the first text, continued by every model."""
        text, tokenizer = self.texts[0], self.loaded[0].tokenizer
        if tokenizer is None:
            return
        found.samples = samples(
            self._models,
            text.tokens,
            tokenizer,
            self.chosen.samples,
            self.chosen.sample_tokens,
            text.name,
            start=text.start,
            progress=self._stage("samples"),
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
            self._models,
            self.texts[0].tokens,
            self.loaded[0].tokenizer,
            self.chosen.needle,
            self.chosen.needle_depths,
            self.chosen.needle_trials,
            self.chosen.seed,
            beyond=self._beyond,
            progress=self._stage("needle"),
        )
        if not cells and self._gated("needle"):
            raise UnsupportedError(f"{notes[0]}; give smaller lengths or drop the gate")
        found.needle, found.notes = cells, [*found.notes, *notes]

    def recall(self, found: schema.Evaluation) -> None:
        """Copying and key-value recall at every distance, in passages of the first text."""
        rows, notes = recall_rows(
            self._models,
            self.texts[0].tokens,
            self.loaded[0].tokenizer,
            self.chosen.recall,
            self.chosen.recall_trials,
            self.chosen.seed,
            beyond=self._beyond,
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
            self._models,
            {who: cache.bytes_per_token if cache else None for who, cache in caches.items()},
            self.chosen.speed_batch,
            self.chosen.speed_context,
            self.chosen.speed_repeats,
            self.chosen.seed,
            progress=self._stage("speed"),
        )
        found.speed, found.notes = rows, [*found.notes, *notes]
