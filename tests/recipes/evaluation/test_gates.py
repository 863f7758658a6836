"""Gates: of several texts the worst counts, a limit that is met passes, and what is not measured is refused early."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from rehead.errors import QualityError, UsageError
from rehead.recipes.evaluation.gates import check_gates, enforce, judge, missing
from rehead.recipes.evaluation.options import EvaluateOptions


def found(**sections) -> SimpleNamespace:
    rows = {name: [SimpleNamespace(**row) for row in rows] for name, rows in sections.items()}
    return SimpleNamespace(**{"divergence": [], "perplexity": [], "needle": [], "damage": [], "recall": [], **rows})


TWO_TEXTS = found(
    divergence=[
        {"who": "model", "mean": 0.1, "top1_agreement": 0.9},
        {"who": "model", "mean": 0.3, "top1_agreement": 0.7},
        {"who": "control", "mean": 9.0, "top1_agreement": 0.0},
    ],
    perplexity=[
        {"who": "model", "value": 20.0, "ratio": SimpleNamespace(value=1.2), "bits_per_byte": None},
        {"who": "model", "value": 30.0, "ratio": SimpleNamespace(value=1.1), "bits_per_byte": 0.9},
        {"who": "baseline", "value": 90.0, "ratio": None, "bits_per_byte": 5.0},
    ],
    damage=[{"kl": 0.01}, {"kl": 0.4}],
    recall=[
        {"who": "baseline", "kind": "copy", "distance": 64, "top1": 0.8},
        {"who": "model", "kind": "copy", "distance": 64, "top1": 0.6},
        {"who": "model", "kind": "pairs", "distance": 64, "top1": 0.3},
    ],
    needle=[{"who": "model", "hits": 3, "trials": 4}, {"who": "baseline", "hits": 0, "trials": 4}],
)


@pytest.mark.parametrize(
    ("above", "below", "value", "passed"),
    [
        ({"kl": 0.3}, {}, 0.3, True),
        ({"KL": 0.29}, {}, 0.3, False),
        ({}, {"kl": 0.1}, 0.1, True),
        ({}, {"kl": 0.11}, 0.1, False),
        ({}, {"top1-agreement": 0.7}, 0.7, True),
        ({}, {"top1-agreement": 0.71}, 0.7, False),
        ({"top1-agreement": 0.8}, {}, 0.9, False),
        ({"perplexity": 30.0}, {}, 30.0, True),
        ({"perplexity-ratio": 1.15}, {}, 1.2, False),
        ({"bits-per-byte": 1.0}, {}, 0.9, True),
        ({"damage": 0.3}, {}, 0.4, False),
        ({}, {"needle": 0.75}, 0.75, True),
        ({}, {"needle": 0.8}, 0.75, False),
        ({}, {"copy": 0.7}, pytest.approx(0.75), True),
        ({}, {"pairs": 0.5}, 0.3, False),
    ],
)
def test_the_worst_of_several_texts_counts(above, below, value, passed) -> None:
    (gate,) = judge(TWO_TEXTS, above, below)
    assert (gate.value, gate.passed, gate.direction) == (value, passed, "above" if above else "below")
    if passed:
        enforce(SimpleNamespace(gates=[gate]))
        return
    with pytest.raises(
        QualityError, match=f"quality gate: {gate.name} .* is {gate.direction} .*; see out.json"
    ) as error:
        enforce(SimpleNamespace(gates=[gate]), "out.json")
    assert error.value.exit_code == 5


def test_what_was_not_measured_is_no_pass() -> None:
    with pytest.raises(UsageError, match="--fail-above damage: was not measured; it needs --baseline and --damage"):
        judge(found(), {"damage": 1.0}, {})


@pytest.mark.parametrize(
    ("name", "measured", "needs"),
    [
        ("kl", {"data"}, "--baseline"),
        ("kl", {"baseline"}, "--data"),
        ("perplexity", set(), "--data"),
        ("damage", {"baseline", "data"}, "--damage"),
        ("needle", {"baseline", "data"}, "--needle"),
    ],
)
def test_a_gate_without_its_figure_is_refused_before_the_measuring(name, measured, needs) -> None:
    for above, below, flag in (({name: 1.0}, {}, "above"), ({}, {name: 1.0}, "below")):
        with pytest.raises(UsageError, match=f"--fail-{flag} {name}: needs {needs}; give it or drop the gate"):
            missing(above, below, measured)
        missing(above, below, measured | {"baseline", "data", "damage", "needle", "recall"})


@pytest.mark.parametrize("flag", ["kl", "kl=", "kl=x", "kl=nan", "=0.5x"])
def test_a_gate_is_a_name_and_a_number(flag: str) -> None:
    with pytest.raises(UsageError, match="is not NAME=LIMIT"):
        EvaluateOptions.parse({"fail_above": (flag,)})
    assert EvaluateOptions.parse({"fail_above": (" kl = 0.5", "needle=1")}).fail_above == {"kl": 0.5, "needle": 1.0}
    with pytest.raises(UsageError, match="did you mean 'kl'"):
        check_gates({}, {"kll": 1.0})


@pytest.mark.parametrize("order", [1, -1])
def test_of_a_limit_given_twice_the_stricter_counts(order: int) -> None:
    chosen = EvaluateOptions.parse(
        {"fail_above": ["kl=0.5", "kl=0.1"][::order], "fail_below": ["needle=0.9", "needle=0.2"][::order]}
    )
    assert chosen.fail_above == {"kl": 0.1}
    assert chosen.fail_below == {"needle": 0.9}
