"""What a downloaded file can do: nothing. No string of one is obeyed by a terminal or a page, and none breaks a run."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from rehead.checkpoints.markdown import code, code_block, front_matter, plain
from rehead.cli import main
from rehead.convert import convert

EVIL = "\x1b[2J\x1b]0;owned\x07\u202e\x9b31m\r\n"
BAD = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069]")
CARDS = [
    "---\ntags: [[a], b]\nlicense: {a: 1}\n---\n", "---\ntags: 2024-13-45\nlicense: 2020-01-01\n---\n",
    "---\ntags: " + "[" * 3000 + "\n---\n", "---\n&m [*m]\n---\n", "---\nlicense: " + "9" * 5000 + "\n---\n",
    "---\ntags: &a [*a]\n---\n", "---\n- a\n---\n", "---\nlanguage: !!binary x\n---\n", "---\ntags: [\x1b]\n---\n",
    "---\nlicense: '\\e[31m'\n---\n", '---\ntags: ["\\e[31m", ok, 3]\nbase_model: "a\\nb: c"\n---\n', "---\n",
    "---\na: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: [*b,*b,*b,*b,*b,*b,*b]\n---\n", "\x00",
]  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_tiny("llama", tmp_path_factory.mktemp("llama"))


def said(*line: object) -> str:
    """What a command prints, on both outputs; it ends in one of Rehead's codes, never in a traceback."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), pytest.raises(SystemExit):
        main(list(map(str, line)))
    return printed.getvalue()


@pytest.mark.parametrize("card", CARDS, ids=lambda card: repr(card[4:24]))
def test_a_readme_can_neither_break_a_conversion_nor_reach_the_card(card: str, llama: Path, tmp_path: Path) -> None:
    source = shutil.copytree(llama, tmp_path / "source")
    (source / "README.md").write_text(card, encoding="utf-8", errors="surrogateescape")
    started = time.monotonic()
    values = front_matter((source / "README.md").read_text(errors="replace"))
    assert time.monotonic() - started < 10
    assert all(
        isinstance(item, str) for value in values.values() for item in ([value] if isinstance(value, str) else value)
    )
    convert(source, tmp_path / "out", num_key_value_heads=2)
    text = (tmp_path / "out" / "README.md").read_text()
    assert not BAD.search(text)
    head = yaml.safe_load(text.split("---\n")[1])
    assert "rehead" in head["tags"]
    assert all(isinstance(tag, str) for tag in head["tags"])


def test_a_card_that_cannot_be_made_stops_before_the_weights(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> str:
        raise RuntimeError("no card")

    written = []
    monkeypatch.setattr("rehead.convert.execute.model_card", broken)
    monkeypatch.setattr("rehead.checkpoints.target.Target.write_weights", lambda *a, **k: written.append(1))
    with pytest.raises(RuntimeError, match="no card"):
        convert(llama, tmp_path / "out", num_key_value_heads=2)
    assert not written


@given(st.text(max_size=30))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_markdown_of_any_text_is_inert(text: str) -> None:
    assert not BAD.search(code(text) + plain(text))
    assert not re.search(r"(?<!\\)[<>\[\]`]", plain(text).replace("\\\\", ""))
    run = max(map(len, re.findall("`+", text)), default=0)
    opening = re.match("`+", code(text))
    assert opening is not None
    assert code(text).endswith("`" * (run + 1))
    fence, _, end = code_block(text)
    assert fence == end
    assert fence not in text


def everywhere(value: Any, evil: str, at: list[int]) -> Any:
    """JSON with one string, a key or a value, spoiled: the one that the count in ``at`` reaches zero at."""
    if isinstance(value, dict):
        return {everywhere(key, evil, at): everywhere(item, evil, at) for key, item in value.items()}
    if isinstance(value, list):
        return [everywhere(item, evil, at) for item in value]
    if isinstance(value, str):
        at[0] -= 1
        return value + evil if at[0] == -1 else value
    return value


def strings(value: Any) -> int:
    """How many there are to spoil."""
    at = [1 << 30]
    everywhere(value, "", at)
    return (1 << 30) - at[0]


def check(*lines: tuple[object, ...]) -> None:
    for line in lines:
        found = BAD.search(said(*line))
        assert not found, (line[0], found)


@settings(max_examples=18, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    which=st.integers(0, 10_000), file=st.sampled_from(["config", "index", "header", "tokenizer", "manifest", "recipe"])
)
def test_no_string_of_a_file_reaches_the_terminal(
    which: int, file: str, llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("evil") / f"m{EVIL[:4]}"
    shutil.copytree(llama, folder)
    out = folder.parent / "out"

    def spoil(path: Path) -> None:
        raw = json.loads(path.read_text())
        path.write_text(json.dumps(everywhere(raw, EVIL, [which % strings(raw)])))

    if file == "config":
        spoil(folder / "config.json")
    elif file == "index":
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        names = dict.fromkeys(
            load_file(folder / "model-00001-of-00001.safetensors"), "model-00001-of-00001.safetensors"
        )
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
        spoil(folder / "model.safetensors.index.json")
    elif file == "header":
        tensors = load_file(folder / "model.safetensors")
        name = sorted(tensors)[which % len(tensors)]
        tensors[name + EVIL if which % 2 else f"{EVIL}.0.x"] = tensors.pop(name) if which % 3 else torch.ones(2, 2)
        save_file(tensors, folder / "model.safetensors", {"format": "pt", "x": EVIL})
    elif file == "tokenizer":
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "X" + EVIL, "auto_map": {"A": EVIL}})
        )
        (folder / f"w{EVIL[:3]}.py").write_text("")
        check(("evaluate", folder, "--data", "built-in:heldout", "--tokens", "64"))
    elif file == "manifest":
        convert(folder, out, num_key_value_heads=2)
        spoil(out / "rehead.json")
        check(("verify", out), ("verify", out, "--json"))
        return
    else:
        raw = {"name": "r", "model": "some/model", "convert": {"num_key_value_heads": 2, "method": "mean"},
               "evaluate": {"data": "a.txt", "window": 64}, "sweep": {"convert.method": ["mean", "svd"]}}  # fmt: skip
        recipe = folder.parent / "r.yaml"
        recipe.write_text(yaml.safe_dump(everywhere(raw, EVIL, [which % strings(raw)])))
        check(("recipes", "validate", recipe), ("recipes", "show", recipe), ("run", recipe, "--dry-run"))
        return
    check(("inspect", folder), ("inspect", folder, "--json"), ("plan", folder, "--kv-heads", "2"),
          ("convert", folder, out, "--kv-heads", "2"))  # fmt: skip
    if out.is_dir():
        assert not BAD.search((out / "README.md").read_text())
        check(("verify", out, "--source", folder))
