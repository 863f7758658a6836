"""What engines were seen to serve: facts of a config, and the runs that hold for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
from click.testing import CliRunner

from rehead.checkpoints.markdown import plain
from rehead.cli import cli
from rehead.convert import convert
from rehead.models import serving
from rehead.models.serving import DIFFERENT, REFUSED, SAME, facts_of, served_by

LLAMA = {"model_type": "llama", "num_attention_heads": 8, "num_key_value_heads": 2, "hidden_act": "silu"}


def test_how_heads_are_shared() -> None:
    assert facts_of(LLAMA)["attention"] == "GQA"
    assert facts_of(LLAMA | {"num_key_value_heads": 1})["attention"] == "MQA"
    assert facts_of(LLAMA | {"num_key_value_heads": 8})["attention"] == "MHA"
    assert facts_of({"model_type": "gpt_bigcode", "n_head": 4, "multi_query": True})["attention"] == "MQA"
    assert facts_of({"model_type": "gpt_bigcode", "n_head": 4, "multi_query": False})["attention"] == "MHA"
    assert facts_of(LLAMA | {"kv_lora_rank": 64})["attention"] == "latent"


def test_names_of_one_activation_are_one() -> None:
    assert facts_of(LLAMA | {"hidden_act": "gelu_new"}) == facts_of(LLAMA | {"hidden_act": "gelu_pytorch_tanh"})
    assert facts_of(LLAMA | {"hidden_act": "gelu"}) != facts_of(LLAMA | {"hidden_act": "gelu_new"})


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch):
    """Runs of a record: (config, outcome) for each."""

    def record(*rows: tuple[dict, str]) -> None:
        run = {
            "engine": "an engine", "version": "1", "tokens": 24, "of": 24, "logprob_difference": 0.0,
            "cache_bytes_per_token": None, "notes": ["a note"],
        }  # fmt: skip
        monkeypatch.setattr(
            serving,
            "results",
            lambda: {
                "rows": [
                    {
                        "case": str(number),
                        "model_type": config["model_type"],
                        "facts": facts_of(config),
                        "runs": [{**run, "outcome": outcome}],
                    }
                    for number, (config, outcome) in enumerate(rows)
                ]
            },
        )

    return record


def outcomes(config: dict) -> list[str]:
    return [run.outcome for run in served_by(config)]


def test_a_run_counts_for_its_kind_only(recorded) -> None:
    recorded((LLAMA, SAME), (LLAMA | {"hidden_act": "relu"}, DIFFERENT))
    assert outcomes(LLAMA) == [SAME]
    assert outcomes(LLAMA | {"hidden_act": "relu"}) == [DIFFERENT]
    assert outcomes(LLAMA | {"hidden_act": "gelu"}) == []
    assert outcomes(LLAMA | {"num_key_value_heads": 1}) == []
    assert outcomes(LLAMA | {"model_type": "mistral"}) == []


def test_other_facts_decide_where_runs_differ_in_them(recorded) -> None:
    other = LLAMA | {"rope_parameters": {"rope_theta": 5e5}}
    recorded((LLAMA, SAME))
    assert outcomes(other) == [SAME]
    recorded((LLAMA, SAME), (other, REFUSED))
    assert outcomes(LLAMA) == [SAME]
    assert outcomes(other) == [REFUSED]
    windowed = [LLAMA | {"layer_types": [*["sliding_attention"] * n, "full_attention"]} for n in (1, 2, 5)]
    recorded((windowed[0], DIFFERENT), (windowed[2], SAME))
    assert [outcomes(config) for config in windowed] == [[DIFFERENT], [], [SAME]]


def test_what_a_card_says(recorded) -> None:
    recorded((LLAMA, SAME))
    assert serving.sentences(LLAMA) == ["an engine 1: 24 of 24 greedy tokens as transformers gives them (a note)"]
    recorded((LLAMA, DIFFERENT))
    assert "do not use it" in serving.sentences(LLAMA)[0]
    assert "no engine" in serving.sentences({"model_type": "mpt"})[0]


def test_a_card_says_that_windows_and_sinks_were_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    run = {
        "engine": "an engine", "version": "1", "tokens": 24, "of": 24, "logprob_difference": 0.0,
        "cache_bytes_per_token": None, "notes": [],
    }  # fmt: skip
    wrong = {**run, "engine": "another", "outcome": DIFFERENT, "notes": ["it leaves out the sinks"]}
    row = {"case": "a", "model_type": "llama", "facts": facts_of(LLAMA), "tested": ["windows", "windows and sinks"]}
    monkeypatch.setattr(serving, "results", lambda: {"rows": [{**row, "runs": [{**run, "outcome": SAME}, wrong]}]})
    assert serving.sentences(LLAMA) == [
        "an engine 1: 24 of 24 greedy tokens as transformers gives them, windows computed",
        "another 1: loads it and computes something else: do not use it (it leaves out the sinks)",
    ]


def test_a_stretched_rope_is_a_kind_of_its_own(recorded) -> None:
    """A run with plain RoPE says nothing about another, for no class."""
    yarn = LLAMA | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}
    recorded((LLAMA, SAME))
    assert outcomes(yarn) == []
    assert outcomes(LLAMA | {"rope_scaling": {"type": "yarn", "factor": 2.0}}) == []
    assert outcomes(LLAMA | {"rope_parameters": {"full_attention": {"rope_type": "linear"}}}) == []
    assert outcomes(LLAMA | {"rope_parameters": {"full_attention": {"rope_type": "default"}}}) == [SAME]
    recorded((LLAMA, SAME), (yarn, REFUSED))
    assert outcomes(yarn) == [REFUSED]


def test_short_texts_are_told_where_they_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    run = {
        "engine": "an engine", "version": "1", "tokens": 24, "of": 24, "logprob_difference": 0.0,
        "cache_bytes_per_token": None, "notes": [], "outcome": SAME,
    }  # fmt: skip
    wrong = {**run, "outcome": DIFFERENT, "notes": ["it leaves out the frequencies of short texts"]}
    row = {"case": "a", "model_type": "llama", "facts": facts_of(LLAMA), "tested": ["stretched RoPE"], "runs": [run]}
    short = {**row, "case": "b", "short_text": True, "runs": [wrong]}
    for rows in ([row, short], [short, row]):
        monkeypatch.setattr(serving, "results", lambda rows=rows: {"rows": rows})
        assert serving.sentences(LLAMA) == [
            "an engine 1: 24 of 24 greedy tokens as transformers gives them, stretched RoPE computed; not so on texts "
            "of the original length and shorter (it leaves out the frequencies of short texts)"
        ]
        assert serving.engines(LLAMA)["right"] == ["an engine"]
    monkeypatch.setattr(serving, "results", lambda: {"rows": [row, {**short, "runs": [run]}]})
    assert "not so" not in serving.sentences(LLAMA)[0]


def test_a_converted_model_says_what_serves_it(tmp_path: Path) -> None:
    tiny.save_tiny("llama-mha", tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out", num_key_value_heads=2)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    lines = serving.sentences(config)
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(f"- {plain(line)}" in card for line in lines)
    assert "llama.cpp" in card


def test_the_record_that_ships() -> None:
    rows = serving.results()["rows"]
    assert len({row["case"] for row in rows}) == len(rows) > 30
    for row in rows:
        for run in row["runs"]:
            assert run["outcome"] in (SAME, DIFFERENT, REFUSED)
            assert (run["outcome"] == SAME) <= (run["tokens"] == run["of"] == 24)
            assert run["version"]
    assert "/tmp" not in json.dumps(rows)
    assert outcomes(LLAMA)


@pytest.mark.parametrize(
    ("name", "overrides", "asked", "host", "wrong", "right"),
    [
        ("opt", {}, {"num_key_value_heads": 1}, "gpt_bigcode", "llama.cpp", "vLLM"),
        ("gpt_neox-serial", {"hidden_act": "gelu"}, {"num_key_value_heads": 2}, "nemotron", "llama.cpp", "vLLM"),
        ("llama-mha", {}, {"num_key_value_heads": 2}, "llama", None, "llama.cpp"),
    ],
)
def test_every_description_names_the_engines(
    name: str, overrides: dict, asked: dict, host: str, wrong: str | None, right: str, tmp_path: Path
) -> None:
    """Plan, summary, manifest, card and verify: llama.cpp loses the ReLU of OPT and the GELU of NeoX in their hosts."""
    source, out = tiny.save_tiny(name, tmp_path / "m", **overrides), tmp_path / "out"
    told = convert(source, out, **asked).as_json()["engines"]
    assert json.loads((out / "config.json").read_text())["model_type"] == host
    assert told == json.loads((out / "rehead.json").read_text())["engines"]
    assert told["wrong"] == ([wrong] if wrong else [])
    assert right in told["right"]
    card = (out / "README.md").read_text()
    flags = [word for key, value in asked.items() for word in ("--kv-heads", str(value))]
    said = [CliRunner().invoke(cli, line).output for line in (["plan", str(source), *flags], ["verify", str(out)])]
    for text in said:
        assert right in text.split("engines")[1]
        assert ("do not use" in text) == bool(wrong)
    assert ("computes something else: do not use it" in card) == bool(wrong)
