"""One evaluation from names to a document: loads the models, measures what was asked for, in one readable order."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rehead.checkpoints.manifest import versions
from rehead.console import Progress
from rehead.errors import UsageError
from rehead.models.live import resolve_device
from rehead.options import takes
from rehead.recipes import evaluation_schema as schema
from rehead.recipes.evaluation import gates, perplexity
from rehead.recipes.evaluation.kv_cache import cache_row
from rehead.recipes.evaluation.models import (
    JudgedModel,
    at_revision,
    load_model,
    open_named,
    read_patches,
    require_same_tokenizer,
    tokenizer_of,
)
from rehead.recipes.evaluation.options import EvaluateOptions
from rehead.recipes.evaluation.stages import Stages
from rehead.recipes.evaluation.texts import HELD_OUT, TokenisedText, read_texts
from rehead.version import __version__


@takes(EvaluateOptions)
def evaluate(
    model: str,
    *,
    revision: str | None = None,
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
        revision: of ``model`` on the Hub: branch, tag or commit; those of the others stand behind their ids.
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
    model, baseline, data = requested(chosen, model, revision, baseline, data)
    notes = [] if data else ["perplexity and divergence left out: the model has no tokenizer to read a text with"]
    manager = None
    if chosen.tasks:
        from rehead.recipes.evaluation.tasks import require_harness, task_manager

        require_harness()
        manager = task_manager(chosen.tasks, chosen.tasks_dir)
    device = resolve_device(chosen.device)
    texts = read_texts(data, baseline or model, chosen)
    loaded = _load({"baseline": baseline, "control": control, "model": model}, chosen, device, progress)
    run = Stages(loaded, texts, chosen, progress)
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
        if chosen.samples:
            run.samples(found)
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


def requested(
    chosen: EvaluateOptions, model: str, revision: str | None, baseline: str | None, data: Sequence[str]
) -> tuple[str, str | None, Sequence[str]]:
    """Model, baseline and texts with what goes without saying; only a tokenizer is loaded.

    Args:
        chosen, model, revision, baseline, data: as :func:`evaluate` takes them.

    Raises:
        UsageError: what is asked for cannot be measured.
    """
    model = at_revision(model, revision)
    if chosen.patches:
        read_patches(chosen.patches)
        baseline = baseline or model
    if not data and tokenizer_of(open_named(baseline or model)) is not None:
        data = (HELD_OUT,)
    _check_request(chosen, model, baseline, data)
    return model, baseline, data


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
