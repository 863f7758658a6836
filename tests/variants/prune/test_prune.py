"""Fewer query heads: planted copies go without a trace, live and saved agree, files shrink, and the rest is refused."""

import itertools
import json

import pytest
import tiny
import torch
from tiny import IDS, loaded, logits

from rehead.convert import convert, plan, verify
from rehead.convert.calibrated import calibration_text
from rehead.errors import UnsupportedError, UsageError
from rehead.patches import patch_model
from rehead.variants.prune import variant as prune
from rehead.variants.prune.solve import least_needed, predictor

TEXT = {"calibration": ["random"], "calibration_tokens": 2048, "calibration_length": 64}
HEADS = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "attention_bias": False}


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """A model with 3 query heads for each KV head, of which head 1 repeats head 0 and head 5 writes nothing."""
    model = tiny.tiny_model("llama", 0, **HEADS)
    with torch.no_grad():
        for layer in model.model.layers:
            q = layer.self_attn.q_proj.weight.view(6, 8, -1)
            q[1] = q[0]
            layer.self_attn.o_proj.weight.view(-1, 6, 8)[:, 5] = 0
    folder = tmp_path_factory.mktemp("copies") / "model"
    model.save_pretrained(folder)
    return folder


def weights_of(folder):
    return {name: tuple(tensor.shape) for name, tensor in loaded(folder).state_dict().items()}


def text(folder):
    """Token ids of what a conversion of these options reads."""
    return calibration_text(plan(folder, variants=["prune:heads=1"], **TEXT)).tokens[0]


@pytest.mark.parametrize("layers", ["", ",layers=1"])
def test_heads_that_others_make_up_for_go_without_a_trace(copies, tmp_path, layers):
    done = convert(copies, tmp_path / "out", variants=[f"prune:heads=1{layers}"], **TEXT)
    for facts in done.layers.values():
        assert facts["dropped"] in ([0, 5], [1, 5])
        assert facts["pruned_error"] < 1e-3
    torch.testing.assert_close(logits(loaded(tmp_path / "out")), logits(loaded(copies)), atol=2e-3, rtol=0)
    # By their weights alone another head goes than the copy.
    convert(copies, tmp_path / "small", variants=[f"prune:heads=1,by=weights{layers}"])
    assert float((logits(loaded(tmp_path / "small")) - logits(loaded(copies))).abs().max()) > 2e-2


def test_the_models_own_class_holds_as_many_heads_in_every_layer(copies, tmp_path):
    done = convert(copies, tmp_path / "out", variants=["prune:heads=1"], **TEXT)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["model_type"], config["num_attention_heads"], config["head_dim"]) == ("llama", 4, 8)
    assert not list((tmp_path / "out").glob("*.py"))
    before, after = weights_of(copies), weights_of(tmp_path / "out")
    width = before["model.layers.0.self_attn.q_proj.weight"][1]
    assert after["model.layers.0.self_attn.q_proj.weight"] == (32, width)
    assert after["model.layers.0.self_attn.o_proj.weight"] == (width, 32)
    assert {name for name in before if before[name] != after[name]} == {
        f"model.layers.{layer}.self_attn.{part}_proj.weight" for layer in range(2) for part in "qo"
    }
    assert [layout.num_heads for layout in done.plan.layouts] == [4, 4]
    assert [layout.cache_bytes(8) for layout in done.plan.layouts] == [
        layout.cache_bytes(8) for layout in done.plan.source.layouts
    ]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "helium"])
def test_a_class_that_refuses_the_number_gets_the_modelling_file(kind, tmp_path):
    """Llama's config wants the hidden size to be a multiple of its heads, Qwen 2's not; Helium's output is square."""
    source = tiny.save_tiny(kind, tmp_path / "source", num_attention_heads=8, num_key_value_heads=2, head_dim=8)
    convert(source, tmp_path / "out", variants=["prune:heads=1,by=weights"])
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config.get("layer_heads") == (None if kind == "qwen2" else [6, 6])
    assert config["num_attention_heads"] == (6 if kind == "qwen2" else 8)
    model = loaded(source)
    with patch_model(model, "prune", by="weights"):
        torch.testing.assert_close(logits(model), logits(loaded(tmp_path / "out")), atol=1e-4, rtol=1e-4)


