"""The table of longer contexts: what it says of a model that copies by construction, and of the one that ships."""

from __future__ import annotations

import json
import math
from importlib.resources import files

import pytest
import torch
from copying import copying

from rehead.benchmarks import context
from rehead.benchmarks.command import run_script
from rehead.convert import convert
from rehead.errors import ReheadError, UnsupportedError, UsageError
from rehead.models.predictions import predict
from rehead.recipes.evaluation.models import JudgedModel

LINE = ["MODEL", "--text", "t", "--lengths", "100,700", "--trained", "128", "--context", "1024", "--trials", "2"]


def test_a_planted_model_copies_from_afar_under_the_patches_alone(monkeypatch) -> None:
    # Words that the text between does not have, as a real tokenizer's mostly are.
    monkeypatch.setattr(context, "word_tokens", lambda *told: torch.arange(8, 200))
    options = context._checked(context._parser().parse_args([*LINE, "--block", "32", "--short", "64"]))
    loaded = JudgedModel("model", "planted", copying(local=True), torch.float32, 0)
    texts = context.Texts(torch.arange(200, 500).repeat(10), None, options)
    reference = [predict(loaded.model, {"input_ids": row[None]}) for row in texts.short]
    found = {}
    for method in ("plain", "longrope", "dual_chunk", "self_extend"):
        with context.under(loaded, method, options):
            found[method] = context.measure(loaded.model, texts, reference)
    copied = {name: [row["lengths"][length]["copy"] for length in ("100", "700")] for name, row in found.items()}
    assert all(near["top1"] > 0.95 and near["tokens"] == 2 * 31 for near, _ in copied.values())
    assert copied["plain"][1]["top1"] < 0.1
    assert copied["dual_chunk"][1]["top1"] > 0.95
    assert copied["self_extend"][1]["top1"] > 0.95
    assert copied["plain"][1]["distance"] == 700 - 16 - 32
    assert all(row["short"]["kl"] < 1e-9 for row in found.values())
    # The text between the blocks counts up and repeats itself every 300 tokens, which near copies make certain.
    plain, chunked = (found[name]["lengths"]["700"]["perplexity"] for name in ("plain", "dual_chunk"))
    assert list(plain) == ["0-256", "256-512", "512-1024"]
    assert max(chunked["512-1024"], plain["512-1024"]) < 1.1 < plain["0-256"]
    assert all(row["lengths"]["700"]["needle"]["trials"] == 2 for row in found.values())


def test_perplexity_by_position_leaves_out_what_is_not_counted() -> None:
    losses = torch.tensor([[1.0, 3.0, math.nan, 2.0, 5.0]])
    spans = context.by_position(losses, shortest=2)
    assert spans == {"0-2": pytest.approx(math.exp(2)), "2-4": pytest.approx(math.exp(2)), "4-8": math.exp(5)}
    assert context.by_position(torch.full((1, 3), math.nan)) == {}


def test_the_command_writes_every_row(tmp_path, capsys) -> None:
    folder, out = files("rehead.recipes") / "assets", tmp_path / "figures.json"
    converted = convert(str(folder / "embedded"), tmp_path / "converted", context=4096, rope="yarn").out
    line = f"{folder}/embedded --text {folder}/heldout.txt.gz --lengths 96,160 --context 4Ki --trials 1 --block 16"
    few = f"--short 64 --short-tokens 128 --methods plain,yarn --json {out}"
    also = f"--also again={folder}/embedded --also converted={converted}"
    context.main([*line.split(), *few.split(), *also.split()])
    rows = json.loads(out.read_text())["rows"]
    assert [row["name"] for row in rows] == ["plain", "yarn", "again", "converted"]
    assert rows[1]["short"]["kl"] > 1e-3
    assert rows[2]["short"]["kl"] == pytest.approx(0, abs=1e-9)
    assert rows[2]["lengths"]["160"]["copy"] == rows[0]["lengths"]["160"]["copy"]
    # A checkpoint is measured as the method that it was made by, in every figure but the seconds.
    assert rows[3]["short"]["kl"] == pytest.approx(rows[1]["short"]["kl"], rel=1e-4)
    for by_checkpoint, by_method in zip(rows[3]["lengths"].values(), rows[1]["lengths"].values()):
        assert by_checkpoint["perplexity"] == pytest.approx(by_method["perplexity"], rel=1e-4)
        for kind in ("copy", "pairs"):
            assert by_checkpoint[kind]["nll"] == pytest.approx(by_method[kind]["nll"], rel=1e-4)
            assert by_checkpoint[kind]["tokens"] == by_method[kind]["tokens"]
        assert by_checkpoint["needle"] == by_method["needle"]
    said = capsys.readouterr().out
    assert "needle 160" in said
    assert "yarn" in said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--methods", "plain,yarm"], "did you mean 'yarn'"),
        (["--measures", "coy"], "did you mean 'copy'"),
        (["--block", "16", "--also", "folder"], "give NAME=FOLDER"),
        (["--block", "16", "--also", "uptrained=./nowhere"], "nowhere"),
        (["--block", "16", "--also", "=folder"], "give NAME=FOLDER"),
        (["--block", "16", "--also", "plain=folder"], "another row has this name"),
        (["--block", "16", "--trials", "0"], "--trials 0: must be 1 or more"),
        (["--block", "64"], "too short for two blocks of 64"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_loaded(flags, said) -> None:
    with pytest.raises(UsageError, match=said):
        context.main([*LINE, *flags])


def test_scripts_end_with_the_error_s_own_exit_code(capsys) -> None:
    for error, code in ((UsageError("no such"), 2), (UnsupportedError("no class"), 3)):

        def fail(error: ReheadError = error) -> None:
            raise error

        with pytest.raises(SystemExit) as ended:
            run_script(fail)
        assert ended.value.code == code
        assert capsys.readouterr().err == f"error: {error}\n"
