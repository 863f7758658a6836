"""Serial and parallel forms of live blocks: what they compute, on every kind of block, and how they are undone."""

import copy

import pytest
import torch
from torch import nn

from rehead.benchmarks.tiny import causal_types, tiny_model
from rehead.errors import UnsupportedError, UsageError
from rehead.patches import patch_model
from rehead.recipes.training.models import checkpoint_activations
from rehead.variants.blocks.anatomy import find_blocks

TOKENS = torch.randint(8, 128, (2, 20), generator=torch.Generator().manual_seed(0))
SERIAL_TYPES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "olmo", "starcoder2", "granite", "stablelm", "nemotron",
    "gpt2", "gpt_bigcode", "gpt_neo", "persimmon", "mixtral", "qwen3_moe",
)  # fmt: skip
PARALLEL_TYPES = ("gpt_neox", "gptj", "codegen", "phi", "falcon", "cohere", "cohere2")


def logits(model, tokens=TOKENS, **kwargs):
    with torch.no_grad():
        return model(tokens, use_cache=False, **kwargs).logits


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model, before):
    now = model.state_dict()
    return list(now) == list(before) and all(torch.equal(now[name], before[name]) for name in before)


@pytest.mark.parametrize("model_type", SERIAL_TYPES)
def test_serial_to_parallel_and_back(model_type):
    model = tiny_model(model_type)
    before, weights = logits(model), state(model)
    with patch_model(model, "parallel") as patch:
        changed = logits(model)
        assert not patch.exact
        assert [record.calls for record in patch.states] == [1] * len(patch.layers)
    assert not torch.equal(changed, before)
    assert torch.equal(logits(model), before)
    assert unchanged(model, weights)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("model_type", PARALLEL_TYPES)
def test_parallel_to_serial_and_back(model_type):
    model = tiny_model(model_type)
    before = logits(model)
    with patch_model(model, "serial") as patch:
        assert {record.was for record in patch.states} == {"parallel"}
        assert not torch.equal(logits(model), before)
    assert torch.equal(logits(model), before)


def test_the_parallel_block_is_the_formula():
    model = tiny_model("llama")
    layer = model.model.layers[0]
    x = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(1))
    positions = torch.arange(6)[None]
    rotary = model.model.rotary_emb(x, positions)
    with torch.no_grad():
        attention = layer.self_attn(
            hidden_states=layer.input_layernorm(x), position_embeddings=rotary, attention_mask=None
        )[0]
        want = x + attention + layer.mlp(layer.post_attention_layernorm(x))
        with patch_model(model, "parallel"):
            got = layer(x, position_embeddings=rotary, attention_mask=None)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("model_type", ["gpt_neox", "stablelm"])
def test_the_patch_is_the_switch_of_the_class(model_type):
    """Where the class itself has a switch, both ways of switching compute the same."""
    parallel = tiny_model(model_type, use_parallel_residual=True)
    serial = tiny_model(model_type, use_parallel_residual=False)
    if model_type == "stablelm":  # its parallel form shares the first norm
        for layer in serial.model.layers:
            layer.post_attention_layernorm.load_state_dict(layer.input_layernorm.state_dict())
        parallel.load_state_dict({k: v for k, v in serial.state_dict().items() if "post_attention" not in k})
    else:
        parallel.load_state_dict(serial.state_dict())
    with patch_model(serial, "parallel"):
        torch.testing.assert_close(logits(serial), logits(parallel), atol=2e-5, rtol=1e-5)
    with patch_model(parallel, "serial"):
        torch.testing.assert_close(logits(parallel), logits(serial), atol=2e-5, rtol=1e-5)


def test_only_the_chosen_layers_change():
    model = tiny_model("llama", num_hidden_layers=4)
    with patch_model(model, "parallel", layers=[1, 3]) as patch:
        assert patch.layers == [1, 3]
        assert patch.report().untouched == ["model.layers.0", "model.layers.2"]


