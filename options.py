"""Options stated once: one class of fields gives keyword arguments, flags, a YAML section and the manifest's JSON.

A field's description is its help, its bounds are its checks, and a user's mistake becomes an error of one line::

    class WindowOptions(Options):
        size: Length = Field(4096, ge=1, description="Keys that a query sees.")
        layers: Annotated[str, Flag(metavar="LIST")] = Field("all", description="Which layers, e.g. 0,4-7.")

    WindowOptions.parse({"size": "4k"})                              # keyword arguments or YAML
    WindowOptions.from_text("size=4k,layers=0,4-7", "window")        # the tail of NAME:key=value,...
    @flags(WindowOptions)                                            # click, see flags.py
"""

from __future__ import annotations

import inspect
import math
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.fields import FieldInfo

from rehead.errors import UsageError, suggestion, unknown_name
from rehead.typehints import alternatives, choices, is_tuple, leaves

F = TypeVar("F", bound=Callable[..., Any])


def _one_or_more(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _split(value: Any) -> Any:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return [value]
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, (list, tuple)):
        return value
    parts = [part.strip().split(",") if isinstance(part, str) else [part] for part in values]
    return [part.strip() if isinstance(part, str) else part for group in parts for part in group if part != ""]


def _items(value: Any) -> Iterable[Any]:
    """What a field's value holds."""
    return value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else (value,)


def pairs(form: str, example: str, keep: Callable[[float, float], float] | None = None) -> BeforeValidator:
    """A pydantic validator that reads ``["k_proj=2"]`` as ``{"k_proj": 2.0}``.

    Args:
        form: what a pair is called, e.g. ``"PATTERN=FACTOR"``.
        example: one, for messages.
        keep: combines two numbers for the same name, e.g. ``min``; None keeps the last.
    """

    def read(value: Any) -> Any:
        if not isinstance(value, (list, tuple)):
            return value
        table: dict[str, float] = {}
        for item in value:
            name, _, text = (part.strip() for part in str(item).rpartition("="))
            try:
                number = float(text)
            except ValueError:
                number = math.nan
            if not name or not math.isfinite(number):
                raise ValueError(f"{item!r} is not {form}; write {example}")
            table[name] = keep(table[name], number) if keep and name in table else number
        return table

    return BeforeValidator(read)


Names = Annotated[tuple[str, ...], BeforeValidator(_one_or_more)]
"""One or more texts; commas do not split them."""
SPLIT = BeforeValidator(_split)
"""For ``Annotated[tuple[T, ...], SPLIT]``: accepts several values, one text with commas, or a single value."""


@dataclass(frozen=True)
class Flag:
    """How the command line shows a field, where its own name and type are not enough.

    Attributes:
        name: the flag, e.g. ``"--lr"``; the field's name is accepted as well.
        metavar: the placeholder for the value in the help.
        default: the default's text in the help.
    """

    name: str | None = None
    metavar: str | None = None
    default: str | None = None


