"""Shared by Rehead's modelling files: config and model classes, derived from transformers' own on first use.

A checkpoint contains this file beside the one that imports it. Registering must not import a model, least of all while
transformers' auto classes are themselves being imported, and importing thirty families' configs would take a second. So
a placeholder is registered, which becomes the config class when used; models are registered when a config is created.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import transformers


@dataclass(eq=False)
class DerivedClasses:
    """A config class derived from transformers' and its model classes.

    Attributes:
        module: ``__name__`` of the modelling file's module.
        model_type: the new model type.
        config: name of the config class.
        base: returns transformers' own config class.
        fields: name -> annotation of the config's further fields, which are None by default.
        check: completes a config after it is read; raises ValueError for an invalid one.
        models: name of an auto class -> (name of the model class, function that returns its bases).
        also: called once the models are registered.
    """

    module: str
    model_type: str
    config: str
    base: Callable[[], Any]
    fields: dict[str, Any]
    check: Callable[[Any], object]
    models: dict[str, tuple[str, Callable[[], tuple[type, ...]]]]
    also: Callable[[], None] = lambda: None
    made: dict[str, type] = field(default_factory=dict)

    @cached_property
    def config_class(self) -> Any:
        """The config class, made on first use."""
        base = self.base()

        def __post_init__(config: Any, **kwargs: Any) -> None:  # noqa: N807
            base.__post_init__(config, **kwargs)
            self.check(config)
            self.register_models()

        namespace = {
            "__module__": self.module,
            "__doc__": f"{base.__name__} and {', '.join(f'``{name}``' for name in self.fields)}.",
            "__annotations__": dict(self.fields),
            "__post_init__": __post_init__,
            "model_type": self.model_type,
            **dict.fromkeys(self.fields),
            "_auto_class": "AutoConfig",
        }
        return type(self.config, (base,), namespace)

    def model_class(self, auto: str) -> type:
        """The model class for an auto class, made on first use."""
        name, bases = self.models[auto]
        if name not in self.made:
            namespace = {
                "__module__": self.module,
                "__doc__": f"{bases()[-1].__name__} as :class:`{self.config}` has it.",
                "__annotations__": {"config": self.config_class},
                "config_class": self.config_class,
                "_auto_class": auto,
            }
            self.made[name] = type(name, bases(), namespace)
        return self.made[name]

    def register_models(self) -> None:
        """Register the config's model classes with the auto classes."""
        for auto in self.models:
            auto_class = getattr(transformers, auto)
            if self.config_class not in auto_class._model_mapping:
                auto_class.register(self.config_class, self.model_class(auto))
        self.also()

    def register(self) -> None:
        """Register the config with ``AutoConfig``."""
        stand_in = _Pending(self.config, (), {"__module__": self.module, "_derived": self})
        transformers.AutoConfig.register(self.model_type, stand_in, exist_ok=True)


def named(derived: Iterable[DerivedClasses], name: str) -> Any:
    """The config or model class of this name, made on first use (for a module's ``__getattr__``, PEP 562).

    Raises:
        AttributeError: there is no such class.
    """
    for each in derived:
        if name == each.config:
            return each.config_class
        for auto, (model, _) in each.models.items():
            if name == model:
                return each.model_class(auto)
    raise AttributeError(f"there is no class {name!r} here")


class _Pending(type):
    """Type of the placeholder for a config class until it is used."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(cls._made(), name)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls._made()(*args, **kwargs)

    def _made(cls) -> Any:
        derived: DerivedClasses = cls.__dict__["_derived"]
        transformers.AutoConfig.register(derived.model_type, derived.config_class, exist_ok=True)
        return derived.config_class
