"""`rehead evaluate` from names to verdict, and every mistake in one line."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from rehead.errors import UsageError
from rehead.recipes import evaluate
from rehead.recipes.evaluation.commands import evaluate_command
from rehead.recipes.evaluation.options import EvaluateOptions
from rehead.recipes.evaluation.output import read
from rehead.recipes.evaluation_schema import Evaluation
from rehead.recipes.report.facts import Entry, summarise
from rehead.recipes.report.verdict import verdict
from rehead.recipes.scratch import NewModel, new_model

SMALL = ("--window", 64, "--tokens", 1024)


@pytest.fixture(scope="module")
def found(original, converted, control, text) -> Evaluation:
    """Everything that can be measured offline, once."""
    return evaluate(
        str(converted), baseline=str(original), control=str(control), data=[str(text)], window=64, tokens=1024,
        conventions=("disjoint", "strided", "rolling"), damage=True, damage_tokens=256, needle=(48, 96),
        needle_depths=(0.0, 1.0), needle_trials=2, recall=(16, 128, 600), recall_trials=1,
        speed=True, speed_batch=(1,), speed_context=(32,), speed_repeats=1,
        fail_above={"KL": 100.0}, fail_below={"top1-agreement": 1.0}, resamples=200,
    )  # fmt: skip


def test_every_section_is_there_for_everybody(found):
    whos = {"model", "baseline", "control"}
    assert {(row.who, row.convention) for row in found.perplexity} == {
        (who, convention) for who in whos for convention in ("disjoint", "strided", "rolling")
    }
    assert {row.who for row in found.divergence} == {"model", "control"}
    assert {row.who for row in found.needle} == {row.who for row in found.speed} == whos
    assert {(row.who, row.kind, row.distance) for row in found.recall} == {
        (who, kind, distance) for who in whos for kind in ("copy", "pairs") for distance in (16, 128)
    }
    assert "recall at a distance of 600 left out for the model: it has positions for 512" in found.notes
    assert [row.layer for row in found.damage] == [0, 1, 2]
    assert found.model.num_key_value_heads == [1, 1, 1]
    assert found.baseline.num_key_value_heads == [4, 4, 4]
    assert found.model.kv_bytes_per_token * 4 == found.baseline.kv_bytes_per_token
    assert found.model.conversion["options"]["method"] == "mean"
    assert found.baseline.conversion is None
    for row in found.kv_cache:
        assert row.computed_bytes_per_token == row.measured_bytes_per_token
    assert [(gate.name, gate.passed) for gate in found.gates] == [("kl", True), ("top1-agreement", False)]
    assert found.conditions.data[0].tokens == 1024
    assert Evaluation.model_validate_json(found.model_dump_json()) == found


def test_conversion_costs_more_than_control(found):
    kl = {row.who: row.mean for row in found.divergence}
    assert 0 < kl["control"] < kl["model"]
    values = {(row.who, row.convention): row for row in found.perplexity}
    for convention in ("disjoint", "strided", "rolling"):
        model, base = values["model", convention], values["baseline", convention]
        assert model.ratio.value == pytest.approx(model.value / base.value, rel=1e-9)
        assert model.low < model.value < model.high
        assert model.ratio.low < model.ratio.value < model.ratio.high
        assert base.ratio is None
        assert model.bits_per_byte > 0


def test_the_report_is_written_before_a_gate_fails(run, original, converted, text, tmp_path):
    out = tmp_path / "report"
    code, stdout, err = run(
        "evaluate", converted, "--baseline", original, "--data", text, *SMALL, "--out", out, "--fail-above", "KL=1e-6"
    )
    assert code == 5
    assert err.startswith("error: quality gate: kl ")
    assert "is above 1e-06" in err
    assert len(err.strip().splitlines()) == 1
    assert read(out).gates[0].passed is False
    assert {"evaluation.json", "report.html", "report.md", "report.json"} <= {path.name for path in out.iterdir()}
    for words in ("KV heads", "disjoint", "strided", "top-1", "FAILED", "float32"):
        assert words in stdout
    again = run("evaluate", converted, "--baseline", original, "--data", text, *SMALL, "--out", out, "--quiet")
    assert again == (0, "", "")
    assert read(out).gates == []


@pytest.mark.parametrize("name", ["report.md", "report.html", "evaluation.json"])
def test_nobody_elses_report_is_replaced(run, original, text, tmp_path, name):
    (tmp_path / name).write_text('{"mine": true}')
    code, _, err = run("evaluate", original, "--data", text, *SMALL, "--out", tmp_path)
    assert code == 2
    assert f"{name} there is not of an evaluation, and would be replaced" in err
    assert [path.read_text() for path in tmp_path.iterdir()] == ['{"mine": true}']


def test_an_interruption_while_the_report_is_written_says_what_is_there(run, original, text, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("rehead.recipes.report.write_report", stop)
    code, _, err = run("evaluate", original, "--data", text, *SMALL, "--out", tmp_path / "out")
    assert code == 130
    assert err.strip() == f"error: interrupted; {tmp_path / 'out' / 'evaluation.json'} was written"


def test_json_has_the_same_facts(run, original, converted, text):
    code, out, _ = run("evaluate", converted, "--baseline", original, "--data", text, *SMALL, "--json")
    assert code == 0
    facts = Evaluation.model_validate_json(out)
    again = evaluate(str(converted), baseline=str(original), data=[str(text)], window=64, tokens=1024)
    assert facts.divergence == again.divergence
    assert facts.perplexity == again.perplexity


def test_a_model_alone(run, original, text):
    code, out, _ = run("evaluate", original, "--data", text, *SMALL, "--fail-above", "perplexity=1e9", "--json")
    facts = Evaluation.model_validate_json(out)
    assert code == 0
    assert not facts.divergence
    assert facts.perplexity[0].ratio is None
    code, out, _ = run("evaluate", original, *SMALL, "--json")
    facts = json.loads(out)
    assert facts["kv_cache"][0]["measured_bytes_per_token"] == 768
    assert facts["conditions"]["data"][0]["name"] == "built-in:heldout"
    assert run("evaluate", original, "--data", text, *SMALL)[0] == 0


def test_a_model_without_a_tokenizer_is_still_measured(run, original, tmp_path):
    """Its cache needs no text."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(original / name, tmp_path)
    code, out, _ = run("evaluate", tmp_path, "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["kv_cache"][0]["sizes"] == [{"context": 512, "computed_bytes": 393216, "measured_bytes": 393216}]
    assert "no tokenizer to read a text" in facts["notes"][0]


def test_patches_are_measured_as_checkpoints_are(original, text):
    """Stacked, beside the model as it is; layer by layer; and what a window would leave of the cache."""
    found = evaluate(
        str(original), data=[str(text)], window=64, tokens=1024, damage=True, damage_tokens=256,
        patches=["tiled", "window:size=8,sinks=2"],
    )  # fmt: skip
    assert found.model.patches == ["tiled", "window:size=8,sinks=2"]
    assert found.baseline.name == found.model.name
    assert found.baseline.patches == []
    assert found.divergence[0].mean > 1e-4
    assert [row.layer for row in found.damage] == [0, 1, 2]
    assert all(row.kl > 0 for row in found.damage)
    after, before = ({row.who: row for row in found.kv_cache}[who].sizes[0] for who in ("model", "baseline"))
    assert after.computed_bytes == before.computed_bytes / 512 * (8 - 1 + 2)
    assert any("where a cache made for them holds 6,912" in note for note in found.notes)
    summary = summarise(Entry("m", found))
    assert "patched: window:size=8,sinks=2" in verdict([summary]).headline
    exact = evaluate(str(original), data=[str(text)], window=64, tokens=512, patches=["tiled"])
    assert exact.divergence[0].max < 1e-6


def test_a_window_that_only_a_longer_part_notices_is_said_to_change_no_perplexity(original, text):
    found = evaluate(str(original), data=[str(text)], window=64, tokens=512, patches=["window:size=80"], needle=(96,))
    assert found.divergence[0].max == 0
    assert any("lets each token see 80 tokens, and a text is read 63 at a time" in note for note in found.notes)


@pytest.mark.parametrize(
    ("patches", "said"),
    [
        (["window:size=8", "window:size=4"], "--patch window: is given twice"),
        (["pool:num_key_value_heads=1"], "--patch pool: changes checkpoints only"),
    ],
)
def test_patches_that_cannot_be_are_refused_before_anything_is_loaded(patches, said):
    with pytest.raises(UsageError, match=said):
        evaluate("no-such-model", patches=patches)


def test_a_model_is_at_no_distance_from_itself(run, original, text, tmp_path):
    code, out, _ = run(
        "evaluate", original, "--baseline", original, "--control", original, "--data", text, *SMALL, "--damage",
        "--fail-above", "kl-max=0", "--fail-below", "top1-agreement=1", "--json", "--out", tmp_path / "report",
    )  # fmt: skip
    facts = Evaluation.model_validate_json(out)
    assert code == 0
    assert [row.max for row in facts.divergence] == [0, 0]
    assert all(row.ratio.value == 1 for row in facts.perplexity if row.ratio)
    assert facts.notes == ["damage left out: no layer differs from the baseline's"]
    assert "KL distribution" not in (tmp_path / "report" / "report.html").read_text()


@pytest.mark.parametrize("attention", ["eager", "tiled"])
def test_attention_by_name(run, original, converted, text, attention):
    code, out, _ = run(
        "evaluate", converted, "--baseline", original, "--data", text, *SMALL, "--attention", attention, "--json"
    )
    facts = Evaluation.model_validate_json(out)
    assert code == 0
    assert facts.conditions.attention == attention
    plain = evaluate(str(converted), baseline=str(original), data=[str(text)], window=64, tokens=1024)
    assert facts.divergence[0].mean == pytest.approx(plain.divergence[0].mean, rel=1e-4)


BAD = [
    (["nowhere/at/all"], 2, "no such folder"),
    (["MODEL", "--baseline", "OTHER", "--data", "TEXT"], 2, "vocabulary of 320, "),
    (["MODEL", "--baseline", "RENAMED", "--data", "TEXT"], 2, "tokenizer's vocabulary is not"),
    (["MODEL", "--data", "nowhere.txt"], 2, "no such file"),
    (["MODEL", "--data", "EMPTY"], 2, "is empty"),
    (["MODEL", "--data", "SHORT"], 2, "less than one window of 512"),
    (["MODEL", "--data", "BINARY"], 2, "is not"),
    (["MODEL", "--data", "TEXT", "--damage"], 2, "give --baseline"),
    (["MODEL", "--patch", "windw:size=8"], 2, "did you mean 'window'"),
    (["MODEL", "--patch", "window:sise=8"], 2, "did you mean 'size'"),
    (["MODEL", "--patch", "window:size=none"], 2, "--patch window"),
    (["MODEL", "--patch", "window", "--patch", "window"], 2, "given twice"),
    (["MODEL", "--data", "TEXT", "--patch", "window:size=1k"], 2, "so nothing would change; give a larger --window"),
    (["MODEL", "--baseline", "OTHER", "--patch", "window", "--damage"], 2, "leave out --baseline or --patch"),
    (["MODEL", "--data", "TEXT", "--needle", "64,x"], 2, "--needle"),
    (["MODEL", "--data", "TEXT", "--needle", "8"], 2, "32 or more"),
    (["MODEL", "--data", "TEXT", "--recall", "5"], 2, "--recall 5: must be 6 or more tokens"),
    (["MODEL", "--data", "TEXT", "--fail-above", "KL=0.5"], 2, "needs --baseline"),
    (["MODEL", "--data", "TEXT", "--fail-above", "KL"], 2, "NAME=LIMIT"),
    (["MODEL", "--data", "TEXT", "--fail-above", "KL=nan"], 2, "NAME=LIMIT"),
    (["MODEL", "--data", "TEXT", "--fail-above", "perplexty=2"], 2, "did you mean 'perplexity'"),
    (["MODEL", "--data", "TEXT", "--convention", "stride"], 2, "did you mean 'strided'"),
    (["MODEL", "--data", "TEXT", "--window", "1"], 2, "2 or more"),
    (["MODEL", "--data", "TEXT", "--tokens", "lots"], 2, "--tokens"),
    (["MODEL", "--data", "TEXT", "--stride", "1024"], 2, "would skip tokens"),
    (["MODEL", "--data", "TEXT", "--seed", "-1"], 2, "--seed"),
    (["MODEL", "--data", "TEXT", "--needle", "64,1M"], 2, "--needle 1000000: the text has only"),
    (["MODEL", "--data", "TEXT", "--device", "warp"], 2, "warp"),
    (["MODEL", "--data", "TEXT", "--dtype", "bf16"], 2, "bfloat16"),
    (["MODEL", "--data", "TEXT", "--attention", "flush"], 2, "--attention flush"),
    (["MODEL", "--data", "TEXT", "--attention", "flash_attention_2"], 2, "--attention flash_attention_2"),
    (["MODEL", "--data", "TEXT", "--out", "MODEL"], 2, "is a checkpoint"),
    (["MODEL", "--data", "TEXT", "--out", "TEXT"], 2, "is a file"),
    (["LARGER", "--data", "TEXT"], 2, "the tokenizer gives token"),
    (["GARBLED", "--data", "TEXT"], 2, "its tokenizer cannot be loaded ("),
    (["BROKEN", "--data", "TEXT"], 3, "gives no finite probability"),
    (["HALF", "--data", "TEXT"], 3, "is missing"),
    (["T5", "--data", "TEXT"], 3, "is an encoder-decoder"),
]


@pytest.fixture(scope="module")
def harmed(tmp_path_factory, original, text):
    """What BAD speaks of, by name."""
    place = tmp_path_factory.mktemp("harmed")
    (place / "EMPTY").write_text(" \n")
    (place / "SHORT").write_text("The year 1790 brought peace.")
    (place / "BINARY").write_bytes(bytes(range(256)) * 40)
    shape = NewModel(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4,
    )  # fmt: skip
    new_model(place / "OTHER", text.read_text().splitlines(), shape)
    for name in ("RENAMED", "BROKEN", "HALF", "GARBLED"):
        shutil.copytree(original, place / name)
    (place / "GARBLED" / "tokenizer.json").write_text("no JSON")
    shutil.copytree(place / "OTHER", place / "LARGER")  # with the tokenizer of a model that has more tokens
    shutil.copy(original / "tokenizer.json", place / "LARGER")
    tokenizer = json.loads((place / "RENAMED" / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["!"], vocabulary['"'] = vocabulary['"'], vocabulary["!"]
    (place / "RENAMED" / "tokenizer.json").write_text(json.dumps(tokenizer))
    weights = load_file(place / "BROKEN" / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, place / "BROKEN" / "model.safetensors", {"format": "pt"})
    (place / "T5").mkdir()
    (place / "T5" / "config.json").write_text('{"model_type": "t5", "is_encoder_decoder": true}')
    shutil.copy(original / "model.safetensors", place / "T5")
    weights.pop("model.norm.weight")
    save_file(weights, place / "HALF" / "model.safetensors", {"format": "pt"})
    return place


@pytest.mark.parametrize(("words", "code", "says"), BAD, ids=[" ".join(words) for words, _, _ in BAD])
def test_mistakes_are_one_line(run, harmed, original, text, words, code, says):
    names = {"MODEL": original, "TEXT": text} | {path.name: path for path in harmed.iterdir()}
    found, _, err = run("evaluate", *(names.get(word, word) for word in words))
    assert found == code, err
    assert says in err, err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1


def test_every_option_is_a_flag():
    flags = {parameter.name for parameter in evaluate_command.params}
    assert set(EvaluateOptions.model_fields) <= flags
