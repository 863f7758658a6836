"""Predicted losses of neighbouring choices, against sums done by hand."""

import itertools
import random

import pytest
import torch

from rehead.convert.budget.library import Library, Option
from rehead.convert.budget.prepare import Estimates
from rehead.convert.budget.search import Predictor, patterns, uniform
from rehead.models.layout import LayerLayout


@pytest.fixture
def predictor():
    layers, estimates = {}, Estimates()
    generator = torch.Generator().manual_seed(0)
    for layer in range(4):
        layers[layer] = [Option(name, LayerLayout(layer, 8, kv, 4, 4)) for name, kv in (("", 4), ("a", 2), ("b", 1))]
        for name, size in (("a", 0.1), ("b", 0.4)):
            estimates.effects[layer, name] = size * torch.randn(16, generator=generator)
    options = Library(layers, 8, {})
    return Predictor(options, estimates), options, estimates


def _applied(choice, move):
    return {layer: option for layer, option in {**choice, **move.changes}.items() if option.name}


def test_neighbours_are_predicted_as_if_they_were_chosen(predictor):
    search, options, estimates = predictor
    choice = {0: options.option(0, "a"), 2: options.option(2, "b")}
    assert search.loss(choice) == pytest.approx(estimates.predicted(choice), rel=1e-5)
    near = search.moves(choice) + search.swaps(choice, options.whole, most=1000)
    assert len(search.moves(choice)) == 8
    assert len(near) == 8 + 8 * 7 // 2 - 4  # pairs of changes, but for two of one layer
    for move in near:
        after = _applied(choice, move)
        assert move.predicted == pytest.approx(estimates.predicted(after), rel=1e-5, abs=1e-9)
        assert move.total == options.total(after)


def test_a_form_that_nobody_estimated_does_not_pass_for_one_without_effect(predictor):
    _, options, estimates = predictor
    del estimates.effects[2, "b"]
    with pytest.raises(KeyError, match="b"):
        Predictor(options, estimates).moves({})


def test_swaps_stay_within_the_budget_and_come_best_first(predictor):
    search, options, _ = predictor
    choice = uniform(options, "a")
    swaps = search.swaps(choice, options.total(choice))
    assert all(move.total <= options.total(choice) for move in swaps)
    assert [move.predicted for move in swaps] == sorted(move.predicted for move in swaps)


def test_the_best_choice_is_found(predictor):
    search, options, _ = predictor
    draw = random.Random(0)
    every = [dict(enumerate(each)) for each in itertools.product(*options.layers.values())]
    for share in (0.3, 0.5, 0.8):
        budget = int(options.whole * share)
        best = min(search.loss(each) for each in every if options.total(each) <= budget)
        start = draw.choice([each for each in every if options.total(each) <= budget])
        for choice in (search.improved(search.forward(budget), budget), search.improved(start, budget)):
            assert options.total(choice) <= budget
            assert search.loss(choice) <= 1.3 * best


def test_patterns_of_no_layers_where_the_budget_is_all(predictor):
    _, options, _ = predictor
    assert patterns(options, "b", options.whole)["first"] == {}
