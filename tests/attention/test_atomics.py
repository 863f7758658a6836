"""No kernel reads an atomic's result by way of Triton: on a GPU that processes share, some programs read another."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import rehead
from rehead.attention import kernels

SOURCES = sorted(Path(kernels.__file__).parent.glob("*.py"))


def results_read(source: str) -> list[int]:
    """Lines on which the result of a call of ``atomic_...`` is used."""
    tree = ast.parse(source)
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr.startswith("atomic_")
        and id(node) not in alone
    ]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_no_result_of_an_atomic_is_read(path):
    assert results_read(path.read_text(encoding="utf-8")) == []


def test_all_kernels_stand_in_that_folder():
    root = Path(rehead.__file__).parent
    rooms = [room for room in root.iterdir() if room.is_dir() and room.name[0] != "." and room.name != "tests"]
    calls = {path for room in rooms for path in room.rglob("*.py") if ".atomic_" in path.read_text(encoding="utf-8")}
    assert calls
    assert calls <= set(SOURCES)


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("tl.atomic_add(p, 1)", []),
        ("a = tl.atomic_add(p, 1)", [1]),
        ("pass\nif gl.atomic_cas(p, 0, 1) == 0:\n    pass", [2]),
        ("tl.store(p, tl.atomic_max(q, 1))", [1]),
    ],
)
def test_reading_is_seen(source, lines):
    assert results_read(source) == lines
