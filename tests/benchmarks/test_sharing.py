"""The benchmark of a shared GPU: processes that agree are right, and a wrong result is counted as one."""

from __future__ import annotations

import json
import time

import pytest
import torch

from rehead.benchmarks import sharing
from rehead.errors import UnsupportedError

CPU = torch.device("cpu")


def test_processes_that_take_turns_agree(tmp_path, capsys) -> None:
    out = tmp_path / "rows.json"
    sharing.main(["--device", "cpu", "--processes", "2", "--seconds", "0.2", "--length", "40", "--compile", "0",
                  "--json", str(out)])  # fmt: skip
    rows = json.loads(out.read_text())["rows"]
    assert [row["kernel"] for row in rows] == ["rehead", "math"]
    assert all((row["wrong"], row["not_finite"]) == (0, 0) for row in rows)
    assert all(row["worst"] < 1e-4 for row in rows)
    assert "2 processes" in capsys.readouterr().out


@pytest.mark.parametrize(("value", "wrong", "not_finite"), [(1e-3, 0, 0), (7.0, 1, 0), (float("nan"), 1, 1)])
def test_a_wrong_result_is_counted(value, wrong, not_finite, monkeypatch) -> None:
    inputs = sharing.draw(20, CPU)
    want = sharing.kernels(20, CPU)["math"](*inputs)
    until = time.time() + 60

    def compute(*inputs):
        monkeypatch.setattr(sharing.time, "time", lambda: until)  # the last one
        out = want.clone()
        out[1, 2, 3, 4] += value
        return out

    row = sharing.count(compute, inputs, want, until)
    assert (row["calls"], row["wrong"], row["not_finite"]) == (1, wrong, not_finite)


def test_what_no_program_wrote_is_wrong() -> None:
    inputs = sharing.draw(512, CPU)
    want = sharing.kernels(512, CPU)["math"](*inputs)
    row = sharing.count(lambda *inputs: torch.empty_like(want), inputs, want, time.time() + 0.05)
    assert row["wrong"] == row["calls"] > 0


def test_a_process_that_fails_is_one_line(monkeypatch) -> None:
    monkeypatch.setattr(sharing.sys, "executable", "false")
    with pytest.raises(UnsupportedError, match=r"^[^\n]+$"):
        sharing.main(["--device", "cpu", "--processes", "1", "--seconds", "0.1", "--length", "8", "--compile", "0"])
