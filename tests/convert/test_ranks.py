"""Processes that share the calibration text compute what one computes alone, end together, and resume together."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM
from two_ranks import torchrun

from rehead.convert import convert
from rehead.healing import run as whole_run
from rehead.healing import sight
from rehead.models.ranks import Ranks

#: 40 and 19 sequences; one of 128 tokens, which the second process has no part in, and 5 of 32.
TEXTS = {"some": (3800, (64, 32)), "uneven": (300, (128, 32))}
FORMS = {
    "svd": {"num_key_value_heads": 1, "method": "svd"},
    "refit": {"num_key_value_heads": 1, "method": "svd", "refit": True},
    "fit": {"num_key_value_heads": 1, "method": "svd", "refit": True, "fit": 30},
    "latent": {"latent": 24, "rope_dims": 8, "refit": True, "fit": 30},
    # Which pairs turn is for the text to say, to the main process.
    "kv_cache": {"kv_cache": "50%", "calibration_length": 128, "calibration_tokens": 2048},
}
CASES = [(text, form) for text in TEXTS for form in FORMS if (text, form) != ("uneven", "kv_cache")]
#: Several batches, of which attention is observed on some.
SMALL = """
from rehead.healing import run, sight
run._BATCH_TOKENS["cpu"], sight._ATTENTION_TOKENS["cpu"] = 224, 16
"""
_WORKER = (
    "import json, sys\n"
    + SMALL
    + """
from rehead.convert import convert
from rehead import cli
for source, out, options in json.loads(sys.argv[1]):
    done = convert(source, out, device="cpu", **options)
cli._leave(0)
"""
)
_COMMAND = (
    SMALL
    + """
import os, signal, sys
from rehead import cli
from rehead.errors import UnsupportedError
from rehead.healing.layer import LayerRecovery

def change(self, layer, *args, before=LayerRecovery.change):
    if layer == 1 and sys.argv[1] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if layer == 1 and sys.argv[1] == os.environ["RANK"]:
        raise UnsupportedError("layer 1: is not to be had; leave it")
    return before(self, layer, *args)

LayerRecovery.change = change
cli.main(sys.argv[2:])
"""
)


def asked(text: str, form: str) -> dict:
    tokens, lengths = TEXTS[text]
    return {"calibration": ["random"], "calibration_tokens": tokens, "calibration_length": lengths} | FORMS[form]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return tiny.save_tiny("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def shared(source: Path, tmp_path_factory) -> Path:
    """A folder of what two processes make of every text in every form: one launch, since most of it is imports."""
    folder = tmp_path_factory.mktemp("shared")
    every = [(str(source), f"{folder}/{text}-{form}", asked(text, form)) for text, form in CASES]
    (folder / "worker.py").write_text(_WORKER)
    done = torchrun(str(folder / "worker.py"), json.dumps(every))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def manifest(folder: Path) -> dict:
    return json.loads((folder / "rehead.json").read_text())


@pytest.mark.parametrize(("text", "form"), CASES)
def test_two_processes_make_what_one_makes(source, shared, tmp_path, monkeypatch, text: str, form: str) -> None:
    monkeypatch.setitem(whole_run._BATCH_TOKENS, "cpu", 224)
    monkeypatch.setitem(sight._ATTENTION_TOKENS, "cpu", 16)
    convert(source, tmp_path / "one", device="cpu", **asked(text, form))
    one, two = manifest(tmp_path / "one"), manifest(shared / f"{text}-{form}")
    assert two["calibration"].pop("processes") == 2
    assert one["calibration"].keys() == two["calibration"].keys()
    assert two["calibration"]["drift"] == pytest.approx(one["calibration"]["drift"], abs=2e-4)
    close = {"abs": 2e-3, "rel": 1e-2} if "fit" in FORMS[form] else {"abs": 1e-4, "rel": 1e-4}
    for layer, facts in one["layers"].items():
        assert facts.keys() == two["layers"][layer].keys()
        for name, value in facts.items():
            assert two["layers"][layer][name] == (pytest.approx(value, **close) if name != "groups" else value), name
    # Weights may differ by the sign of a basis: what the models compute may not.
    ids = torch.arange(3 * 48).view(3, 48) * 7 % tiny.VOCAB
    logits, others = (_logits(folder, ids) for folder in (tmp_path / "one", shared / f"{text}-{form}"))
    gap = float((logits - others).abs().max() / logits.abs().max())
    assert gap < (1e-4 if form in ("svd", "kv_cache") else 1e-2)


def _logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits


def command(tmp_path: Path, fault: str, source: Path, out: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "command.py").write_text(_COMMAND)
    asked = ["convert", str(source), str(out), "--kv-heads", "1", "--method", "svd", "--refit", "--device", "cpu"]
    asked += ["--calibration", "random", "--calibration-tokens", "3800", "--calibration-length", "64,32", *flags]
    return torchrun(str(tmp_path / "command.py"), fault, *asked)


@pytest.mark.parametrize("fault", ["0", "1"])
def test_an_error_in_one_process_ends_both_and_is_said_once(source: Path, tmp_path: Path, fault: str) -> None:
    done = command(tmp_path, fault, source, tmp_path / "out")
    assert done.returncode != 0
    said = re.findall(r"^(?:\[\w+\]:)?error: .*", done.stderr, re.MULTILINE)
    assert said == ["error: layer 1: is not to be had; leave it"], done.stderr[-3000:]
    assert "exitcode  : 3" in done.stderr
    assert done.stderr.count("Traceback (most recent call last)") <= 1  # the launcher's own
    assert not (tmp_path / "out").exists()


def test_both_killed_and_resumed_end_with_the_same_bytes(source: Path, shared: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert command(tmp_path, "kill", source, out, "--json").returncode != 0
    assert not out.exists()
    assert list(tmp_path.rglob("layer-00000.safetensors"))
    again = command(tmp_path, "none", source, out, "--json", "--resume")
    assert again.returncode == 0, again.stderr[-3000:]
    assert json.loads(again.stdout)["out"] == str(out)  # by one of them
    whole = shared / "some-refit"
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert manifest(out)["layers"] == manifest(whole)["layers"]


def test_a_mistake_before_the_processes_join_is_said_once_and_a_budget_is_refused(source: Path, tmp_path: Path) -> None:
    done = torchrun(
        "-m", "rehead.cli", "convert", str(source), str(tmp_path / "out"), "--kl", "0.05", "--device", "cpu"
    )
    assert done.returncode != 0
    assert done.stderr.count("error: a budget") == 1
    assert "exitcode  : 2" in done.stderr


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_shares_are_apart_and_complete(world: int) -> None:
    every = [Ranks(rank, world, torch.device("cpu")) for rank in range(world)]
    rows = torch.randperm(17, generator=torch.Generator().manual_seed(0))
    owned = torch.cat([ranks.own(rows) * world + ranks.rank for ranks in every])
    assert sorted(owned.tolist()) == list(range(17))
    for ranks in every:
        assert torch.equal(rows[ranks.places(rows)] // world, ranks.own(rows))
        assert [ranks.below(row) for row in range(18)] == [len(range(ranks.rank, row, world)) for row in range(18)]
