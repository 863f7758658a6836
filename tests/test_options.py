"""Options: one class behind keyword arguments, flags, NAME:key=value texts, YAML sections and manifests."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from importlib import import_module
from typing import Annotated, Any, Literal

import click
import numpy
import pytest
from click.testing import CliRunner
from hypothesis import given as drawn
from hypothesis import strategies as st
from pydantic import Field

from rehead.counts import LONGEST, Count, parse_count
from rehead.errors import UsageError
from rehead.flags import flags, set_by_user
from rehead.options import SPLIT, Flag, Names, Options, flag_of, named_options, pairs, takes
from rehead.typehints import alternatives, is_tuple, leaves
from rehead.variants.contract import VARIANTS


class Window(Options):
    size: Count = Field(4096, ge=1, description="Keys that a query sees.")
    share: float = Field(0.5, ge=0, le=1, description="Of what.")
    kind: Literal["soft", "hard"] | None = Field(None, description="How it ends.")
    layers: Annotated[str, Flag(metavar="LIST")] = Field("all", description="Which layers.")
    lengths: Annotated[tuple[Count, ...], SPLIT] = Field((1, 2), description="Several.")
    texts: Names = Field((), description="As they stand.")
    sinks: bool = Field(False, description="Keep the first keys.")
    rates: Annotated[dict[str, float], pairs("NAME=RATE", "q=2")] = Field({}, description="By name.")
    limit: Annotated[Count | None, Flag("--most", default="half")] = Field(None, description="At most.")


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        ("", {}),
        ("size=4k", {"size": 4000}),
        ("layers=0,4-7,size=32Ki", {"layers": "0,4-7", "size": 32768}),
        ("lengths=1,2k,3,sinks", {"lengths": (1, 2000, 3), "sinks": True}),
        ("sinks=true, kind=hard", {"sinks": True, "kind": "hard"}),
        ("kind=none,share=1", {"kind": None, "share": 1.0}),
    ],
)
def test_a_text_is_options(text: str, changed: dict) -> None:
    assert Window.from_text(text, "window") == Window(**changed)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("w:sise=3", "--variant w: unknown key 'sise'; did you mean 'size'?"),
        ("w:size=0", "--variant w: size: 0: must be 1 or more"),
        ("w:size=x", "--variant w: size: 'x': is not a whole number; write 8000000, 8M or 32Ki"),
        ("w:share=2", "--variant w: share: '2': must be 1 or less"),
        ("w:share=nan", "--variant w: share: 'nan': must be finite"),
        ("w:kind=sft", "--variant w: kind: 'sft': is not known; did you mean 'soft'?"),
        ("w:sinks=maybe", "--variant w: sinks: 'maybe': is neither true nor false; write one of them"),
        ("w:sink", "--variant w: 'sink' is not key=value; did you mean 'sinks'?"),
        ("v", "unknown variant 'v'"),
    ],
)
def test_a_mistake_is_one_line(text: str, line: str) -> None:
    def options_of(name: str) -> type[Window]:
        if name != "w":
            raise UsageError(f"unknown variant {name!r}")
        return Window

    with pytest.raises(UsageError) as error:
        named_options(text, options_of, "--variant")
    assert str(error.value) == line


def test_keywords_are_named_as_flags_and_sections_as_keys() -> None:
    for values, flag, key in (
        ({"limit": "x"}, "--most 'x': is no", "r.yaml: w: limit: 'x': is no"),
        ({"rates": ["q"]}, "--rates ['q']: 'q' is not NAME=RATE; write q=2", "r.yaml: w: rates: ['q']"),
        ({"lmit": 1}, "unknown option 'lmit'; did you mean 'limit'?", "r.yaml: w: unknown key 'lmit'"),
    ):
        with pytest.raises(UsageError) as error:
            Window.parse(values)
        assert str(error.value).startswith(flag)
        with pytest.raises(UsageError) as error:
            Window.parse(values, "r.yaml: w")
        assert str(error.value).startswith(key)
    with pytest.raises(UsageError, match=r"^r\.yaml: w: is list, not a mapping; give it keys$"):
        Window.parse([1], "r.yaml: w")


def test_flags_say_every_default_and_hand_over_what_was_written() -> None:
    @click.command()
    @flags(Window)
    def command(**values: object) -> None:
        click.echo(json.dumps(Window.parse(set_by_user(values)).as_json()))

    text = " ".join(CliRunner().invoke(command, ["--help"]).output.split())
    for words in ("--size N", "[default: 4096]", "soft|hard", "--lengths N[,N]", "[default: 1, 2]", "--most, --limit N",
                  "[default: half]", "--layers LIST", "[default: none]"):  # fmt: skip
        assert words in text
    words = ["--size", "8k", "--lengths", "3,4", "--lengths", "5", "--texts", "a,b", "--sinks", "--rates", "k=3"]
    written = json.loads(CliRunner().invoke(command, words).output)
    changed = {"size": 8000, "lengths": [3, 4, 5], "texts": ["a,b"], "sinks": True, "rates": {"k": 3.0}}
    assert written == Window().as_json() | changed
    assert Window.parse(written, "manifest") == Window(**changed)


def test_a_function_shows_the_options_it_takes() -> None:
    @takes(Window)
    def act(model: str, **options: object) -> None:
        """Act."""

    shown = inspect.signature(act)
    assert shown.parameters["size"].default == 4096
    assert str(shown).startswith("(model: 'str', *, size: int = 4096, share: float = 0.5, kind: ")
    assert "size: Keys that a query sees." in (act.__doc__ or "")


def test_changed_options_are_checked_again() -> None:
    assert Window().but(size="2k").size == 2000
    with pytest.raises(UsageError, match="must be 1 or more"):
        Window().but(size=0)


@drawn(st.integers(-(10**15), 10**15), st.sampled_from(["", "k", "Ki", "M"]))
def test_counts_are_what_they_say(number: int, unit: str) -> None:
    assert parse_count(f"{number:,}{unit}") == number * {"": 1, "k": 1000, "Ki": 1024, "M": 10**6}[unit]


def every_options() -> list[type[Options]]:
    """Every class of options in Rehead itself."""
    for room in ("rehead.convert.options", "rehead.convert.budget.options", "rehead.recipes.pipeline.schema"):
        import_module(room)
    for name in VARIANTS.names():
        VARIANTS.get(name)
    found, new = set(), {Options}
    while new:
        found |= new
        new = {sub for cls in new for sub in cls.__subclasses__()} - found
    return sorted((cls for cls in found if cls.__module__.startswith("rehead.")), key=lambda cls: cls.__name__)


def refused(options: type[Options], name: str, value: Any) -> None:
    """A value is refused in one line that names the field."""
    kinds = [kind for kind in alternatives(options.model_fields[name].annotation) if kind is not type(None)]
    needed = {"data": "text"} if "data" in options.model_fields else {}
    with pytest.raises(UsageError) as caught:
        options.parse({**needed, name: [value] if all(map(is_tuple, kinds)) else value})
    assert flag_of(options, name) in str(caught.value)
    assert "\n" not in str(caught.value)


#: Whole numbers that are written as they are wherever text is taken too.
TEXT = {"layers", "max_shard_size", "pretraining_tokens"}
#: Fields that are tokens of one text.
LENGTHS = {
    *("calibration_length", "chunk", "context", "max_position_embeddings", "min_keys", "needle", "neighbours"),
    *("recall", "sample_tokens", "seq_length", "sinks", "size", "speed_context", "stride", "trained", "window"),
}


@pytest.mark.parametrize("options", every_options(), ids=lambda cls: cls.__name__)
def test_no_size_is_absurd(options: type[Options]) -> None:
    """No number of anything is one that a run would never come to the end of: ``--fit 10T`` ran on for ever."""
    for name, entry in options.model_fields.items():
        if int in leaves(entry.annotation) and name not in TEXT:
            refused(options, name, "9" * 30)
            refused(options, name, -(10**30))
            refused(options, name, 10**15)
            refused(options, name, "1000T")
        if name == "seed":
            refused(options, name, 1 << 32)
            refused(options, name, -1)
        if name in LENGTHS or (options.__name__, name) == ("ContextOptions", "tokens"):
            refused(options, name, LONGEST + 1)


def test_what_can_be_meant_is_taken() -> None:
    every = {cls.__name__: cls for cls in every_options()}
    given = {"calibration_tokens": "16Mi", "own_text": "16Mi", "fit": "1M", "num_key_value_heads": 2, "method": "svd"}
    assert every["ConvertOptions"].parse({**given, "refit": True}).as_json()["fit"] == 10**6
    assert every["UptrainOptions"].parse({"data": "a", "tokens": "15T"}).as_json()["tokens"] == 15 * 10**12
    with pytest.raises(UsageError, match="--fit 1000001: no model and no run has so many; give 1,000,000 or less"):
        every["ConvertOptions"].parse({**given, "fit": 1_000_001})


def test_the_longest_text_is_what_positions_in_float32_tell_apart() -> None:
    assert float(numpy.float32(LONGEST)) != float(numpy.float32(LONGEST - 1))
    assert float(numpy.float32(LONGEST)) == float(numpy.float32(LONGEST + 1))
    at_most = every_options()[[cls.__name__ for cls in every_options()].index("WindowOptions")]
    assert at_most.parse({"size": LONGEST}).as_json()["size"] == LONGEST
    with pytest.raises(UsageError, match="no more than 16777216 positions of a text apart; give that or less"):
        at_most.parse({"size": LONGEST + 1})


def test_options_import_nothing_heavy() -> None:
    code = "import sys, rehead.options, rehead.convert.commands, rehead.recipes.evaluation.commands\n"
    code += "assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_conversion_takes_each_variant_and_each_of_its_keys_once():
    from rehead.convert.options import ConvertOptions

    for variants in (["temperature:start=1.25", "temperature:start=2"], ["temperature:start=1,start=2"]):
        with pytest.raises(UsageError, match="is given twice; give it once"):
            ConvertOptions.parse({"variants": variants})
    with pytest.raises(UsageError):
        ConvertOptions.parse({"variants": [3]})
