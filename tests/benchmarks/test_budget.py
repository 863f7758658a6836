"""Predictions of a budget order what is measured."""

import re

from rehead.benchmarks import budget
from tests.helpers.far_layer import CONTEXT, planted_model


def test_ranks_of_values_that_rise_together():
    assert budget.rank_correlation([1.0, 5.0, 2.0], [0.1, 100.0, 0.2]) == 1
    assert budget.rank_correlation([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == -1


def test_random_mixes_come_in_the_order_that_was_predicted(tmp_path, capsys):
    budget.main([
        str(planted_model(tmp_path / "model")), "--calibration", "random", "--calibration-tokens", "2048", "--tokens",
        "1024", "--context", str(CONTEXT), "--device", "cpu",
    ])  # fmt: skip
    text = capsys.readouterr().out
    assert len(re.findall(r"^\S+%", text, re.M)) == 24
    assert "100.0%" not in text
    assert float(text.split()[-1]) >= 0.9