@pytest.mark.parametrize(("model_type", "form"), [("llama", "parallel"), ("phi", "serial")])
def test_gradients_with_checkpointing(model_type, form):
    def gradients(checkpointing):
        model = tiny_model(model_type).train()
        if checkpointing:
            checkpoint_activations(model)
        with patch_model(model, form):
            model(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        return {name: p.grad for name, p in model.named_parameters()}

    plain, checkpointed = gradients(False), gradients(True)
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)


def test_dropout_after_attention_reaches_the_serial_ffn():
    """The serial FFN reads the stream with what attention's dropout left, not with attention's bare output."""
    model = tiny_model("phi", resid_pdrop=0.5).train()
    block = find_blocks(model)[0]
    seen = {}
    block.layer.register_forward_pre_hook(lambda m, a: seen.update(x=a[0]))
    block.layer.resid_dropout.register_forward_hook(lambda m, a, out: seen.update(dropped=seen.get("dropped", out)))
    with patch_model(model, "serial", layers=[0]):
        seen.clear()
        block.ffn.register_forward_pre_hook(lambda m, a: seen.update(given=a[0]))
        model(TOKENS, use_cache=False)
        want = block.ffn_norm.forward(seen["x"] + seen["dropped"])
    torch.testing.assert_close(seen["given"], want)


def test_a_copy_of_a_patched_model_is_its_own():
    model = tiny_model("llama")
    with patch_model(model, "parallel"):
        twin = copy.deepcopy(model)
        changed = logits(model)
    assert torch.equal(logits(twin), changed)
    assert not torch.equal(logits(model), changed)


# Reports


def test_report_and_measure():
    model = tiny_model("llama", num_hidden_layers=3)
    with patch_model(model, "parallel", layers=[0, 2], calibration=TOKENS) as patch:
        report = patch.report()
        changed = logits(model)
    assert report.measured.tokens == 40
    assert report.on == "the tokens given"
    assert set(report.measured.layers) == {0, 2}
    assert all(0 < layer.error <= layer.update_error for layer in report.layers)
    assert report.measured.residual == 0
    reference = logits(model)
    kl = torch.nn.functional.kl_div(
        changed.log_softmax(-1), reference.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    assert report.measured.kl == pytest.approx(float(kl.mean()), rel=1e-4)
    assert "off by" in str(report)
    assert report.to_dict()["layers"][1]["index"] == 2


def test_layer_errors_are_measured_on_the_original_inputs():
    """A layer's own error does not grow because layers before it were changed too."""
    model = tiny_model("llama", num_hidden_layers=3)
    errors = []
    for layers in ([2], [0, 1, 2]):
        with patch_model(model, "parallel", layers=layers) as patch:
            errors.append(patch.measure(input_ids=TOKENS).layers[2])
    assert errors[0] == pytest.approx(errors[1], rel=1e-6)


@pytest.mark.parametrize(("model_type", "form"), [("llama", "parallel"), ("phi", "serial")])
def test_layer_errors_are_those_of_the_definition(model_type, form):
    """What a block gives differently, relative to what it gives and to what it adds, over all tokens."""
    model = tiny_model(model_type)
    layer, seen = model.model.layers[1], []

    def keep(module, args, kwargs, output):
        seen.append(kwargs.get("hidden_states", args[0] if args else None))
        seen.append(output[0] if isinstance(output, tuple) else output)

    with layer.register_forward_hook(keep, with_kwargs=True):
        logits(model)
        with patch_model(model, form, layers=[1]):
            logits(model)
            after = seen[-1]
    given, before = seen[:2]
    with patch_model(model, form, layers=[1], calibration=TOKENS) as patch:
        (row,) = patch.report().layers
    gap = float((after - before).norm())
    assert row.error == pytest.approx(gap / float(before.norm()), rel=1e-4)
    assert row.update_error == pytest.approx(gap / float((before - given).norm()), rel=1e-4)


# Refusals


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("gemma2", "norm after attention"),
        ("gemma3_text", "norm after attention"),
        ("olmo2", "does not read a norm"),
        ("glm4", "norm after attention"),
        ("opt", "FFN is not one module"),
        ("bloom", "something else"),
        ("mamba", "no stack of layers with attention"),
    ],
)
def test_other_blocks_are_refused(model_type, reason):
    model = tiny_model(model_type)
    before = logits(model)
    with pytest.raises(UnsupportedError, match=reason) as error:
        patch_model(model, "parallel").apply()
    assert "\n" not in str(error.value)
    assert torch.equal(logits(model), before)


