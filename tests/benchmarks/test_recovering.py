"""What recovering a model takes is printed and written."""

from __future__ import annotations

import json

import pytest

from rehead.benchmarks import recovering
from rehead.errors import UsageError


def test_both_forms_are_converted_and_told(tmp_path, capsys) -> None:
    out = tmp_path / "rows.json"
    small = ["--shape", "tiny", "--layers", "2", "--fit", "2", "--calibration-tokens", "1024", "--device", "cpu"]
    recovering.main([*small, "--json", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert [row["form"] for row in rows] == ["svd", "latent"]
    assert all(row["seconds"] > 0 and row["host"] > 0 and row["layers"] == 2 for row in rows)
    assert "latent" in capsys.readouterr().out
    with pytest.raises(UsageError, match="no GPU"):
        recovering.main([*small, "--device-memory", "1GB"])
    with pytest.raises(UsageError, match="huge"):
        recovering.main(["--shape", "huge"])
