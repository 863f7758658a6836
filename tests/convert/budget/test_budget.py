"""One budget: options of each layer, what they are predicted and measured to cost, and the choice among them."""

import random

import pytest
import torch

from rehead.convert import convert
from rehead.convert.budget.choose import check_budget, select, smallest
from rehead.convert.budget.curve import curve
from rehead.convert.budget.library import Library, Option, form_of, library
from rehead.convert.budget.mix import Meter, Mix
from rehead.convert.budget.prepare import Estimates, calibrated_states, estimate, solve_forms
from rehead.convert.budget.samples import samples
from rehead.convert.budget.search import Predictor, patterns, uniform
from rehead.convert.budget.survey import SurveyOptions, budget_of, survey
from rehead.data.calibration import CalibrationText
from rehead.errors import UnsupportedError, UsageError
from rehead.models.model import open_model
from rehead.variants.contract import VARIANTS
from tests.helpers.far_layer import CONTEXT, LAYERS, planted_model
from tests.helpers.probes import one_line
from tests.helpers.tiny import VOCAB, loaded, save_tiny, tiny_model

SURVEY = {"calibration": ["random"], "calibration_tokens": 2048, "tokens": 1024, "context": CONTEXT}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return planted_model(tmp_path_factory.mktemp("planted") / "model")


@pytest.fixture(scope="module")
def prepared(planted):
    with survey(open_model(planted), SurveyOptions.parse(SURVEY), torch.device("cpu")) as ready:
        yield ready


def test_options_are_priced_by_what_layers_cache(planted):
    options = library(open_model(planted), CONTEXT)
    first = options.layers[0]
    assert first[0].name == ""
    sizes = [options.bytes_of(option) for option in first]
    assert sizes == sorted(sizes, reverse=True)
    kinds = {option.kind for option in first}
    assert {"pool", "latent", "window"} <= kinds
    window = next(option for option in first if option.name == "window:size=16,sinks=4")
    assert options.bytes_of(window) == options.bytes_of(first[0]) * (15 + 4) // CONTEXT
    assert options.total({}) == LAYERS * sizes[0]
    assert options.least == LAYERS * sizes[-1]


def test_a_window_that_texts_hardly_reach_is_not_offered(planted):
    options = library(open_model(planted), CONTEXT, longest=24)
    assert not [name for name in options.names if name.startswith("window")]
    assert "too far for texts of 24" in options.blocked["window:size=16,sinks=4"]


def test_a_window_that_fits_logits_needs_texts_of_four(planted):
    model = open_model(planted)
    options = library(model, CONTEXT, longest=48)
    assert "window:size=16,sinks=4" in options.names
    assert "too far for texts of 48" in options.blocked["window:size=16,sink_logit=True"]
    calibrated_states(loaded(planted), options, torch.randint(0, VOCAB, (4, 48)))  # refuses shorter texts
    assert "window:size=16,sink_logit=True" in library(model, CONTEXT, longest=64).names


def test_the_model_is_as_it_was_afterwards(planted):
    model, live = open_model(planted), loaded(planted)
    options = library(model, CONTEXT)
    before = {name: tensor.clone() for name, tensor in live.state_dict().items()}
    modules = [type(layer.self_attn) for layer in live.model.layers]
    text = CalibrationText([torch.randint(0, VOCAB, (4, 256))], ["random tokens"])
    calibrated = calibrated_states(live, options, text.tokens[0])
    assert calibrated[0, "window:size=16,sink_logit=True"]["sinks"].shape == (8,)
    with Mix(live, model, [o for each in options.layers.values() for o in each]) as mix:
        solve_forms(mix, model, options, text, calibrated)
        estimate(mix, options, samples(model, text)[0], samples(model, text))
        with mix.on({0: options.layers[0][-1], 1: options.option(1, options.names[1])}):
            pass
    assert modules == [type(layer.self_attn) for layer in live.model.layers]
    assert all(torch.equal(tensor, before[name]) for name, tensor in live.state_dict().items())


