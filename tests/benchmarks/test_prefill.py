"""The benchmark of long prompts: every method runs, and the patches compute something else than plain attention."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rehead.benchmarks import prefill
from rehead.errors import UsageError
from rehead.patches import patch_model


def test_a_row_for_each_method(tmp_path: Path, capsys) -> None:
    out = tmp_path / "rows.json"
    prefill.main(["--shapes", "tiny", "--lengths", "8300", "--device", "cpu", "--json", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert [row["method"] for row in rows] == list(prefill.METHODS)
    assert all(row["seconds"] > 0 and row["tokens"] == 8300 for row in rows)
    printed = capsys.readouterr().out
    assert all(method in printed for method in prefill.METHODS)
    with pytest.raises(UsageError, match="unknown --shapes 'huge'"):
        prefill.main(["--shapes", "huge"])


@torch.no_grad()
def test_prompts_beyond_the_trained_length_are_what_is_timed(monkeypatch) -> None:
    monkeypatch.setattr(prefill, "TRAINED", 64)
    model, tokens = prefill.random_model("tiny", torch.device("cpu")), torch.arange(8, 58).repeat(3)[None]
    plain = model(tokens).logits
    for method in prefill.METHODS[1:]:
        with patch_model(model, method, **({"group": 8} if method == "self_extend" else {})):
            patched = model(tokens).logits
        assert not torch.equal(plain[:, 100:], patched[:, 100:])
