"""What ``--loss`` means, and the registry behind it."""

from __future__ import annotations

import pytest

from rehead.errors import UsageError
from rehead.recipes.training.losses import TERMS, Objective, loss, parse_objective, registry


def test_every_shipped_loss_is_registered_under_its_own_name() -> None:
    for name in registry.TERM_MODULES:
        term = TERMS.get(name)
        assert term.name == name
        assert term.summary
        assert name in TERMS.names()


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("kd", ((1.0, "kd"),)),
        ("kd+0.1*ce", ((1.0, "kd"), (0.1, "ce"))),
        (" 2*kd + .5 * js ", ((2.0, "kd"), (0.5, "js"))),
        ("1e-2*ce", ((0.01, "ce"),)),
    ],
)
def test_a_sum_is_read_and_written_back(text, terms) -> None:
    objective = parse_objective(text)
    assert objective.terms == terms
    assert parse_objective(str(objective)) == objective


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ("dk", {}, "did you mean 'kd'"),
        ("kd+", {}, "cannot read ''"),
        ("-1*kd", {}, "cannot read"),
        ("kd+kd", {}, "comes twice"),
        ("0*kd", {}, "leave kd out"),
        ("kd", {"temperature": 0.0}, "must be positive"),
        ("kd", {"temperature": float("nan")}, "must be positive"),
        ("js", {"mix": 1.0}, "between 0 and 1"),
    ],
)
def test_what_cannot_be_meant_is_one_line(text, options, words) -> None:
    with pytest.raises(UsageError, match=r"^[^\n]+$") as raised:
        parse_objective(text, **options)
    assert words in str(raised.value)


def test_only_cross_entropy_does_without_a_teacher() -> None:
    assert not parse_objective("ce").needs_teacher
    assert all(parse_objective(name).needs_teacher for name in registry.TERM_MODULES if name != "ce")
    assert Objective().needs_teacher


def test_a_name_is_registered_once_and_can_be_written(monkeypatch) -> None:
    monkeypatch.setattr(registry.TERMS, "_known", dict(registry.TERMS._known))
    TERMS.get("kd")
    with pytest.raises(ValueError, match="registered already"):
        loss("kd", "again")(lambda batch: batch.student.sum(-1))
    with pytest.raises(ValueError, match="cannot name a loss"):
        loss("k+d", "no name")(lambda batch: batch.student.sum(-1))
    loss("zero", "nothing", needs_teacher=False)(lambda batch: batch.student.sum(-1) * 0)
    assert parse_objective("kd+2*zero").weighted()[1][1].name == "zero"
