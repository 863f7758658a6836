"""What a checkpoint can hold: which choices one class has a place for, and which engines serve it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rehead.convert.budget.library import Choice, Library, Option, option_name
from rehead.convert.budget.search import Predictor, uniform
from rehead.convert.options import ConvertOptions
from rehead.convert.planning import make_plan
from rehead.errors import UnsupportedError, UsageError
from rehead.models.model import Model
from rehead.models.serving import ENGINE_NAMES, SAME, deciding_runs
from rehead.variants.window.classes import FILE

#: Steps of the layer-wise fit where nobody says; none where the refit alone leaves nothing to win.
_FIT = 250
#: Tokens in the calibration sequences of latents beside other layers, as of latents in all layers.
_LENGTHS = (512, 2048)


@dataclass(frozen=True)
class Holder:
    """One way to store choices.

    Attributes:
        name: the option that its layers take, or the class that gives each layer a form of its own.
        options: what each layer may take in it.
        everywhere: every layer must take the same option.
    """

    name: str
    options: Library
    everywhere: bool = False

    def predicted(self, predictor: Predictor, budget: int) -> dict[int, Option] | None:
        """The choice within ``budget`` bytes that loses least as predicted; None where there is none."""
        if self.everywhere:
            choice = uniform(self.options, self.name)
            return choice if self.options.total(choice) <= budget else None
        if self.options.least > budget:
            return None
        predictor = predictor.among(self.options)
        return predictor.improved(predictor.forward(budget), budget)

    def convert_options(self, choice: Choice, given: dict[str, Any]) -> dict[str, Any]:
        """Options of a conversion that gives layers their chosen form.

        Args:
            choice: of this holder's options.
            given: what the user said besides, which goes first.
        """
        layers: dict[str, list[int]] = {}
        taken: dict[str, Option] = {}
        for layer, option in sorted(choice.items()):
            layers.setdefault(option.name, []).append(layer)
            taken[option.name] = option
        latents = any(option.kind == "latent" for option in taken.values())
        recovery: dict[str, Any] = {"refit": True, "fit": 0 if all(map(_keeps_tokens, taken.values())) else _FIT}
        if latents and not self.everywhere:
            recovery["calibration_length"] = _LENGTHS
        if not (latents and self.everywhere):  # no other form differs by engine
            given = {key: value for key, value in given.items() if key != "engine"}
        told = []
        for name, option in taken.items():
            assert option.variant is not None
            assert option.options is not None
            wanted = option.options if self.everywhere else option.options.but(layers=tuple(layers[name]))
            told.append(option_name(option.variant, wanted))
        return {**recovery, **given, "variants": (*given.get("variants", ()), *told)}


def holders(model: Model, options: Library, engine: str | None) -> tuple[list[Holder], dict[str, str]]:
    """The ways to store choices for an engine.

    Args:
        engine: as ``--for`` names it; None for any.

    Returns:
        (the ways, name of each other option -> why it is none).
    """
    ways, refused = [], dict(options.blocked)
    for name in [name for name in options.names if name]:
        kept = _some(options, lambda option, name=name: option.name == name)  # type: ignore[misc]
        option = next(iter(kept.layers.values()))[-1]
        way = Holder(name, kept, everywhere=option.variant is None or option.variant.attend is None)
        if (reason := _refusal(model, way, engine)) is None:
            ways.append(way)
        else:
            refused[name] = reason
    mixed = Holder(FILE, _some(options, _in_file))
    if len(mixed.options.names) > 2 and _refusal(model, mixed, engine) is None:
        ways.append(mixed)
    return ways, refused


def none_served(engine: str | None, refused: dict[str, str]) -> UnsupportedError:
    """The error for an engine, or a class, that holds none of the options."""
    reasons = "; ".join(f"{name}: {why}" for name, why in list(refused.items())[:3])
    if engine is None:
        return UnsupportedError(f"--kv-cache: no class holds a form with a smaller cache ({reasons})")
    return UnsupportedError(f"--for {engine}: nothing that saves cache is served ({reasons}); leave --for out")


def _some(options: Library, wanted: Callable[[Option], bool]) -> Library:
    """A library's layers as they are and in the options that are wanted."""
    layers = {layer: [o for o in each if not o.name or wanted(o)] for layer, each in options.layers.items()}
    return Library(layers, options.context, {})


def _keeps_tokens(option: Option) -> bool:
    """Whether an option is a window beside which the first tokens stay."""
    return option.layout.window is not None and option.layout.sinks > 0


def _in_file(option: Option) -> bool:
    """Whether the class with Rehead's modelling file has a layer in an option beside layers in others."""
    return option.kind in ("latent", "uneven") or (option.kind == "window" and _keeps_tokens(option))


def _refusal(model: Model, way: Holder, engine: str | None) -> str | None:
    """Why a way to store choices is none; None where it is one.

    It is tried on a choice with each of its options: in every layer, or in turn in all layers but the first.
    """
    layers, names = list(way.options.layers), [name for name in way.options.names if name]
    choice: dict[int, Option] = {}
    for at, layer in enumerate(layers if way.everywhere else layers[1:]):
        choice[layer] = way.options.option(layer, names[at % len(names)])
    if not choice:
        return "one layer alone changes with it"
    try:
        plan = make_plan(model, ConvertOptions.parse(way.convert_options(choice, {"fit": 0, "engine": engine})))
    except (UsageError, UnsupportedError) as error:
        return str(error)
    wanted = ENGINE_NAMES.get(engine or "", "")
    run = deciding_runs(plan.raw_config).get(wanted)
    if not wanted or (run is not None and run.outcome == SAME):  # any class loads in transformers
        return None
    seen = "has not been run on" if run is None else "does not serve"
    return f"{wanted} {seen} {plan.raw_config['model_type']} of this kind"