def test_fewer_heads_in_the_old_shapes_compute_what_the_converted_model_does(planted, tmp_path):
    model, live = open_model(planted), loaded(planted)
    variant = VARIANTS.get("pool")
    wanted = variant.options(num_key_value_heads=1)
    form = form_of(model, variant, wanted)
    made = {i: Option("pool:mean", layout, variant, wanted) for i, layout in enumerate(model.layouts)}
    convert(planted, tmp_path / "out", num_key_value_heads=1)
    ids = torch.randint(0, VOCAB, (2, 64))
    with Mix(live, model, list(made.values())) as mix, torch.no_grad():
        for layer, option in made.items():
            mix.add(layer, option, form, form.closed(layer, model.heads(layer).to(torch.float32), None))
        with mix.on(made):
            mixed = live(ids).logits
        assert (mixed - live(ids).logits).abs().max() > 1e-3
    assert torch.allclose(mixed, loaded(tmp_path / "out")(ids).logits, atol=1e-5)


def test_the_loss_of_several_layers_is_predicted_together(tmp_path):
    """Small changes: one layer's and all layers' losses are predicted to within half."""
    tiny_model("llama", 1, num_hidden_layers=LAYERS, max_position_embeddings=CONTEXT).save_pretrained(
        tmp_path / "model"
    )
    keep = SurveyOptions.parse({**SURVEY, "tokens": 4096})
    model = open_model(tmp_path / "model")
    with survey(model, keep, torch.device("cpu"), keep=lambda options: options.only(["latent"])) as ready:
        whole = uniform(ready.options, ready.options.names[1])
        for choice in ({0: whole[0]}, {3: whole[3]}, whole):
            measured = ready.meter.measure(choice).loss
            assert measured / 2 < ready.predictor.loss(choice) < 2 * measured


def test_predictions_are_half_the_square_of_summed_effects():
    estimates = Estimates(effects={(0, "a"): torch.tensor([1.0, 2.0]), (1, "a"): torch.tensor([-1.0, 1.0])})

    class Named:
        def __init__(self, name):
            self.name = name

    both = {0: Named("a"), 1: Named("a")}
    assert estimates.predicted({0: Named("a")}) == 2.5
    assert estimates.predicted(both) == 4.5  # the first token's effects cancel, the second's add up
    assert Predictor(Library({}, 1, {}), estimates).loss(both) == 4.5


@pytest.mark.parametrize("share", ["75%", "50%", "35%"])
def test_the_layer_that_reads_far_is_kept_at_any_budget(prepared, share):
    budget = budget_of(share, prepared.options)
    selection = select(prepared.options.only(["window"]), prepared.predictor, prepared.meter, budget)
    assert selection.total <= budget
    assert 2 not in selection.choice
    assert len(selection.choice) >= 1


def test_nothing_plain_is_better_at_equal_bytes(prepared):
    budget = budget_of("40%", prepared.options)
    selection = select(prepared.options, prepared.predictor, prepared.meter, budget)
    assert selection.rivals
    assert all(selection.measured.loss <= rival.measured.loss for rival in selection.rivals)
    assert all(rival.total <= budget for rival in selection.rivals)


def test_the_smallest_cache_within_a_loss(prepared):
    options = prepared.options.only(["window"])
    selection = smallest(options, prepared.predictor, prepared.meter, 0.01)
    assert selection.measured.kl <= 0.01
    assert selection.total < options.whole / 2
    with pytest.raises(UsageError, match="allow that or more") as error:
        smallest(options, prepared.predictor, prepared.meter, 0.0)
    one_line(error)


