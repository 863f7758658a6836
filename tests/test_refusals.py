"""Mistakes that are told at once, with the flag that was written and a remedy that works."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import tiny
import torch
from click.testing import CliRunner

from rehead.cli import cli, main
from rehead.convert import convert, execute, latent
from rehead.convert.many import convert_many
from rehead.errors import UsageError, suggestion
from rehead.patches import patch_model
from rehead.recipes import uptrain
from rehead.recipes.pipeline.named_models import embedded_model


def commands(group: click.Group, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from commands(command, (*words, name))
        else:
            yield (*words, name), command


def texts(command: click.Command) -> list[click.Parameter]:
    return [p for p in command.params if not getattr(p, "is_flag", False) and p.nargs == 1 and not p.is_eager]


ALL = [(" ".join(words), p.name) for words, command in commands(cli) for p in texts(command)]


@pytest.mark.parametrize(("words", "name"), ALL)
def test_an_empty_word_is_refused_by_name(words: str, name: str) -> None:
    """As an unset variable in a shell leaves it; nothing runs, and the working directory is never meant by it."""
    command = dict(commands(cli))[tuple(words.split())]
    line = words.split()
    said = ""
    for parameter in command.params:
        value = "" if parameter.name == name else "x"
        if isinstance(parameter, click.Argument):
            line.append(value)
            said = parameter.make_metavar(click.Context(command)) if parameter.name == name else said
        elif parameter.name == name:
            line += [parameter.opts[0], value]
            said = parameter.opts[0]
    result = CliRunner().invoke(cli, line)
    assert result.exit_code == 2, result.output
    assert f"{said}: is empty" in result.output or "is not a valid" in result.output


@pytest.mark.parametrize("write", [
    lambda model, out: convert(model, out, num_key_value_heads=1),
    lambda model, out: uptrain(model, out, data=["x"]),
    lambda model, out: convert(out, "somewhere", num_key_value_heads=1),
])  # fmt: skip
def test_an_empty_path_is_refused_by_functions_too(tmp_path: Path, write) -> None:
    with pytest.raises(UsageError, match="is empty; give a"):
        write(str(tiny.save_tiny("llama", tmp_path / "m")), "")


def test_two_results_do_not_share_a_folder(tmp_path: Path) -> None:
    model = tiny.save_tiny("llama", tmp_path / "m")
    for other in (tmp_path / "out", tmp_path / "x" / ".." / "out"):
        with pytest.raises(UsageError, match="is to hold 2 KV heads and 1; give each a folder of its own"):
            convert_many(model, {2: tmp_path / "out", 1: other})
    assert not (tmp_path / "out").exists()


def test_only_layers_that_a_patch_changes_can_be_named() -> None:
    model = tiny.tiny_model("llama")
    patch = patch_model(model, "window", size=4)
    with pytest.raises(UsageError, match="changes nothing in layer 1; apply it first"), patch.only([1]):
        pass
    with patch:
        for wrong in (99, -1):
            with (
                pytest.raises(UsageError, match=f"changes nothing in layer {wrong}; choose from 0, 1"),
                patch.only([wrong]),
            ):
                pass
        with patch.only([1]):
            model(torch.arange(8)[None])


@pytest.mark.parametrize("variant", ["window", "parallel"])
@pytest.mark.parametrize(
    ("layers", "said"), [([-1], "-1 is not"), ([0, 7], "7 is not"), ("0,7", "7 is not"), ("0-999999", "2 is not")]
)
def test_a_layer_that_is_not_there_is_told_with_those_that_are(variant: str, layers: object, said: str) -> None:
    options = {"size": 4} if variant == "window" else {}
    with pytest.raises(UsageError) as error:
        patch_model(tiny.tiny_model("llama"), variant, layers=layers, **options).apply()
    assert said in str(error.value)
    assert "choose from 0 to 1" in str(error.value)
    assert "--layers" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--latent", "16", "--host", "auto"], "unknown host of latent attention 'auto'; choose one of"),
        (["--kv-cache", "5"], "engines take even ranks only; give 4 or 6"),
        (["--kv-cache", "1"], "--kv-cache 1: is 1 numbers per token"),
        (["--kv-heads", "1", "--method", "svdd"], "did you mean 'svd'?"),
        (["--kv-heads", "1", "--method", "xyzzy"], "choose one of"),
        (["--kv-heads", "1", "--variant", "pigeons"], "choose one of"),
    ],
)
def test_a_usage_mistake_is_one_and_says_what_works(flags: list[str], says: str, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["plan", str(embedded_model()), *flags])
    assert stop.value.code == 2
    assert says in capsys.readouterr().err


def test_the_advice_on_a_size_is_right(capsys) -> None:
    for size in ("4", "6"):
        with pytest.raises(SystemExit) as stop:
            main(["plan", str(embedded_model()), "--kv-cache", size])
        assert stop.value.code == 0


def test_suggestions_are_near() -> None:
    names = ["mean", "first", "random", "procrustes", "svd"]
    assert suggestion("procustes", names) == "did you mean 'procrustes'?"
    assert suggestion("dvs", names) == "did you mean 'svd'?"
    for far in ("auto", "xyz", "best", "sv_decomposition"):
        assert suggestion(far, names).startswith("choose one of")


@pytest.mark.parametrize("changed", [{"latent": 32}, {"calibration_tokens": 2048}])
def test_other_options_are_refused_before_the_text_is_read(tmp_path: Path, monkeypatch, changed: dict) -> None:
    """A resumed run whose sizes the text decides must not run the model first."""
    options = {"latent": 16, "calibration_tokens": 1024}

    def killed(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(execute, "model_card", killed)
        with pytest.raises(KeyboardInterrupt):
            convert(embedded_model(), tmp_path / "out", resume=True, **options)
    assert (tmp_path / ".out.rehead-staging").exists()
    monkeypatch.setattr(latent, "choose_sizes", killed)
    with pytest.raises(UsageError, match="cannot resume, since the options changed"):
        convert(embedded_model(), tmp_path / "out", resume=True, **{**options, **changed})
    with pytest.raises(KeyboardInterrupt):  # the same options go on
        convert(embedded_model(), tmp_path / "out", resume=True, **options)


def test_a_complete_out_of_other_options_is_refused_before_the_text_is_read(tmp_path: Path, monkeypatch) -> None:
    options = {"latent": 16, "rope_dims": 16, "calibration_tokens": 1024}
    out = tmp_path / "out"
    convert(embedded_model(), out, **options)

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("the text was read")

    monkeypatch.setattr(latent, "choose_sizes", never)
    with pytest.raises(UsageError, match=r"is complete, with other options; choose another OUT or give --overwrite"):
        convert(embedded_model(), out, resume=True, **{**options, "latent": 32})
    shutil.rmtree(out)
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="already exists"):
        convert(embedded_model(), out, resume=True, **options)
