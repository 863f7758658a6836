"""What a checkpoint can hold: which choices one class has a place for, and which engines serve it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rehead.convert.budget.library import Choice, Library, option_name
from rehead.convert.budget.search import uniform
from rehead.convert.options import ConvertOptions
from rehead.convert.planning import make_plan
from rehead.errors import UnsupportedError, UsageError
from rehead.models.model import Model
from rehead.models.serving import ENGINE_NAMES, SAME, facts_of, served_by

#: Steps of the layer-wise fit where nobody says; none where the refit alone leaves nothing to win.
_FIT = 250


@dataclass(frozen=True)
class Holder:
    """One way to store choices.

    Attributes:
        name: the option that its layers take.
        options: what each layer may take in it.
        everywhere: every layer must take the option.
    """

    name: str
    options: Library
    everywhere: bool

    def convert_options(self, choice: Choice, given: dict[str, Any]) -> dict[str, Any]:
        """Options of a conversion that gives layers their chosen form.

        Args:
            choice: of this holder's options.
            given: what the user said besides, which goes first.
        """
        option = next(iter(choice.values()))
        assert option.variant is not None
        assert option.options is not None
        wanted = option.options if self.everywhere else option.options.but(layers=tuple(sorted(choice)))
        tokens_kept = option.layout.window is not None and option.layout.sinks > 0
        recovery = {"refit": True, "fit": 0 if tokens_kept else _FIT}
        if option.kind != "latent":  # no other form differs by engine
            given = {key: value for key, value in given.items() if key != "engine"}
        return {**recovery, **given, "variants": (*given.get("variants", ()), option_name(option.variant, wanted))}


def holders(model: Model, options: Library, engine: str | None) -> tuple[list[Holder], dict[str, str]]:
    """The ways to store choices for an engine.

    Args:
        engine: as ``--for`` names it; None for any.

    Returns:
        (the ways, name of each other option -> why it is none).
    """
    ways, refused = [], dict(options.blocked)
    for name in [name for name in options.names if name]:
        kept = Library(
            {layer: [option for option in each if option.name in ("", name)] for layer, each in options.layers.items()},
            options.context,
            {},
        )
        option = next(iter(kept.layers.values()))[-1]
        holder = Holder(name, kept, everywhere=option.variant is None or option.variant.attend is None)
        layers = list(kept.layers)
        choice = uniform(kept, name) if holder.everywhere else {layer: kept.option(layer, name) for layer in layers[1:]}
        if not choice:
            continue
        try:
            plan = make_plan(model, ConvertOptions.parse(holder.convert_options(choice, {"fit": 0, "engine": engine})))
        except (UsageError, UnsupportedError) as error:
            refused[name] = str(error)
            continue
        if (reason := _refusal(plan.raw_config, engine)) is not None:
            refused[name] = reason
        else:
            ways.append(holder)
    return ways, refused


def _refusal(config: dict[str, Any], engine: str | None) -> str | None:
    """Why an engine serves no model of this config; None where it does."""
    wanted = ENGINE_NAMES.get(engine or "")
    if wanted is None:  # any class loads in transformers
        return None
    runs = [run for run in served_by(str(config["model_type"]), facts_of(config)) if run.engine == wanted]
    if not runs:
        return f"{wanted} has not been run on {config['model_type']} of this kind"
    if not any(run.outcome == SAME for run in runs):
        return f"{wanted} does not serve {config['model_type']} of this kind ({runs[0].outcome})"
    return None