def test_patterns_take_as_few_layers_as_will_do(prepared):
    options = prepared.options
    name = "window:size=16,sinks=4"
    made = patterns(options, name, options.whole * 6 // 10)
    assert sorted(made["first"]) == [0, 1]
    assert sorted(made["last"]) == [2, 3]
    assert sorted(made["alternate"]) == [0, 2]


def test_a_budget_that_no_option_meets(prepared):
    with pytest.raises(UsageError, match="the nearest is") as error:
        check_budget(prepared.options, 10)
    assert "its smallest form is" in one_line(error)


@pytest.mark.parametrize("budget", ["0%", "100%", "a third", "1e9"])
def test_a_budget_that_is_none(prepared, budget):
    with pytest.raises(UsageError) as error:
        budget_of(budget, prepared.options)
    one_line(error)


def test_numbers_are_a_budget_too(prepared):
    numbers = prepared.options.layers[0][0].layout.numbers_per_token
    assert budget_of(str(numbers // 2), prepared.options) == prepared.options.whole // 2


def test_the_curve_falls_with_the_cache(planted):
    result = curve(planted, **SURVEY)
    mixes = [point for point in result.points if point.name == "mix"]
    assert [point.bytes for point in mixes] == sorted((point.bytes for point in mixes), reverse=True)
    assert [point.predicted for point in mixes] == sorted(point.predicted for point in mixes)
    assert sum(point.kl is not None for point in mixes) == 3
    told = dict(zip((0.5, 0.33, 0.25), result.comparisons()))
    for mix in mixes:
        if mix.kl is None:
            continue
        plain = result.best_plain(mix)
        assert plain.share <= mix.budget
        assert plain.name in told[mix.budget]
        predicted = [point for point in result.points if point.budget is None and point.share <= mix.budget]
        assert min(predicted, key=lambda point: point.predicted).kl is not None
    half = next(point for point in mixes if point.share <= 0.5)
    assert 2 not in half.layers


def test_a_context_beyond_the_positions(planted):
    with pytest.raises(UsageError, match="positions for 512") as error:
        curve(planted, **{**SURVEY, "context": 1024})
    one_line(error)


def test_a_model_without_any_option(tmp_path):
    model = tiny_model("llama", num_hidden_layers=1, num_key_value_heads=1, max_position_embeddings=64)
    model.save_pretrained(tmp_path / "model")
    with (
        pytest.raises(UnsupportedError) as error,
        survey(
            open_model(tmp_path / "model"),
            SurveyOptions.parse({**SURVEY, "context": 64}),
            torch.device("cpu"),
            keep=lambda options: options.only(["pool"]),
        ),
    ):
        pass
    assert "no layer has a form with a smaller cache" in one_line(error)


def test_a_class_with_a_kv_head_for_each_query_head_names_the_way_that_works(tmp_path):
    save_tiny("gpt2", tmp_path / "source")
    asked = {**SURVEY, "context": 96}
    with pytest.raises(UnsupportedError, match="convert it with --host auto") as error:
        curve(tmp_path / "source", **asked)
    one_line(error)
    convert(tmp_path / "source", tmp_path / "hosted", host="auto")
    assert curve(tmp_path / "hosted", **asked).points


def test_a_layer_whose_keys_are_far_from_linear_does_not_stop_the_others(tmp_path):
    """Keys of one layer, normed one by one, lie nowhere near a linear map of what it reads (Qwen3)."""
    model = tiny_model("qwen3", 0, num_hidden_layers=2, max_position_embeddings=CONTEXT, attention_bias=False,
                       vocab_size=512)  # fmt: skip
    with torch.no_grad():  # one direction is all that these keys read: a norm leaves its sign alone
        keys = model.model.layers[0].self_attn.k_proj.weight
        keys.copy_(torch.randn(len(keys), 1) * torch.randn(keys.shape[1]))
    model.save_pretrained(tmp_path / "model")
    with survey(open_model(tmp_path / "model"), SurveyOptions.parse(SURVEY), torch.device("cpu")) as ready:
        latents = {i: [o for o in each if o.kind == "latent"] for i, each in ready.options.layers.items()}
        assert not latents[0]
        assert latents[1]
        gone, reason = next(pair for pair in ready.options.blocked.items() if "layers 0: " in pair[1])
        assert "is normed, and linear rows explain only" in reason
        assert gone not in ready.options.names
        choice = ready.predictor.forward(budget_of("50%", ready.options))
        assert 0 < ready.meter.measure(choice).loss < 10


def test_measurements_are_kept(prepared):
    meter: Meter = prepared.meter
    choice = {1: random.Random(0).choice(prepared.options.layers[1][1:])}
    first = meter.measure(choice)
    count = meter.measurements
    assert meter.measure(dict(choice)) is first
    assert meter.measurements == count
