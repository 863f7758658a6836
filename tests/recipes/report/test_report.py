"""Reports: what they say, that they need nothing from outside, and that names cannot get out of their places."""

from __future__ import annotations

import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import made
import pytest

from rehead.errors import UsageError
from rehead.models.distance import RULE
from rehead.recipes.evaluation_schema import Evaluation
from rehead.recipes.report import Entry, write_report
from rehead.recipes.report.cache_plot import CacheRow, cache_plot
from rehead.recipes.report.drawing import MOST_LINES, roomy
from rehead.recipes.report.facts import read_training, summarise
from rehead.recipes.report.html import words
from rehead.recipes.report.plots import decode_speed, draw_all
from rehead.recipes.report.tables import overview
from rehead.recipes.report.verdict import verdict
from rehead.recipes.report.wording import bytes_of, figure, heads_phrase, listed, short, times

EVIL = '<script>alert("1")</script>|`*_](http://x) & \'"\n# heading'
VOID = {"meta", "link", "br", "wbr", "hr", "img", "input", "use", "path", "rect", "line", "circle"}


class Page(HTMLParser):
    """Collects tags, attributes and text; refuses tags that are closed in the wrong order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.text.append(data)


def parsed(path: Path) -> Page:
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    assert not page.open
    return page


@pytest.fixture(scope="module")
def sweep_report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    logs = [(name, made.training_log(folder / f"{name}.jsonl", start)) for name, start in (("mean", 3.0), ("svd", 1.0))]
    return write_report(folder / "r", made.sweep(), logs, title="A sweep", notes=["Not all cells."])


def test_page_is_well_formed_and_asks_for_nothing_from_outside(sweep_report) -> None:
    text = sweep_report.html.read_text(encoding="utf-8")
    page = parsed(sweep_report.html)
    for tag, attributes in page.tags:
        assert tag not in ("script", "iframe", "object", "embed")
        assert not (tag == "link" and attributes.get("rel") != "icon")
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                assert value == "data:," or value.startswith("#"), (tag, name, value)
            assert not name.startswith("on"), name
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'(?:xlink:href="|url\()#([\w.-]+)', text))
    assert used <= set(ids)


def test_names_break_between_their_parts_and_options_do_not() -> None:
    shown = str(words("window:size=128,sinks=4 of 10,240 by rehead convert M --kv-cache 50% <b>"))
    assert "window:<wbr>size=<wbr>128,<wbr>sinks=<wbr>4 of 10,240" in shown
    assert '<span class="whole">--kv-cache</span> 50% &lt;b&gt;' in shown


def test_sizes_on_an_axis_have_room_for_their_labels() -> None:
    sizes = [186.0, 786.0, 1995.0, 2379.0, 3465.0, 5376.0, 6144.0]
    assert roomy(sizes, 6144.0) == [186.0, 786.0, 1995.0, 6144.0]
    assert roomy([1.0, 2.0, 4.0], 4.0) == [1.0, 2.0, 4.0]
    assert roomy([5.0]) == [5.0]


def test_colours_follow_the_page(sweep_report) -> None:
    text = sweep_report.html.read_text(encoding="utf-8")
    drawings = re.findall(r'<svg class="plot".*?</svg>', text, re.S)
    assert len(drawings) == 6
    for drawing in drawings:
        assert not re.findall(r"#[0-9a-fA-F]{6}\b", drawing)
        assert "font-family" not in drawing
        assert re.search(r'viewBox="0 0 [\d.]+ [\d.]+"', drawing)
        assert not re.search(r'<svg[^>]* width="', drawing)
    defined = set(re.findall(r"(--[\w]+):", text))
    assert set(re.findall(r"var\((--\w+)\)", text)) <= defined
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


def test_every_plot_has_words_and_a_legend(sweep_report) -> None:
    page = parsed(sweep_report.html)
    plots = [attributes for tag, attributes in page.tags if tag == "svg" and attributes.get("class") == "plot"]
    assert all(attributes["role"] == "img" and len(attributes["aria-label"]) > 40 for attributes in plots)
    words = " ".join(page.text)
    for title in (
        "Quality against KV size",
        "Recovery against tokens",
        "Damage by layer",
        "KL distribution",
        "Decode speed",
    ):
        assert title in words
    assert "svd, uptrained" in words


def test_verdict_opens_the_page_and_gives_the_figures(sweep_report) -> None:
    said = sweep_report.verdict
    assert said.headline.startswith("A KV cache, at 8,192 tokens, 2 times smaller at ×")
    assert [name for name, _ in said.points[:3]] == ["cache of 20 MiB", "cache of 10 MiB", "cache of 5 MiB"]
    best = summarise(next(e for e in made.sweep() if e.label == "1 KV head, svd, uptrained"))
    point = dict(said.points)["cache of 5 MiB"]
    assert point.startswith(f"svd: {best.verdict}, perplexity")
    assert figure(best.worst.perplexity) in point
    assert f"KL {figure(best.worst.kl)}" in point
    assert f"{times(best.worst.against_control)} (5 MiB)" in dict(said.points)["control"]
    assert dict(said.points)["rule"].startswith(RULE)
    assert "mean (KL" in point
    text = sweep_report.html.read_text(encoding="utf-8")
    assert text.index("2 times smaller") < text.index("Overview") < text.index("Conditions")
    assert "Not all cells." in text


def test_the_three_files_agree(sweep_report) -> None:
    table = json.loads(sweep_report.json.read_text())
    text = sweep_report.markdown.read_text(encoding="utf-8")
    assert len(table["entries"]) == 12
    assert table["verdict"]["headline"] == sweep_report.verdict.headline
    assert sweep_report.verdict.headline.replace("|", "\\|") in text.replace("\\", "")
    for entry in table["entries"]:
        again = Evaluation.model_validate(entry["evaluation"])
        summary = summarise(Entry(entry["label"], again))
        assert summary.kv_bytes == entry["kv_bytes"] == 8192 * entry["kv_bytes_per_token"]
        assert summary.context == entry["context"] == 8192
        assert figure(summary.worst.kl) in text
    assert table["trainings"][0]["kl"][0] > table["trainings"][0]["kl"][-1]


def test_the_same_input_gives_the_same_bytes(tmp_path) -> None:
    entries = made.sweep()[:3]
    first, second = (write_report(tmp_path / name, entries) for name in "ab")
    for one, other in zip(vars(first).values(), vars(second).values()):
        if isinstance(one, Path):
            assert one.read_bytes() == other.read_bytes()


def test_names_cannot_get_out_of_their_places(tmp_path) -> None:
    found = made.evaluation(0.3, 1, name=EVIL, texts=(EVIL, "b|c"), full=True, method=EVIL, control=True, tokens=1e6,
                            gates=[{"name": EVIL, "limit": 0.1, "value": 0.3, "passed": False}])  # fmt: skip
    found.notes.append(EVIL)
    log = made.training_log(tmp_path / "log.jsonl")
    paths = write_report(
        tmp_path / "r", [Entry(EVIL, found, EVIL, "uptrained")], [(EVIL, log)], title=EVIL, notes=[EVIL]
    )
    page = parsed(paths.html)
    assert "script" not in {tag for tag, _ in page.tags}
    assert '<script>alert("1")</script>' in " ".join(page.text)
    text = paths.markdown.read_text(encoding="utf-8")
    assert "<script" not in text.replace("\\<", "")
    assert not re.search(r"(?<!\\)\]\(", text)
    assert not re.search(r"^# heading", text, re.M)
    columns = [len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0 for line in text.splitlines()]
    assert sum(count > 0 for count in columns) > 20
    assert all(one == two for one, two in itertools.pairwise(columns) if one and two)
    assert json.loads(paths.json.read_text())["title"] == EVIL


def test_one_model_with_and_without_what_may_be_missing(tmp_path) -> None:
    bare = Evaluation.model_validate({
        "model": {"name": "m", "model_type": "llama", "parameters": 10, "weight_bytes": 20},
        "conditions": {"device": "cpu", "dtype": "float32", "attention": "sdpa", "versions": {}, "seed": 0},
    })  # fmt: skip
    paths = write_report(tmp_path / "bare", [("m", bare)])
    assert "was not measured" in paths.verdict.headline
    assert "<figure>" not in paths.html.read_text()
    assert parsed(paths.html).tags

    single = write_report(tmp_path / "one", [("m", made.evaluation(0.2, 1, tokens=8e6))])
    points = dict(single.verdict.points)
    assert single.verdict.headline.startswith("Uptrain more: a KV cache 8 times smaller at 8,192 tokens at ×1.22")
    assert single.verdict.headline.endswith("(8 KV heads to 1, svd + refit, uptrained on 8M tokens).")
    # No plot of one dot, and no word of a control that there is not.
    page = single.html.read_text()
    assert "against KV size" not in page
    assert "the broken line is the control" not in page
    assert "none was trained" in points["control"]
    assert "There is no control" in single.markdown.read_text()
    assert "decoding speed was not measured" in points["saves"]

    both = [Entry("a", made.evaluation(0.9, 1), "a", "converted"),
            Entry("b", made.evaluation(0.2, 1, tokens=8e6, control=True), "a", "uptrained")]  # fmt: skip
    points = dict(verdict([summarise(entry) for entry in both]).points)
    assert "the fair price is ×" in points["control"]
    assert points["start"].startswith("before uptraining: perplexity")


def test_failed_gates_are_said_and_shown(tmp_path) -> None:
    gates = [{"name": "kl", "limit": 0.1, "value": 0.2, "passed": False},
             {"name": "perplexity-ratio", "limit": 2.0, "value": 1.2, "passed": True}]  # fmt: skip
    paths = write_report(tmp_path, [("m", made.evaluation(0.2, 1, gates=gates))])
    assert "1 of 2 failed: m: kl is 0.200, the limit 0.100" in dict(paths.verdict.points)["gates"]
    assert 'class="verdict failed"' in paths.html.read_text()
    assert "FAILED" in paths.markdown.read_text()


def test_the_worst_text_speaks(tmp_path) -> None:
    summary = summarise(Entry("m", made.evaluation(0.2, 1, texts=("easy", "hard"))))
    assert summary.worst.name == "hard"
    assert "the worst of 2 texts" in dict(verdict([summary]).points)["costs"]


def test_many_models_still_make_readable_plots(tmp_path) -> None:
    many = [Entry(f"m{i}", made.evaluation(0.1 + i / 50, 1 + i % 4, full=True), f"s{i}") for i in range(30)]
    plots = draw_all([summarise(entry) for entry in many], [])
    assert all(len(plot.keys) <= MOST_LINES + 1 for plot in plots)


@pytest.mark.parametrize("kl", [17.0, 2.03, 0.3, 1e-7])
def test_ticks_of_an_axis_are_told_apart(tmp_path, kl: float) -> None:
    entries = [Entry(str(heads), made.evaluation(kl, heads), "one") for heads in (1, 2)]
    page = write_report(tmp_path, entries).html.read_text()
    drawing = page[page.index("Quality against KV size") :]
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", drawing[: drawing.index("KL to the original</text>")])
    ticks = texts[texts.index("KV cache at 8,192 tokens") + 1 :]
    assert len(ticks) >= 3
    assert len(set(ticks)) == len(ticks), ticks


def test_training_logs_are_read_as_a_resumed_run_leaves_them(tmp_path) -> None:
    path = made.training_log(tmp_path / "training-log.jsonl", steps=10)
    with path.open("a") as f:  # steps 9 and 10 again, after a resume, and a line cut off by a kill
        for step in (9, 10):
            f.write(json.dumps({"event": "step", "step": step, "tokens": 25_000 * step, "loss": 0.001 * step}) + "\n")
        f.write('{"event": "st')
    run = read_training("r", tmp_path)
    assert run.tokens == [25_000 * step for step in range(1, 11)]
    assert run.loss[-2:] == [0.001 * 9, 0.001 * 10]
    assert run.kl_tokens == [125_000, 250_000]
    with pytest.raises(UsageError, match="cannot be read"):
        read_training("r", tmp_path / "nowhere")
    path.write_text("no json\n{}\n")
    with pytest.raises(UsageError, match="line 1 is no JSON"):
        read_training("r", path)


def test_reports_need_evaluations_with_names_of_their_own(tmp_path) -> None:
    with pytest.raises(UsageError, match="no evaluation"):
        write_report(tmp_path, [])
    found = made.evaluation()
    with pytest.raises(UsageError, match="two evaluations are called 'm'"):
        write_report(tmp_path, [("m", found), ("m", found)])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (figure(0.0), "0"), (figure(9.996), "10.0"), (figure(0.09996), "0.100"), (figure(1234.5), "1,230"),
        (figure(0.01234), "0.0123"), (figure(None), "–"), (figure(float("nan")), "–"), (figure(1.5e-9), "1.50e-09"),
        (figure(-2.345), "-2.35"), (times(1.0704), "×1.07"), (times(12.34), "×12.3"), (times(None), "–"),
        (short(8e6), "8M"), (short(32768), "32.8k"), (short(12), "12"), (bytes_of(5120), "5 KiB"),
        (bytes_of(640), "640 B"), (bytes_of(None), "–"), (heads_phrase([1, 1]), "1 KV head"),
        (heads_phrase([2, 4]), "2 to 4 KV heads"),
        (listed(["a"]), "a"), (listed(["a", "b", "c"]), "a, b and c"), (listed([]), ""),
    ],
)  # fmt: skip
def test_wording(text, expected) -> None:
    assert text == expected


def test_continuations_stand_beside_each_other(sweep_report) -> None:
    page, text = sweep_report.html.read_text(encoding="utf-8"), sweep_report.markdown.read_text(encoding="utf-8")
    assert page.count('<article class="sample">') == 3
    assert page.count("<u>a treaty with</u> bales and bales.") == 3 * 4  # the nearest model of each size, and one more
    assert "a treaty with the United Kingdom." in page
    assert "3 of 7 tokens as the original" in page
    assert "**a treaty with** bales and bales." in text
    assert "converted" not in " ".join(re.findall(r'<article class="sample">.*?</article>', page, re.S))


def test_speed_is_said_with_its_spread_and_as_the_plot_has_it(tmp_path) -> None:
    """Two conversions of one shape are one measurement made twice: neither picks the figure."""
    slow, fast = (made.evaluation(kl, 2, name=name, full=True) for kl, name in ((0.3, "a"), (0.1, "b")))
    for found, factor in ((slow, 0.9), (fast, 1.2)):
        for row in found.speed:
            if row.ratio is not None:
                row.ratio.value, row.ratio.low, row.ratio.high = factor, factor - 0.05, factor + 0.05
    summaries = [summarise(Entry("a", slow)), summarise(Entry("b", fast))]
    point = dict(verdict(summaries).points)["cache of 10 MiB"]
    assert "No difference in decoding speed that could be measured (×0.85 to ×1.25 over 2 measurements" in point
    plot = decode_speed(summaries)
    assert plot.alt.count("×1.05 at") == 3
    assert {row[-2] for row in overview(summaries).rows[1:]} == {"×1.05\n0.850 to 1.25"}
    alone = dict(verdict(summaries[1:]).points)["saves"]
    assert "decoding at ×1.20 the original's speed (×1.15 to ×1.25; batch 16, 8,192 tokens of context)" in alone


def test_speed_of_older_documents_is_said_to_have_no_spread() -> None:
    found = made.evaluation(0.1, 2, full=True)
    for row in found.speed:
        row.low = row.high = row.ratio = None
    said = dict(verdict([summarise(Entry("m", found))]).points)["saves"]
    assert "one measurement without a spread" in said


def test_the_main_plot_takes_any_rows() -> None:
    rows = [CacheRow("pool", 2**20 * size, 1 / size, 0.9 / size, 1.1 / size) for size in (1, 2, 4)]
    plot = cache_plot([*rows, CacheRow("window", 2**19, 0.05), CacheRow("none", 2**20, 0.0)], 8192, original=2**24)
    assert [key.text for key in plot.keys] == ["pool", "window"]
    assert "pool: 1.00 at 1 MiB, 0.500 at 2 MiB, 0.250 at 4 MiB" in plot.alt
    for word in ("original", "usable, below 0.1", "KV cache at 8,192 tokens", "16 MiB"):
        assert word in plot.svg
    assert cache_plot(rows[:1], 8192) is None
    # Where caches have one size, a row for each model.
    blocks = cache_plot([CacheRow(f"layers {n}", 2**20, 0.1 * n) for n in (1, 2, 3)], 8192, original=2**20)
    assert not blocks.keys
    assert "layers 3" in blocks.svg
    assert "KV cache at" not in blocks.svg
