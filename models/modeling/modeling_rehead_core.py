"""What every modelling file of Rehead's is made with: classes that derive from transformers' own when first asked for.

It travels beside a checkpoint with the file that imports it. Registering must import no model, least of all while
transformers' auto classes are themselves being imported, and every config of thirty families would take a second. So a
stand-in is registered, which becomes the config class when it is used; the models follow when a config is made.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import transformers


@dataclass(eq=False)
class Derived:
    """A config class of ours and the model classes that go with it.

    Attributes:
        module: the name of the modelling file's module, ``__name__``.
        model_type: ours.
        config: name of the config class.
        base: gives transformers' own config class.
        fields: name -> annotation of what our config has besides; None by default.
        check: completes a config that was read; raises ValueError for an invalid one.
        models: name of an auto class -> (name of the model class, gives its bases).
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
        """The config class."""
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
        """The model class of an auto class."""
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
        """Tell the auto classes which models go with the config."""
        for auto in self.models:
            auto_class = getattr(transformers, auto)
            if self.config_class not in auto_class._model_mapping:
                auto_class.register(self.config_class, self.model_class(auto))
        self.also()

    def register(self) -> None:
        """Make the config known to ``AutoConfig``."""
        stand_in = _StandIn(self.config, (), {"__module__": self.module, "_derived": self})
        transformers.AutoConfig.register(self.model_type, stand_in, exist_ok=True)


def named(derived: Iterable[Derived], name: str) -> Any:
    """The class of that name among some, made when it is first used (for a module's ``__getattr__``, PEP 562).

    Raises:
        AttributeError: there is none.
    """
    for each in derived:
        if name == each.config:
            return each.config_class
        for auto, (model, _) in each.models.items():
            if name == model:
                return each.model_class(auto)
    raise AttributeError(f"there is no class {name!r} here")


class _StandIn(type):
    """Type of what stands for a config class until it is used."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(cls._made(), name)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls._made()(*args, **kwargs)

    def _made(cls) -> Any:
        derived: Derived = cls.__dict__["_derived"]
        transformers.AutoConfig.register(derived.model_type, derived.config_class, exist_ok=True)
        return derived.config_class
