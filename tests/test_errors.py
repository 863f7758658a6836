"""What errors of other libraries become in a message of one line."""

import pytest

from rehead.errors import first_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError("\n\n  second  \nthird"), "second"),
        (AssertionError(), "AssertionError"),
        (OSError(" \n "), "OSError"),
        (ValueError("x" * 500), "x" * 200),
    ],
)
def test_first_line(error: Exception, line: str) -> None:
    assert first_line(error) == line
