"""KV heads shared in groups of unequal size: planted twins are found, and sharing them changes nothing."""

import json

import pytest
import tiny
import torch
from tiny import loaded, logits

from rehead.convert import convert
from rehead.convert.budget.library import Option, form_of, library
from rehead.convert.budget.mix import Mix
from rehead.convert.budget.prepare import solve_forms
from rehead.data.calibration import CalibrationText
from rehead.errors import UnsupportedError, UsageError
from rehead.models.model import open_model
from rehead.variants.contract import VARIANTS
from rehead.variants.uneven.solve import groups_of

TEXT = {"calibration": ["random"], "calibration_tokens": 2048, "calibration_length": 64}
TWINS = [[0, 1, 3], [2]]


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """A model whose KV heads 0, 1 and 3 are the same in every layer."""
    model = tiny.tiny_model("llama-mha", 0, num_key_value_heads=4)
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                rows = projection.weight.view(4, layer.self_attn.head_dim, -1)
                rows[1], rows[3] = rows[0], rows[0]
    folder = tmp_path_factory.mktemp("twins") / "model"
    model.save_pretrained(folder)
    return folder


def test_groups_are_of_any_size():
    costs = torch.tensor([[0.0, 9, 1, 9], [9, 0, 9, 8], [1, 9, 0, 9], [9, 8, 9, 0]])
    assert groups_of(costs, 3) == [[0, 2], [1], [3]]
    assert groups_of(costs, 2) == [[0, 2], [1, 3]]
    assert groups_of(costs, 1) == [[0, 1, 2, 3]]


def test_twins_across_unequal_groups_are_found_and_shared_exactly(twins, tmp_path):
    conversion = convert(twins, tmp_path / "out", variants=["uneven:num_key_value_heads=2"], **TEXT)
    assert [facts["groups"] for facts in conversion.layers.values()] == [TWINS] * len(conversion.layers)
    after, before = logits(loaded(tmp_path / "out")), logits(loaded(twins))
    assert torch.allclose(after, before, atol=1e-4)
    # Pairs of equal size cannot keep apart what differs.
    convert(twins, tmp_path / "even", num_key_value_heads=2, method="svd", grouping="similar", **TEXT)
    assert (logits(loaded(tmp_path / "even")) - before).abs().max() > 1e-2


def test_one_layer_alone_has_fewer_heads(twins, tmp_path):
    conversion = convert(twins, tmp_path / "out", variants=["uneven:num_key_value_heads=2,layers=1"], **TEXT)
    assert json.loads((tmp_path / "out/config.json").read_text())["layer_kv_heads"] == [None, 2]
    assert [layout.num_key_value_heads for layout in conversion.plan.layouts] == [4, 2]
    assert torch.allclose(logits(loaded(tmp_path / "out")), logits(loaded(twins)), atol=1e-4)


def test_a_budget_measures_what_is_written(twins, tmp_path):
    """Uneven groups on the live model, in the old shapes, compute what the checkpoint does."""
    model, variant = open_model(twins), VARIANTS.get("uneven")
    wanted = variant.options(num_key_value_heads=3)
    named = {layout.index: Option("uneven:num_key_value_heads=3", layout, variant, wanted) for layout in model.layouts}
    options = library(model, 32)
    options.layers.update({layer: [options.layers[layer][0], option] for layer, option in named.items()})
    live = loaded(twins)
    text = CalibrationText([torch.randint(0, tiny.VOCAB, (32, 64))], ["random tokens"])
    with Mix(live, model, list(named.values())) as mix:
        solve_forms(mix, model, options, text)
        with mix.on(named):
            shared = logits(live)
    assert torch.allclose(shared, logits(live), atol=1e-4)  # the twins that are left still are
    assert form_of(model, variant, wanted) is not None


@pytest.mark.parametrize(
    ("kind", "count", "error", "says"),
    [
        ("llama", 4, UsageError, "are not fewer than the model's 4"),
        ("gpt_neox", 1, UnsupportedError, "no modelling file"),
        ("qwen3", 1, UnsupportedError, "its keys pass a norm"),
    ],
)
def test_what_has_no_place_is_refused(tmp_path, kind, count, error, says):
    source = tiny.save_tiny(kind, tmp_path / "source")
    with pytest.raises(error, match=says):
        convert(source, tmp_path / "out", variants=[f"uneven:num_key_value_heads={count}"], **TEXT)
