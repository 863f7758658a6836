"""What models write goes into a page as text, whatever it is."""

from __future__ import annotations

import re

import made

from rehead.recipes.report import write_report

EVIL = '<script>alert("1")</script>\n# heading |`*_](http://x)\x1b[2J\u202e'


def test_what_models_write_is_text(tmp_path) -> None:
    found = made.evaluation(0.3, 1, full=True)
    for sample in found.samples:
        sample.prompt, sample.truth, sample.data = EVIL, EVIL, EVIL
        for one in sample.continuations:
            one.text, one.same_text = EVIL + EVIL, EVIL
    paths = write_report(tmp_path, [("m", found)])
    page, text = paths.html.read_text(encoding="utf-8"), paths.markdown.read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "<script" not in text.replace("\\<", "")
    assert not re.search(r"(?<!\\)\]\(", text)
    assert not re.search(r"^# heading", text, re.M)
    for written in (page, text):
        assert "\x1b" not in written
        assert "\u202e" not in written
