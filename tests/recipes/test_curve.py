"""The curve as a page: every point in it, nothing from a model's name unescaped, the plot a file of its own."""

import json
import xml.etree.ElementTree as ET
from dataclasses import replace

from rehead.convert.budget.curve import Curve, Point
from rehead.recipes.curve.page import FIGURES, PAGE, PLOT, advice, headline, write_curve

FACTS = {
    "layer_count": 4, "calibration": {"text": ["speeches"], "tokens": 1024}, "device": "cpu",
    "measured_on": {"text": 1024, "copy at 512": 126},
}  # fmt: skip


def curve(name="model"):
    points = [
        Point("mix", 0.5, 500, 10, 0.02, 0.01, 0.02, 0.97, {1: "window:size=64,sinks=4", 3: "latent:rank=8"}, 0.5),
        Point("mix", 0.33, 330, 8, 0.2, 0.3, 0.1, 0.5, {1: "window:size=64,sinks=4"}, 0.33),
        Point("mix", 0.2, 200, 6, 0.4, budget=0.2),
        Point("latent:rank=8,rope_dims=4", 0.5, 500, 12, 0.5, 0.4, 0.1, 0.2),
        Point("window:size=64,sinks=4", 0.4, 400, 4, 0.9, 0.7, 0.3, 0.1),
        Point("window:size=32,sinks=4", 0.2, 200, 2, 2.0),
    ]
    return Curve(name, 8192, 1000, points, {"latent:rank=9": "odd <b>"}, FACTS)


def test_page_plot_and_figures_are_written(tmp_path):
    paths = write_curve(curve("<script>x"), tmp_path / "out", "rehead curve model")
    assert [path.name for path in paths] == [PAGE, FIGURES, PLOT]
    page = (tmp_path / "out" / PAGE).read_text().replace("<wbr>", "")
    assert "<script>" not in page
    assert "odd <b>" not in page
    assert "1 x window:size=64,sinks=4" in page
    assert json.loads((tmp_path / "out" / FIGURES).read_text())["points"][0]["share"] == 0.5
    ET.parse(tmp_path / "out" / PLOT)
    assert "chosen layer by layer, measured" in (tmp_path / "out" / PLOT).read_text()


def test_the_headline_names_the_smallest_usable_cache():
    assert headline(curve()).startswith("With 50% of its cache")
    assert [share for share, _ in advice(curve())] == ["50%", "33%"]
    assert advice(curve())[0][1] == "0.0300 nats, of them 0.0100 on text: rehead convert model OUT --kv-cache 50%"


def test_a_model_that_does_not_copy_is_told_what_repeated_text_costs():
    """Its loss on text alone may fall with the size while what was measured rises."""
    fresh = curve()
    fresh.points[0] = replace(fresh.points[0], recalled=None)
    assert "loses 0.0100 nats per token on text and 0.0200 where text repeats itself" in headline(fresh)


def test_a_mix_stands_beside_the_best_form_in_all_layers_of_its_size():
    assert curve().comparisons() == [
        "50% of the cache: 0.03 nats layer by layer, 0.06 times the 0.5 of latent:rank=8,rope_dims=4 in all layers",
        "33% of the cache: 0.4 nats layer by layer; no form has been measured in all layers at that size",
    ]
