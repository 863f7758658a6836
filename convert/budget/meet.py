"""One command for a budget: choose every layer's form, convert, recover, measure, and say why."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rehead.checkpoints.resume import check_start
from rehead.console import Progress
from rehead.convert.budget.choose import Selection, check_budget, select, smallest
from rehead.convert.budget.holders import Holder, holders, none_served
from rehead.convert.budget.library import Library
from rehead.convert.budget.mix import Measured, compared
from rehead.convert.budget.options import BudgetOptions, SurveyOptions
from rehead.convert.budget.survey import Survey, budget_of, checked_size, survey
from rehead.convert.execute import Conversion, execute
from rehead.convert.options import ConvertOptions
from rehead.convert.planning import make_plan
from rehead.convert.whole_model import load_result
from rehead.errors import QualityError, UsageError
from rehead.models.distance import judged
from rehead.models.live import resolve_device
from rehead.models.model import Model, open_model
from rehead.options import flag_of, takes
from rehead.variants.window.classes import FILE

#: Ways to store choices that are tried, of those that choose layer by layer and of those that do not.
_TRIED = {False: 1, True: 2}
#: Options of a conversion that name one form for layers.
_OF_ONE_FORM = (
    "num_key_value_heads", "method", "grouping", "host", "reinvest", "block", "layers", "kl_budget", "plain", "latent",
    "rope_dims", "window", "sinks", "sink_logit",
)  # fmt: skip


@dataclass
class Met:
    """What :func:`meet` did.

    Attributes:
        conversion: what was written.
        selection: the form of each layer, and why.
        measured: of the result, recovered; beside ``selection.measured`` of the closed form.
        share: of the cache that is left at the context.
        facts: context, texts, what could not be chosen.
    """

    conversion: Conversion
    selection: Selection
    measured: Measured
    share: float
    facts: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return {**self.conversion.as_json(), "budget": {**self.facts, "measured": asdict(self.measured)}}


@takes(BudgetOptions)
@takes(ConvertOptions)
def meet(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    kv_cache: str | None = None,
    *,
    device: str = "auto",
    revision: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    push_to_hub: str | None = None,
    progress: Progress | None = None,
    command: str | None = None,
    **options: Any,
) -> Met:
    """Convert a checkpoint so that its cache meets a budget at the least loss.

    Args:
        model: a local folder or a Hub id.
        out: the folder to write.
        kv_cache: share of the cache such as ``"33%"``, or numbers per token and layer; None with ``kl``.
        device: where everything runs.
        revision: Hub revision of ``model``.
        resume: continue from what a killed run left.
        overwrite: replace an existing checkpoint at ``out``.
        push_to_hub: upload the result to this repository.
        progress: called with (stage, done, total).
        command: recorded in the manifest and the model card.

    Raises:
        UsageError: an invalid argument, or a budget that no choice meets.
        UnsupportedError: a model or engine for which nothing can be chosen.
        QualityError: both limits were given, and the result keeps to the cache's alone; it is written all the same.
    """
    own = BudgetOptions.model_fields
    asked = BudgetOptions.parse({key: value for key, value in options.items() if key in own})
    given = {key: value for key, value in options.items() if key not in own and value is not None}
    if said := [name for name in given if name in _OF_ONE_FORM]:
        flag = flag_of(ConvertOptions, said[0])
        raise UsageError(f"{flag}: says which form layers take, which a budget chooses; leave one of them out")
    if kv_cache is None and asked.kl is None:
        raise UsageError("a budget needs a limit; give --kv-cache 33%, or --kl 0.05 for the smallest cache within it")
    where, started = resolve_device(device), time.monotonic()
    opened = open_model(model, revision)
    with opened.source:
        if kv_cache is not None:
            checked_size(kv_cache, opened.layouts[0])
        folder = getattr(opened.source, "folder", None)
        asks = {"asked": [kv_cache, asked.as_json(), given]}
        check_start(out, folder, {"source": opened.source.fingerprint(), **asks}, resume, overwrite)
        wanted = _survey_options(asked, given)
        with survey(opened, wanted, where, progress) as prepared:
            holder, selection, refused = choose(prepared, opened, kv_cache, asked.kl, given.get("engine"), progress)
            facts = _facts(prepared.options, selection, prepared.facts, refused)
            texts, reference = prepared.meter.samples, prepared.meter.reference
        del prepared  # and the whole model with it, before the conversion and its result need memory
        made = holder.convert_options(selection.choice, given)
        plan = make_plan(opened, ConvertOptions.parse(made))
        conversion = execute(plan, out, device, resume, overwrite, progress, command, {"budget": facts}, asks=asks)
    conversion.seconds = time.monotonic() - started
    measured = compared(load_result(out, where, "measure it"), texts, reference)
    if push_to_hub:
        from rehead.checkpoints.push import push_folder

        push_folder(conversion.out, push_to_hub)
    met = Met(conversion, selection, measured, facts["share"], facts)
    if kv_cache is not None and asked.kl is not None and measured.kl > asked.kl:
        raise QualityError(
            f"{out}: a cache of {facts['share']:.1%} loses {measured.kl:.3g} nats per token, more than --kl "
            f"{asked.kl:g}; give --kl alone for the smallest cache within it"
        )
    return met


def choose(
    prepared: Survey,
    model: Model,
    kv_cache: str | None,
    kl: float | None,
    engine: str | None,
    progress: Progress | None = None,
) -> tuple[Holder, Selection, dict[str, str]]:
    """The best choice that one class can hold.

    Returns:
        (the way to store it, the choice, options that could not be chosen and why).

    Raises:
        UsageError: no choice meets the budget.
        UnsupportedError: the engine serves none of the choices.
    """
    options = prepared.options
    ways, refused = holders(model, options, engine)
    if not ways:
        raise none_served(engine, refused)
    least = min(ways, key=lambda way: way.options.least)
    budget = 0 if kv_cache is None else budget_of(kv_cache, options)
    if kv_cache is not None:
        check_budget(least.options, budget)
    results: list[tuple[Holder, Selection]] = []
    failed: UsageError | None = None
    for way in _promising(ways, prepared, budget or options.whole // 2):
        try:
            selection = _of_way(way, prepared, budget, None if kv_cache is not None else kl, progress)
        except UsageError as error:  # this way does not meet the limit; another does
            failed = error
            continue
        if selection is not None:
            results.append((way, selection))
    if not results:
        raise failed or UsageError(f"--kv-cache {kv_cache}: no choice that one class can hold meets it; give more")
    if kv_cache is None:  # what loses little enough is judged by its size
        best = min(results, key=lambda pair: (pair[1].total, pair[1].measured.loss))
    else:
        best = min(results, key=lambda pair: pair[1].measured.loss)
    return *best, refused


def _promising(ways: Sequence[Holder], prepared: Survey, budget: int) -> list[Holder]:
    """The ways that may be best: of those that choose layer by layer and of those that do not, the ones that are
    predicted to lose least within ``budget`` bytes, and that which gives every layer a form of its own."""
    losses = {}
    for way in ways:
        choice = way.predicted(prepared.predictor, budget)
        losses[way.name] = float("inf") if choice is None else prepared.predictor.loss(choice)
    kept = [way for way in ways if way.name == FILE]
    for everywhere, most in _TRIED.items():
        others = [way for way in ways if way.everywhere == everywhere and way not in kept]
        kept += sorted(others, key=lambda way: losses[way.name])[:most]
    return kept


def _of_way(
    way: Holder, prepared: Survey, budget: int, kl: float | None, progress: Progress | None
) -> Selection | None:
    """The best choice of one holder; None where it has none within the limit."""
    options, predictor, meter = way.options, prepared.predictor.among(way.options), prepared.meter
    if not way.everywhere:
        if kl is not None:
            return smallest(options, predictor, meter, kl, progress)
        return select(options, predictor, meter, budget, progress) if budget >= options.least else None
    choice = {layer: options.option(layer, way.name) for layer in options.layers}
    total = options.total(choice)
    if kl is None and total > budget:
        return None
    measured = meter.measure(choice)
    if kl is not None and measured.kl > kl:
        return None
    return Selection(choice, total, predictor.loss(choice), measured, f"{way.name} in all layers")


def _survey_options(asked: BudgetOptions, given: dict[str, Any]) -> SurveyOptions:
    shared = {key: given[key] for key in ("calibration", "calibration_tokens", "seed") if key in given}
    return SurveyOptions.parse({**shared, "context": asked.context, "tokens": asked.tokens})


def _facts(options: Library, selection: Selection, run: dict[str, Any], refused: dict[str, str]) -> dict[str, Any]:
    """What the manifest says of a choice."""
    return {
        **run,
        "share": round(selection.total / options.whole, 4),
        "bytes": {"before": options.whole, "after": selection.total},
        "layers": {str(layer): option.name for layer, option in selection.choice.items()},
        "predicted": round(selection.predicted, 6),
        "closed_form": asdict(selection.measured),
        "origin": selection.origin,
        "path": [[layer, name, total, round(loss, 6)] for layer, name, total, loss in selection.path],
        "rivals": {rival.name: round(rival.measured.loss, 6) for rival in selection.rivals},
        "not_offered": refused,
    }


def verdict(measured: Measured) -> str:
    """What the result is good for, in a sentence."""
    copied = "" if measured.recalled is None else f", copies {measured.recalled:.0%} of what the original copies"
    return f"{judged(measured.kl)}: KL {measured.kl:.3f} nats per token{copied}"
