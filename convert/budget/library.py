"""The forms that each layer may take, and what each costs at a length of text.

The variants themselves say which options are worth offering (:attr:`Variant.library`) and what a layer caches under
them (:attr:`Variant.layout`), so a new variant joins every budget without a word here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from rehead.convert.variants import by_weights
from rehead.errors import UnsupportedError, UsageError
from rehead.models.layout import LayerLayout
from rehead.models.model import Model
from rehead.models.rewrite import LayerForm
from rehead.variants.contract import VARIANTS, Variant, VariantOptions


@dataclass(frozen=True)
class Option:
    """One form of one layer.

    Attributes:
        name: as ``--variant`` would write it, e.g. ``latent:rank=96,rope_dims=32``; empty for the layer as it is.
        layout: what the layer caches in this form.
        variant, options: the form; None for the layer as it is.
    """

    name: str
    layout: LayerLayout
    variant: Variant | None = field(default=None, compare=False)
    options: VariantOptions | None = field(default=None, compare=False)

    @property
    def kind(self) -> str:
        """The variant's name; empty for the layer as it is."""
        return self.name.partition(":")[0]


Choice = Mapping[int, Option]
"""The form of each layer, by its index; layers that are left out stay as they are."""


@dataclass(frozen=True)
class Library:
    """Every layer's options.

    Attributes:
        layers: index of each layer with attention -> its options, cheapest last; the first is the layer as it is.
        context: tokens at which caches are compared.
        blocked: name of each option that this model cannot have -> the reason.
    """

    layers: dict[int, list[Option]]
    context: int
    blocked: dict[str, str]

    def bytes_of(self, option: Option) -> int:
        """Bytes that a layer in this form caches."""
        return option.layout.cache_bytes(self.context)

    def total(self, choice: Choice) -> int:
        """Bytes of the whole model's cache."""
        return sum(self.bytes_of(choice.get(layer, options[0])) for layer, options in self.layers.items())

    @property
    def whole(self) -> int:
        """Bytes of the model's cache as it is."""
        return self.total({})

    @property
    def least(self) -> int:
        """Bytes of the smallest cache that the options allow."""
        return sum(min(self.bytes_of(option) for option in options) for options in self.layers.values())

    @property
    def names(self) -> list[str]:
        """Names of all options that every layer has, dearest first."""
        common = set.intersection(*({option.name for option in options} for options in self.layers.values()))
        return [option.name for option in next(iter(self.layers.values())) if option.name in common]

    def option(self, layer: int, name: str) -> Option:
        """A layer's option by its name; raises KeyError where it has none of that name."""
        for option in self.layers[layer]:
            if option.name == name:
                return option
        raise KeyError(f"layer {layer} has no option {name!r}")

    def only(self, kinds: Iterable[str]) -> Library:
        """The same with the options of some variants alone."""
        kept = set(kinds) | {""}
        layers = {layer: [o for o in options if o.kind in kept] for layer, options in self.layers.items()}
        return Library(layers, self.context, self.blocked)

    def without(self, refused: Mapping[tuple[int, str], str]) -> Library:
        """The same without some options of some layers.

        Args:
            refused: (layer, option's name) -> the reason.
        """
        layers = {i: [o for o in options if (i, o.name) not in refused] for i, options in self.layers.items()}
        blocked = dict(self.blocked)
        for name in dict.fromkeys(name for _, name in refused):
            where = [layer for layer, other in refused if other == name]
            blocked[name] = f"layers {','.join(map(str, where))}: {refused[where[0], name]}"
        return Library(layers, self.context, blocked)


def library(model: Model, context: int, longest: int | None = None) -> Library:
    """The options of all of a model's layers.

    Args:
        model: an open checkpoint.
        context: tokens at which caches are compared.
        longest: tokens of the texts on which options will be measured; a window that these hardly reach is not
            offered, since it would look free.

    Raises:
        UsageError: the context is not one.
    """
    if context < 1:
        raise UsageError(f"--context {context}: must be 1 or more tokens")
    layers: dict[int, list[Option]] = {}
    blocked: dict[str, str] = {}
    usable: dict[str, bool] = {}
    for layout in model.layouts:
        options = {"": Option("", layout)}
        for variant in map(VARIANTS.get, VARIANTS.names()):
            for wanted in variant.library(layout, context):
                name = option_name(variant, wanted)
                if longest is not None and variant.reach(wanted) * _texts_of(variant, wanted) > longest:
                    blocked.setdefault(name, f"reaches {variant.reach(wanted)} tokens, too far for texts of {longest}")
                    continue
                if name not in usable:
                    usable[name] = _usable(model, variant, wanted, name, blocked)
                after = variant.layout(layout, wanted)
                if usable[name] and after.cache_bytes(context) < layout.cache_bytes(context):
                    options[name] = Option(name, after, variant, wanted)
        layers[layout.index] = sorted(options.values(), key=lambda option: -option.layout.cache_bytes(context))
    return Library(layers, context, blocked)


def option_name(variant: Variant, options: VariantOptions) -> str:
    """Options as ``--variant`` takes them: ``NAME:key=value,key=value``, without what is as by default."""
    said = [
        f"{key}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
        for key, value in options.model_dump(exclude_defaults=True).items()
    ]
    return f"{variant.name}:{','.join(said)}" if said else variant.name


def form_of(model: Model, variant: Variant, options: VariantOptions) -> LayerForm | None:
    """How a variant changes a layer's weights; None for one that a live model computes in front of its attention.

    Raises:
        UnsupportedError, UsageError: the model cannot have it.
    """
    if variant.attend is not None:
        return None
    if variant.rewrite is not None:
        return variant.rewrite(model, options).form
    return by_weights(model, variant, options).form if variant.weights is not None else None


def _texts_of(variant: Variant, options: VariantOptions) -> int:
    """Times its reach that texts must be long to show what an option does, and to fit what it fits to them."""
    return 4 if variant.calibrate is not None and variant.needs(options) else 2


def _usable(model: Model, variant: Variant, options: VariantOptions, name: str, blocked: dict[str, str]) -> bool:
    if variant.attend is not None:
        return True
    try:
        return form_of(model, variant, options) is not None
    except (UnsupportedError, UsageError) as error:
        blocked[name] = str(error)
        return False
