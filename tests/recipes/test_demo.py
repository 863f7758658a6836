"""The demo: its recipe, its command, and (slow) all of it."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rehead.convert.commands import convert_command
from rehead.data.builtin import TEXTS, text_path
from rehead.recipes.curve.commands import curve_command
from rehead.recipes.pipeline.load import library_names
from rehead.recipes.pipeline.named_models import embedded_model
from rehead.recipes.pipeline.run import plan_recipe

ROOT = Path(__file__).parent.parent.parent


def test_the_demo_needs_nothing_but_the_package() -> None:
    assert {"demo", "demo-smollm2"} <= set(library_names())
    package = Path(sys.modules["rehead"].__file__).parent
    planned = plan_recipe("demo")
    for stage in (stage for plan in planned.cells for stage in plan.stages.values()):
        for place in stage.models.values():
            assert place.stage is not None or Path(place.model).is_relative_to(package)
        for text in (text for texts in stage.data.values() for text in texts):
            path = Path(text.partition("#")[0])
            assert path.is_relative_to(package)
            assert path.is_file()
    assert all(Path(text_path(name)).is_file() for name in TEXTS)


def test_the_demo_does_what_it_says() -> None:
    planned = plan_recipe("demo")
    assert [plan.cell.label for plan in planned.cells] == [
        "2 KV heads, mean", "2 KV heads, svd + refit + fit", "1 KV head, mean", "1 KV head, svd + refit + fit",
    ]  # fmt: skip
    for plan in planned.cells:
        assert [stage for _, stage, _ in plan.evaluations] == ["converted", "uptrained"]
        assert any(stage.kind == "control" for stage in plan.stages.values())
    best = [stage.options for stage in planned.cells[1].stages.values() if stage.kind == "convert"]
    assert best[0]["method"] == "svd"
    assert best[0]["refit"]
    assert best[0]["fit"] > 0


def test_make_demo_shows_the_curve_and_the_one_command_first() -> None:
    text = (ROOT / "Makefile").read_text()
    quick = re.search(r"^QUICK := (.*)$", text, re.M).group(1)
    rule = re.search(r"^demo:.*?(?=^\S*:)", text, re.M | re.S).group(0)
    lines = re.findall(r"-m rehead (\w+) (.*)", rule)
    assert [name for name, _ in lines] == ["curve", "convert", "run"]
    for command, (_, words) in zip((curve_command, convert_command), lines):
        asked = command.make_context(command.name, shlex.split(words.replace("$(QUICK)", quick)))
        assert asked.params["model"] == "embedded"
        assert asked.params["tokens"] == "1024"


def test_the_embedded_model_is_small_and_whole() -> None:
    folder = embedded_model()
    config = json.loads((folder / "config.json").read_text())
    assert config["num_attention_heads"] == config["num_key_value_heads"] == 8
    assert sum(path.stat().st_size for path in folder.iterdir()) < 12.5e6
    assert (folder / "tokenizer.json").is_file()


@pytest.mark.slow
def test_the_demo_runs(tmp_path) -> None:
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "rehead", "run", "demo", "--out", tmp_path / "out"],
        env={**os.environ, "HF_HUB_OFFLINE": "1"}, cwd=tmp_path, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith("A KV cache, at 1,024 tokens, 4 times smaller")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    kl = {entry["label"]: entry["texts"][0]["kl"] for entry in report["entries"]}
    assert len(kl) == 8
    for heads in ("2 KV heads", "1 KV head"):
        best, mean = f"{heads}, svd + refit + fit", f"{heads}, mean"
        assert kl[f"{best}, converted"] < kl[f"{mean}, converted"]
        assert kl[f"{best}, uptrained"] < kl[f"{mean}, uptrained"]
        assert kl[f"{mean}, uptrained"] < kl[f"{mean}, converted"]
    assert time.monotonic() - start < 1200