class Options(BaseModel):
    """Base class of all options: frozen, no unknown field, no infinity or NaN.

    Use :meth:`parse` for anything a user wrote: it raises :class:`UsageError`, the constructor pydantic's own errors.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false where a number belongs; Python would read ``true`` as 1."""
        kinds = leaves(cls.model_fields[str(info.field_name)].annotation)
        if bool not in kinds and {int, float} & kinds and any(isinstance(item, bool) for item in _items(value)):
            raise ValueError("is true or false, not a number; write a number")
        return value

    @field_validator("*")
    @classmethod
    def _in_64_bits(cls, value: Any) -> Any:
        """Refuse a whole number that no tensor, seed or file's header holds."""
        if any(isinstance(item, int) and abs(item) >= 1 << 63 for item in _items(value)):
            raise ValueError("is more than 64 bits hold; give less")
        return value

    @classmethod
    def parse(cls, values: Any, where: str = "") -> Self:
        """Options from keyword arguments, flags or a YAML section.

        Args:
            values: a mapping; texts are converted.
            where: the file and section, for messages; without it fields are named as flags.

        Raises:
            UsageError: an unknown field (the nearest is suggested), a missing one, or an invalid value: one line.
        """
        if not isinstance(values, Mapping):
            raise UsageError(f"{where}: is {type(values).__name__}, not a mapping; give it keys")
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise UsageError(explained(error, cls, where)) from None
        except UsageError as error:
            raise UsageError(f"{where}: {error}" if where else str(error)) from None

    @classmethod
    def from_text(cls, text: str, where: str) -> Self:
        """Options from a text such as ``"size=4k,layers=0,4-7"``.

        A part without ``=`` continues the value before it, or switches on the bool field that it names; ``none`` is
        None.

        Raises:
            UsageError: as :meth:`parse`.
        """
        values: dict[str, Any] = {}
        last = ""
        for part in filter(None, (part.strip() for part in text.split(","))):
            name, equals, value = (word.strip() for word in part.partition("="))
            if equals:
                last = name.replace("-", "_")
                if last in values:
                    raise UsageError(f"{where}: {last} is given twice; give it once")
                values[last] = value
            elif name in cls.model_fields and cls.model_fields[name].annotation is bool:
                values[name] = True
            elif last:
                values[last] += f",{name}"
            else:
                raise UsageError(f"{where}: {part!r} is not key=value; {suggestion(part, cls.model_fields)}")
        for name, value in values.items():
            entry = cls.model_fields.get(name)
            kinds = alternatives(entry.annotation) if entry else []
            if value == "none" and type(None) in kinds:
                values[name] = None
            elif isinstance(value, str) and kinds and all(is_tuple(kind) for kind in kinds if kind is not type(None)):
                values[name] = _split(value)
        return cls.parse(values, where)

    def but(self, **changes: Any) -> Self:
        """A copy with some options changed, checked again.

        Raises:
            UsageError: as :meth:`parse`.
        """
        return self.parse({**dict(self), **changes})

    def as_json(self) -> dict[str, Any]:
        """The options as JSON types, for manifests and ``--json``."""
        return self.model_dump(mode="json")

    def as_flags(self) -> list[str]:
        """The options that differ from their defaults, as words of a command line."""
        words: list[str] = []
        for name, entry in type(self).model_fields.items():
            value, flag = getattr(self, name), flag_of(type(self), name)
            if value == entry.get_default(call_default_factory=True):
                continue
            if value is True:
                words.append(flag)
            elif isinstance(value, Mapping):
                words += [word for key, item in value.items() for word in (flag, f"{key}={item}")]
            elif isinstance(value, tuple) and str in leaves(entry.annotation):
                words += [word for item in value for word in (flag, str(item))]
            else:
                words += [flag, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
        return words


O = TypeVar("O", bound=Options)  # noqa: E741


def named_options(text: str, options_of: Callable[[str], type[O]], where: str) -> tuple[str, O]:
    """Split ``"window:size=4k"`` into its name and its options.

    Args:
        text: ``NAME`` or ``NAME:key=value,key=value``.
        options_of: returns the options class for a name; raises UsageError for an unknown name.
        where: the flag, for messages.

    Raises:
        UsageError: an unknown name or field (the nearest is suggested), or an invalid value.
    """
    name, _, settings = text.partition(":")
    return name, options_of(name).from_text(settings, f"{where} {name}")


def flag_of(options: type[Options], name: str) -> str:
    """A field's flag on the command line, e.g. ``--max-tokens``."""
    entry = options.model_fields.get(name)
    spelled = flag_note(entry).name if entry else None
    return spelled or "--" + name.replace("_", "-")


def takes(options: type[Options]) -> Callable[[F], F]:
    """A decorator for a function with ``**options``: lists the fields in its signature and docstring."""

    def decorate(function: F) -> F:
        own, types_of = inspect.signature(function), typing.get_type_hints(options)
        fields = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                annotation=types_of[name],
                default=inspect.Parameter.empty
                if entry.is_required()
                else entry.get_default(call_default_factory=True),
            )
            for name, entry in options.model_fields.items()
            if name not in own.parameters
        ]
        kept = [each for each in own.parameters.values() if each.kind is not each.VAR_KEYWORD]
        function.__signature__ = own.replace(parameters=[*kept, *fields])  # type: ignore[attr-defined]
        lines = [f"    {field.name}: {options.model_fields[field.name].description}" for field in fields]
        function.__doc__ = "\n".join([inspect.cleandoc(function.__doc__ or ""), "", "Options:", *lines, ""])
        return function

    return decorate


