"""YAML from strangers: plain values of a bounded size, or one error."""

from __future__ import annotations

import time

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rehead.checkpoints.plain_yaml import read_yaml

BOMB = "a0: &a0 [x, x, x, x]\n" + "".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(30))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("&m [*m]", "refers to itself"),
        ("a: &m {b: *m}", "refers to itself"),
        (BOMB, "aliases are expanded"),
        ("a: " + "9" * 5000, "a number of 5000"),
        ("a: !!int x", "not a number"),
        ("[" * 3000, "nested more than"),
        ("a: 1\na: 2", "appears twice"),
        ("1: a", "is not text"),
        ("a: !!python/object:os.system x", "constructor"),
        ("a: !!timestamp 2020-99-99", "constructor"),
        ("a: \x1b", "special characters"),
    ],
)
def test_what_is_no_plain_value_is_one_error(text: str, problem: str) -> None:
    started = time.monotonic()
    with pytest.raises(yaml.YAMLError, match=problem):
        read_yaml(text)
    assert time.monotonic() - started < 10


def test_values_are_what_they_look_like() -> None:
    text = "a: 2024-13-45\nb: yes\nc: true\nd: 1e-4\ne: 010\nf: 1:30\ng: -.inf\nh: 1_000\n"
    text += "i: ~\nj: &x [1]\nk: *x\nl: '3'\nm: 1."
    assert read_yaml(text) == {
        "a": "2024-13-45", "b": "yes", "c": True, "d": 1e-4, "e": 10, "f": "1:30", "g": float("-inf"), "h": 1000,
        "i": None, "j": [1], "k": [1], "l": "3", "m": 1.0,
    }  # fmt: skip
    assert read_yaml("") is None


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.text(st.sampled_from("ab:-[]{}&*!<>|'\"\n 019.,?#%@~e_"), max_size=40))
def test_anything_is_a_plain_value_or_an_error(text: str) -> None:
    try:
        value = read_yaml(text)
    except yaml.YAMLError:
        return
    assert isinstance(value, (type(None), str, int, float, list, dict))