def test_bad_options():
    model = tiny_model("llama")
    with pytest.raises(UsageError, match="layers: 7 is not a layer"):
        patch_model(model, "parallel", layers=[7]).apply()
    with pytest.raises(UsageError, match="layers must be"):
        patch_model(model, "parallel", layers="some")
    with pytest.raises(UsageError, match="layers must be"):
        patch_model(model, "parallel", layers=[])
    with pytest.raises(UsageError, match="kl_budget"):
        patch_model(model, "parallel", layers="auto")
    with pytest.raises(UsageError, match="integer tensor"):
        patch_model(model, "parallel", calibration=torch.rand(2, 3))
    with pytest.raises(UsageError, match="holds token 4093, the model has 128"):
        patch_model(model, "parallel", calibration=torch.full((1, 4), 4093))
    with pytest.raises(UsageError, match="no tokens"):
        patch_model(model, "parallel", calibration=torch.zeros(0, 4, dtype=torch.long))
    with pytest.raises(UsageError, match="already"):
        patch_model(model, "serial").apply()
    with pytest.raises(UsageError, match="not exact"), patch_model(model, "parallel") as patch:
        patch.prove()


def test_models_that_cannot_be_changed_in_place():
    quantised = tiny_model("llama")
    quantised.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(UnsupportedError, match="quantised"):
        patch_model(quantised, "parallel").apply()
    empty = tiny_model("llama")
    empty.model.layers[0].mlp.to("meta")
    with pytest.raises(UnsupportedError, match="meta device"):
        patch_model(empty, "parallel").apply()
    split = tiny_model("llama")
    split._tp_size = 2
    with pytest.raises(UnsupportedError, match="tensor parallel"):
        patch_model(split, "parallel").apply()


def test_a_zero_attention_is_still_serial():
    """Forms are told apart by what flows where, not by values that happen to agree."""
    model = tiny_model("llama")
    nn.init.zeros_(model.model.layers[0].self_attn.o_proj.weight)
    assert [block.form for block in find_blocks(model)] == ["serial", "serial"]


def test_a_model_that_cannot_be_probed_is_refused():
    model = tiny_model("llama")

    def broken(*args, **kwargs):
        raise IndexError("out of positions\nand more")

    model.model.layers[1].mlp.forward = broken
    with pytest.raises(UnsupportedError, match=r"does not run on a probe of 8 tokens.*out of positions") as error:
        patch_model(model, "parallel").apply()
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", causal_types())
def test_every_causal_type_is_changed_right_or_refused(model_type):
    """Nothing crashes, nothing is off with the change switched off, and reverting is exact."""
    try:
        model = tiny_model(model_type)
    except UnsupportedError as reason:
        pytest.skip(str(reason))
    blocks = refused = None
    try:
        blocks = find_blocks(model)
    except UnsupportedError as reason:
        refused = str(reason)
    if blocks is None:
        assert "\n" not in refused
        assert ";" in refused  # it names the mend
        return
    before = logits(model)
    form = "serial" if all(block.form == "parallel" for block in blocks) else "parallel"
    with patch_model(model, form) as patch:
        measured = patch.measure()
    assert measured.residual == 0
    assert measured.kl > 0
    assert torch.equal(logits(model), before)
    for form in {block.form for block in blocks}:
        refused = None
        try:
            with patch_model(model, form, fused=True) as patch:
                patch.prove()
        except UnsupportedError as reason:
            refused = str(reason)
        assert refused is None or "cannot be fused" in refused
    assert torch.equal(logits(model), before)