def test_some_layers_alone_are_smaller_in_the_modelling_file(copies, tmp_path):
    convert(copies, tmp_path / "out", variants=["prune:heads=2,layers=1"], refit=True, **TEXT)
    assert json.loads((tmp_path / "out/config.json").read_text())["layer_heads"] == [None, 2]
    shapes = weights_of(tmp_path / "out")
    rows = [shapes[f"model.layers.{layer}.self_attn.q_proj.weight"][0] for layer in range(2)]
    assert rows == [48, 16]
    assert verify(tmp_path / "out", str(copies)).cache_error < 1e-4
    model = loaded(tmp_path / "out")
    with torch.no_grad():
        written = model.generate(IDS[:1, :6], max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert written.shape == (1, 11)
    model.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(loaded(tmp_path / "again")), logits(model))
    with pytest.raises(UnsupportedError, match="forms of their own"):
        convert(tmp_path / "out", tmp_path / "twice", variants=["prune:heads=1"], **TEXT)


@pytest.mark.parametrize("layers", [None, [1]])
def test_a_live_model_computes_what_the_checkpoint_does(copies, tmp_path, layers):
    """The same text chooses the same heads and gives the same predictions."""
    said = "" if layers is None else ",layers=1"
    convert(copies, tmp_path / "out", variants=[f"prune:heads=2{said}"], **TEXT)
    model = loaded(copies)
    before = logits(model)
    told = {"heads": 2, **({} if layers is None else {"layers": layers})}
    with patch_model(model, "prune", calibration=text(copies), **told) as patch:
        assert patch.layers == ([0, 1] if layers is None else layers)
        torch.testing.assert_close(logits(model), logits(loaded(tmp_path / "out")), atol=1e-4, rtol=1e-4)
    assert torch.equal(logits(model), before)
    with patch:  # what text chose is kept
        torch.testing.assert_close(logits(model), logits(loaded(tmp_path / "out")), atol=1e-4, rtol=1e-4)


def test_a_refit_comes_nearer(copies, tmp_path):
    """The refit counts the errors of the layers before."""
    drift = []
    for refit in (False, True):
        convert(copies, tmp_path / str(refit), variants=["prune:heads=2"], refit=refit, **TEXT)
        drift.append(json.loads((tmp_path / str(refit) / "rehead.json").read_text())["calibration"]["drift"])
    assert 0 < drift[1] < drift[0]


