"""The referees' benchmark, small: its loops are the referees of these tests' own, and all agree."""

from __future__ import annotations

import json

import pytest

from rehead.cli import main


def test_all_referees_agree(original, text, capsys):
    pytest.importorskip("lm_eval")
    words = ["--model", str(original), "--data", str(text), "--tokens", "1000", "--window", "64", "--stride", "16"]
    with pytest.raises(SystemExit) as stop:
        main(["bench", "perplexity", *words, "--device", "cpu", "--json"])
    out, err = capsys.readouterr()
    assert (stop.value.code, err) == (0, "")
    found = json.loads(out)
    assert [row["convention"] for row in found["rows"]] == ["disjoint", "strided", "rolling"]
    assert len({round(row["ours"], 3) for row in found["rows"]}) == 3
    assert all(row["difference"] < 1e-5 for row in found["rows"])
    assert found["kl_to_itself_max"] == 0
