"""The commands and the coverage run behind one of them."""

import json

import pytest

from rehead.benchmarks import coverage
from rehead.cli import main


def run(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        main(list(argv))
    out = capsys.readouterr()
    return stop.value.code, out.out, out.err


def test_patches_lists(capsys):
    code, out, _ = run(capsys, "patches")
    assert code == 0
    assert "tiled: exact tiled attention" in out
    assert "options: layers, window, deterministic" in out
    assert "bloom.BloomAttention" in out
    code, out, _ = run(capsys, "patches", "--json")
    facts = json.loads(out)
    assert facts["attn_implementation"] == "rehead_tiled"
    assert {"parallel", "serial", "tiled"} <= {patch["name"] for patch in facts["patches"]}


def test_coverage_of_a_few_types(capsys):
    types = ["--type", "llama", "--type", "bloom", "--type", "xlnet", "--type", "mamba"]
    code, out, _ = run(capsys, "patches", "--coverage", *types, "--workers", "1", "--json", "--quiet")
    facts = json.loads(out)
    assert code == 0
    assert facts["counts"] == {"proved": 2, "refused": 2, "failed": 0, "wrong": 0, "not built": 0}
    by_type = {entry["model_type"]: entry for entry in facts["types"]}
    assert by_type["llama"]["by_name"] == "same"
    assert by_type["bloom"]["by_name"] == "raises"
    assert "no adapter" in by_type["xlnet"]["reason"]
    assert by_type["llama"]["difference"] < 1e-4


@pytest.mark.parametrize("model_type", ["deepseek_v32", "jamba", "doge", "gpt_bigcode", "musicgen"])
def test_coverage_of_unusual_types(model_type):
    outcome = coverage.try_type(model_type)
    if outcome.status == coverage.UNBUILT:
        pytest.skip(outcome.reason)
    assert outcome.status == coverage.PROVED, outcome.reason


@pytest.mark.parametrize("off", [0.01, float("nan")])
def test_coverage_sees_what_a_proof_does_not(monkeypatch, off):
    """A patch that is right in one forward pass and wrong with a cache ends as wrong, and the command fails."""
    real = coverage._decode
    calls = []

    def drift(model, ids):
        calls.append(1)
        return real(model, ids) + (off if len(calls) == 1 else 0.0)

    monkeypatch.setattr(coverage, "_decode", drift)
    outcome = coverage.try_type("llama")
    assert outcome.status == coverage.WRONG
    assert "cache" in outcome.reason


def test_a_wrong_type_fails_the_command(capsys, monkeypatch):
    monkeypatch.setattr(coverage, "run", lambda types, **_: [coverage.Outcome("llama", coverage.WRONG, "drifts")])
    code, _, err = run(capsys, "patches", "--coverage", "--type", "llama", "--quiet")
    assert code == 4
    assert err.startswith("error: llama")


def test_a_process_that_hangs_costs_one_type(monkeypatch):
    outcomes = coverage.run(["llama", "mamba"], workers=1, seconds=-30.0)
    assert [o.status for o in outcomes] == [coverage.UNBUILT] * 2
    assert "longer than" in outcomes[0].reason


@pytest.mark.parametrize(
    ("argv", "code", "word"),
    [
        (("patches", "--coverage", "--type", "lama"), 2, "did you mean 'llama'"),
        (("patches", "--type", "llama"), 2, "--coverage"),
        (("bench", "atention"), 2, "did you mean 'attention'"),
    ],
)
def test_bad_input(capsys, argv, code, word):
    got, _, err = run(capsys, *argv)
    assert got == code
    assert word in err
    assert len(err.strip().splitlines()) == 1


def test_bench_lists(capsys):
    code, out, _ = run(capsys, "bench")
    assert code == 0
    for name in ("attention", "decode", "cpu", "end-to-end"):
        assert name in out


@pytest.mark.slow
def test_coverage_of_every_type():
    counts = coverage.summary(coverage.run(workers=2))
    assert counts[coverage.PROVED] >= 150
    assert counts[coverage.WRONG] == counts[coverage.FAILED] == 0