def test_heads_go_greedily_by_the_error_that_is_left():
    """The first is the best of all by brute force, and the predicted outputs solve the least squares."""
    torch.manual_seed(0)
    output, mixed = torch.randn(10, 6, 4), torch.randn(400, 24) @ torch.randn(24, 24)
    gram = mixed.T @ mixed / 400

    def error(dropped):
        whole = output.flatten(1)
        lost = (whole - whole @ predictor(gram, dropped, 6, 4)).double()
        return float(((lost @ gram.double()) * lost).sum())

    single = {head: error([head]) for head in range(6)}
    assert least_needed(output, gram, 1, 1) == [min(single, key=single.get)]
    pairs = {pair: error(pair) for pair in itertools.product(range(3), range(3, 6))}
    assert error(least_needed(output, gram, 2, 1)) <= 1.3 * min(pairs.values())
    dropped = least_needed(output, gram, 2, 2)
    assert [head // 3 for head in dropped] == [0, 0, 1, 1]
    kept = [head for head in range(6) if head not in dropped]
    columns = torch.cat([torch.arange(4 * head, 4 * head + 4) for head in kept])
    best = torch.linalg.lstsq(mixed[:, columns], mixed @ output.flatten(1).T).solution.T
    got = (output.flatten(1) @ predictor(gram, dropped, 6, 4))[:, columns]
    torch.testing.assert_close(got, best, atol=2e-2, rtol=2e-2)


def test_the_smallest_weights_go_without_text():
    output = torch.ones(3, 6, 2)
    output[:, 2], output[:, 3] = 0.1, 0.2
    assert least_needed(output, None, 2, 1) == [2, 3]


@pytest.mark.parametrize(
    ("kind", "changes", "told", "error", "says"),
    [
        ("llama", HEADS, "heads=3", UsageError, "give heads=1 to heads=2"),
        ("llama", HEADS, "heads=1,layers=7", UsageError, "layer 7"),
        ("llama", HEADS, "heads=1,layers=auto", UsageError, "name the layers"),
        ("llama-mha", {}, "heads=1", UnsupportedError, "share KV heads first"),
        ("olmo2", HEADS, "heads=1", UnsupportedError, "a norm spans"),
        ("phi3", {}, "heads=1,layers=1", UnsupportedError, "prune all layers alike"),
        (
            "phi",
            {},
            "heads=1",
            UnsupportedError,
            "k_layernorm.bias a size by the number of query heads.*patch the live",
        ),
        ("stablelm", {}, "heads=1,by=weights", UnsupportedError, "a size by the number of query heads.*patch the live"),
        ("falcon", {}, "heads=1,by=weights", UnsupportedError, "refuses 4 query heads.*patch the live model"),
        ("gpt2", {}, "heads=1", UnsupportedError, "share KV heads first"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(kind, changes, told, error, says, tmp_path, capsys):
    changes = {name: value for name, value in changes.items() if kind == "llama" or name.startswith("num")}
    source = tiny.save_tiny(kind, tmp_path / "source", **changes)
    capsys.readouterr()
    with pytest.raises(error, match=says) as caught:
        convert(source, tmp_path / "out", variants=[f"prune:{told}"], **TEXT)
    assert "\n" not in str(caught.value)
    assert not capsys.readouterr().err  # nor does transformers say it in its own words
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("variants", "says"),
    [
        (["prune:heads=1,layers=1", "temperature:start=1.2"], "query heads of its own"),
        (["pool:num_key_value_heads=1", "prune:heads=1"], "in a second run"),
    ],
)
def test_what_no_layer_can_be_twice_is_refused(copies, tmp_path, variants, says):
    with pytest.raises(UnsupportedError, match=says):
        convert(copies, tmp_path / "out", variants=variants, **TEXT)


def test_pooling_and_pruning_in_one_run(tmp_path):
    """Heads that the model has one by one are shared first; with text that takes two runs."""
    source = tiny.save_tiny("llama-mha", tmp_path / "source")
    convert(source, tmp_path / "out", num_key_value_heads=2, variants=["prune:heads=2,by=weights"])
    config = loaded(tmp_path / "out").config
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
    with pytest.raises(UnsupportedError, match="in a second run"):
        convert(source, tmp_path / "text", num_key_value_heads=2, variants=["prune:heads=2"], **TEXT)


@pytest.mark.parametrize("layers", ["", ",layers=1"])
@pytest.mark.parametrize("kv", [1, 2])
def test_what_holds_the_heads_that_stay_is_decided_once_on_the_model_as_it_then_is(
    copies, tmp_path, monkeypatch, kv, layers
):
    """Llama's config takes 4 query heads, as are left of 6 with two KV heads, and not the 5 that are left with one."""
    asked = []
    decide = prune._not_in_own_class
    monkeypatch.setattr(prune, "_not_in_own_class", lambda *told: asked.append(decide(*told)) or asked[-1])
    convert(copies, tmp_path / "both", variants=[f"prune:heads=1,by=weights{layers}"], num_key_value_heads=kv)
    assert len(asked) == 1
    assert (asked[0] is None) == (kv == 2 and not layers)
    first = copies if kv == 2 else convert(copies, tmp_path / "first", num_key_value_heads=kv).out
    convert(first, tmp_path / "second", variants=[f"prune:heads=1,by=weights{layers}"])
    assert torch.equal(logits(loaded(tmp_path / "both")), logits(loaded(tmp_path / "second")))


def test_pooling_and_pruning_one_after_the_other(copies, tmp_path):
    convert(copies, tmp_path / "one", num_key_value_heads=1)
    convert(tmp_path / "one", tmp_path / "both", variants=["prune:heads=3"], **TEXT)
    config = loaded(tmp_path / "both").config
    assert (config.num_attention_heads, config.num_key_value_heads) == (3, 1)
    convert(copies, tmp_path / "first", variants=["prune:heads=1"], **TEXT)
    convert(tmp_path / "first", tmp_path / "other", num_key_value_heads=1)
    config = loaded(tmp_path / "other").config
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 1)


def test_a_live_patch_says_what_it_lacks(copies):
    model = loaded(copies)
    before = logits(model)
    with pytest.raises(UsageError, match="give calibration="):
        patch_model(model, "prune").apply()
    with pytest.raises(UsageError, match="heads=1 to heads=2"):
        patch_model(model, "prune", heads=3, by="weights").apply()
    assert torch.equal(logits(model), before)