def explained(error: ValidationError, options: type[BaseModel], where: str = "") -> str:
    """pydantic's first complaint as one line: the field, what was written, what to write instead.

    Args:
        error: pydantic's error.
        options: the class that was being made.
        where: the file and section; without it fields are named as flags.
    """
    first = error.errors(include_url=False)[0]
    steps = [str(step) for step in first["loc"]]
    head = f"{where}: " if where else ""
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = [".".join([*steps[:-1], name]) for name in _model_at(options, steps[:-1]).model_fields]
        return f"{head}{unknown_name('key' if where else 'option', '.'.join(steps), known)}"
    if not steps:  # a rule over several fields, which names them itself
        return head + first["msg"].removeprefix("Value error, ")
    if where or not issubclass(options, Options):
        place = ".".join(step for step in steps if not re.match(r"(int|str|float|bool|none|tuple|list|dict)\b", step))
    else:
        place = flag_of(options, steps[0])
    colon = ":" if where else ""  # "recipe.yaml: uptrain: tokens: 'x': ...", but "--tokens 'x': ..."
    if first["type"] in ("missing", "missing_argument"):
        return f"{head}{place} is missing; give it"
    written = repr(first.get("input"))
    written = written if len(written) <= 60 else written[:57] + "..."
    return f"{head}{place}{colon} {written}: {_reason(first, options, steps)}"


def _reason(first: Any, options: type[BaseModel], steps: list[str]) -> str:
    kind, context = first["type"], first.get("ctx", {})
    if kind == "literal_error":
        return f"is not known; {suggestion(str(first['input']), _choices_at(options, steps))}"
    limit = next((context[key] for key in ("ge", "gt", "le", "lt") if key in context), "")
    bound = f"{limit:g}" if isinstance(limit, float) else str(limit)
    plain = {
        "int_parsing": "is not a whole number; write one such as 8",
        "int_type": "is not a whole number; write one such as 8",
        "int_from_float": "is not a whole number; write one such as 8",
        "float_parsing": "is not a number; write one such as 0.5",
        "float_type": "is not a number; write one such as 0.5",
        "bool_parsing": "is neither true nor false; write one of them",
        "bool_type": "is neither true nor false; write one of them",
        "string_type": "is not text; write text",
        "finite_number": "must be finite",
        "greater_than_equal": f"must be {bound} or more",
        "greater_than": f"must be more than {bound}",
        "less_than_equal": f"must be {bound} or less",
        "less_than": f"must be less than {bound}",
    }
    message = plain.get(kind) or first["msg"].removeprefix("Value error, ")
    return message[:1].lower() + message[1:]


def _model_at(model: type[BaseModel], steps: list[str]) -> type[BaseModel]:
    """The model nested at the path ``steps`` in another."""
    for step in steps:
        entry = model.model_fields.get(step)
        inner = [
            kind
            for kind in alternatives(entry.annotation if entry else None)
            if isinstance(kind, type) and issubclass(kind, BaseModel)
        ]
        if not inner:
            break
        model = inner[0]
    return model


def _choices_at(model: type[BaseModel], steps: list[str]) -> list[str]:
    names: list[str] = []
    for depth, step in enumerate(steps):
        entry = _model_at(model, steps[:depth]).model_fields.get(step)
        names = choices(entry.annotation) if entry else names
    return names


def flag_note(entry: FieldInfo) -> Flag:
    return next((each for each in entry.metadata if isinstance(each, Flag)), Flag())
