"""Fused blocks equal unfused ones, train, and give their weights back."""

import copy

import pytest
import torch
import transformers
from torch import nn

from rehead.benchmarks.tiny import tiny_model
from rehead.errors import UnsupportedError, UsageError, VerificationError
from rehead.patches import patch_model
from rehead.recipes.training.models import checkpoint_activations
from rehead.variants.fuse.norms import NormKind, fold, norm_kind

TOKENS = torch.randint(8, 128, (2, 20), generator=torch.Generator().manual_seed(0))
TYPES = (
    "llama", "qwen2", "qwen3", "gemma", "phi3", "olmo", "granite", "stablelm", "nemotron", "gpt2", "gpt_neox", "gptj",
    "phi", "falcon", "cohere",
    *(pytest.param(name, marks=pytest.mark.slow) for name in (
        "mistral", "starcoder2", "gpt_bigcode", "gpt_neo", "persimmon", "codegen", "helium", "glm", "arcee", "cohere2",
    )),
)  # fmt: skip


def logits(model, **kwargs):
    with torch.no_grad():
        return model(TOKENS, use_cache=False, **kwargs).logits


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_what_16_bits_do_by_themselves_is_not_held_against_fusing(monkeypatch):
    """Deep blocks that enlarge roundings: refused by a bound that knows the dtype alone."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=32, num_attention_heads=4, num_key_value_heads=1,
        vocab_size=128, initializer_range=0.25,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval().to(torch.bfloat16)
    with patch_model(model, "parallel", fused=True) as patch:
        proof = patch.prove()
        assert proof.difference < proof.tolerance
    monkeypatch.setattr("rehead.models.tolerance.ROUNDINGS", 0)
    with pytest.raises(UnsupportedError, match="something else when fused"):
        patch_model(model, "parallel", fused=True).apply()


@pytest.mark.parametrize("form", ["parallel", "serial"])
@pytest.mark.parametrize("model_type", TYPES)
def test_fused_equals_unfused(model_type, form):
    model = tiny_model(model_type)
    before, weights = logits(model), state(model)
    with patch_model(model, form, fused=True) as patch:
        proof = patch.prove()
        assert proof.difference <= 1e-5 * max(1.0, float(before.abs().max()))
        assert proof.layers == 2
        if patch.exact:
            assert proof.against == "unpatched"
        else:
            measured = patch.measure(input_ids=TOKENS)
            assert measured.kl > 1e-4
            assert measured.residual <= 1e-5 * max(1.0, float(before.abs().max()))
    assert torch.equal(logits(model), before)
    now = model.state_dict()
    assert list(now) == list(weights)
    assert all(torch.equal(now[name], weights[name]) for name in weights)


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("falcon", {"new_decoder_architecture": True}),
        ("falcon", {"parallel_attn": False, "alibi": True}),
        ("gpt_neox", {"use_parallel_residual": False}),
        ("stablelm", {"use_parallel_residual": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("cohere", {"use_qk_norm": True}),
    ],
)
@pytest.mark.parametrize("form", ["parallel", "serial"])
def test_variants_of_a_class(model_type, config, form):
    model = tiny_model(model_type, **config)
    with patch_model(model, form, fused=True) as patch:
        patch.prove()


def test_products_are_as_few_as_promised():
    model = tiny_model("llama")
    calls = []

    def count(name):
        return lambda *args: calls.append(name)

    for form, want in (("parallel", 2), ("serial", 4)):
        with patch_model(model, form, fused=True, layers=[0]):
            layer = model.model.layers[0]
            handles = [
                m.register_forward_hook(count(n))
                for n, m in layer.named_modules()
                if getattr(m, "weight", None) is not None and m.weight.ndim == 2
            ]
            logits(model)
            for handle in handles:
                handle.remove()
            assert len(calls) == want, calls
            calls.clear()


def test_generates_as_unfused():
    model = tiny_model("llama")

    def write(**options):
        with patch_model(model, "parallel", **options):
            return model.generate(TOKENS[:, :8], max_new_tokens=8, do_sample=False, pad_token_id=0)

    assert torch.equal(write(fused=True), write())


def test_gradients_are_the_unfused_ones():
    """The gradient of a fused matrix is that of its pieces through the norm's weight; checkpointing changes nothing."""
    model = tiny_model("llama").train()
    with patch_model(model, "parallel"):
        model(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    layer = model.model.layers[0]
    gain = layer.input_layernorm.weight.detach()
    want_q = layer.self_attn.q_proj.weight.grad / gain
    want_out = torch.cat([layer.self_attn.o_proj.weight.grad, layer.mlp.down_proj.weight.grad], 1)
    model.zero_grad()
    for checkpointing in (False, True):
        if checkpointing:
            checkpoint_activations(model)
        with patch_model(model, "parallel", fused=True):
            model(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
            got_in, got_out = layer.rehead_fused_in.weight.grad, layer.rehead_fused_out.weight.grad
            torch.testing.assert_close(got_in[: len(want_q)], want_q, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(got_out, want_out, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("form", ["parallel", "serial"])
@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        *((name, {}) for name in ("llama", "qwen2", "gemma", "phi", "gpt2", "gpt_neox")),
        ("olmo", {"clip_qkv": 0.5}),  # clamps queries, keys and values where they are
        ("llama", {"attention_bias": True}),  # of its two output matrices one has a bias
    ],
)
def test_trained_weights_go_back(model_type, config, form):
    """What was trained fused is what the reverted model computes, in the form that it was trained in."""
    model = tiny_model(model_type, **config).train()
    patch = patch_model(model, form, fused=True).apply()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(TOKENS, labels=TOKENS, use_cache=False).loss
        losses.append(float(loss))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    assert losses[-1] < losses[0] - 0.1
    trained = logits(model)
    exact = patch.exact
    patch.revert()
    if exact:
        torch.testing.assert_close(logits(model), trained, atol=3e-5, rtol=1e-4)
    else:
        with patch_model(model, form):
            torch.testing.assert_close(logits(model), trained, atol=3e-5, rtol=1e-4)


def test_weights_that_cannot_be_taken_apart_stay_fused():
    """StableLM's norms have biases and its matrices have none."""
    model = tiny_model("stablelm").train()
    patch = patch_model(model, "parallel", fused=True).apply()
    with torch.no_grad():
        model.model.layers[1].rehead_fused_in.weight.mul_(1.1)
    before = logits(model)
    with pytest.raises(UnsupportedError, match="keep it fused"):
        patch.revert()
    assert patch.applied
    assert torch.equal(logits(model), before)


def test_a_move_while_fused_comes_along():
    model = tiny_model("llama")
    patch = patch_model(model, "parallel", fused=True).apply()
    model.double()
    patch.revert()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    torch.testing.assert_close(logits(model).float(), logits(tiny_model("llama")), atol=1e-4, rtol=1e-4)


def test_half_precision():
    model = tiny_model("llama").to(torch.bfloat16)
    before = logits(model)
    with patch_model(model, "parallel", fused=True) as patch:
        patch.prove()
    assert torch.equal(logits(model), before)


def test_compiled_whole():
    """A block in its other form, and one that is fused besides, in one graph."""
    model = tiny_model("llama")
    with patch_model(model, "parallel"), patch_model(model, "fuse", layers=[1]):
        want = logits(model)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(logits(compiled), want, atol=1e-5, rtol=1e-5)
        torch._dynamo.reset()


def test_a_copy_of_a_fused_model_is_its_own():
    model = tiny_model("llama")
    with patch_model(model, "parallel", fused=True):
        want = logits(model)
        twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), want)
    with torch.no_grad():
        twin.model.layers[0].rehead_fused_in.weight.zero_()
    assert not torch.equal(logits(twin), want)


# Refusals and proofs that fail when they should


def test_a_broken_fusion_fails_its_proof():
    model = tiny_model("llama")
    with patch_model(model, "parallel", fused=True) as patch:
        model.model.layers[0].input_layernorm.kind = NormKind(False, 0.0, 1.0)
        with pytest.raises(VerificationError, match="patched logits differ"):
            patch.prove()


def test_a_proof_leaves_an_optimizer_its_parameters():
    model = tiny_model("llama")
    with patch_model(model, "parallel", fused=True) as patch:
        before = dict(model.named_parameters())
        patch.prove()
        patch.measure(input_ids=TOKENS)
        after = dict(model.named_parameters())
        assert list(before) == list(after)
        assert all(before[name] is after[name] for name in before)
        with torch.no_grad():
            before["model.layers.0.rehead_fused_out.weight"].mul_(1.01)
        with pytest.raises(UsageError, match="changed while fused"):
            patch.prove()


def test_something_else_that_reads_the_norm_is_found_out():
    model = tiny_model("llama")
    attention = model.model.layers[0].self_attn
    inner = type(attention).forward

    def forward(hidden_states, **kwargs):
        out, weights = inner(attention, hidden_states=hidden_states, **kwargs)
        return out * (1 + hidden_states.mean(-1, keepdim=True)), weights

    attention.forward = forward
    before = logits(model)
    with pytest.raises(UnsupportedError, match="fused"):
        patch_model(model, "parallel", fused=True).apply()
    assert torch.equal(logits(model), before)


def test_refusals():
    with pytest.raises(UnsupportedError, match="MixtralSparseMoeBlock reads the norm"):
        patch_model(tiny_model("mixtral"), "parallel", fused=True).apply()
    partly = tiny_model("llama")
    partly.model.layers[1].self_attn.q_proj.weight.requires_grad_(False)
    with pytest.raises(UnsupportedError, match="frozen"):
        patch_model(partly, "parallel", fused=True).apply()
    model = tiny_model("llama")
    with patch_model(model, "parallel", fused=True), pytest.raises(UsageError, match="revert"):
        model.save_pretrained("nowhere")
    assert "save_pretrained" not in model.__dict__


def test_adapters():
    """LoRA: the forms apply with adapters in place; fusing would bypass them, and is refused."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj", "down_proj"])).eval()
    before = logits(model)
    with patch_model(model, "parallel"):
        assert not torch.equal(logits(model), before)
    with pytest.raises(UnsupportedError, match="cannot be fused"):
        patch_model(model, "parallel", fused=True).apply()
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_folding(centred, offset):
    generator = torch.Generator().manual_seed(0)
    weight, bias, c = (torch.randn(size, generator=generator, dtype=torch.float64) for size in (16, 16, 5))
    matrix, x = (torch.randn(size, generator=generator, dtype=torch.float64) for size in ((5, 16), (3, 16)))
    kind = NormKind(centred, offset, 1e-5)
    n = x - x.mean(-1, keepdim=True) if centred else x
    n = n / (n.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    want = (n * (weight + offset) + bias) @ matrix.T + c
    folded, shift = fold(matrix, c, kind, weight, bias)
    torch.testing.assert_close(kind.normalise(x) @ folded.T + shift, want)


def test_kinds_of_norms():
    class Odd(nn.Module):
        eps = 1e-5

        def forward(self, x):
            return x / x.abs().mean(-1, keepdim=True)

    assert norm_kind(nn.LayerNorm(8, eps=1e-3), 8) == NormKind(True, 0.0, 1e-3)
    assert norm_kind(nn.RMSNorm(8, eps=1e-6), 8) == NormKind(False, 0.0, 1e-6)
    assert norm_kind(Odd(), 8) is None


def test_a_proof_counts_its_own_calls_and_takes_a_tolerance():
    model = tiny_model("llama")
    with patch_model(model, "parallel", fused=True) as patch:
        calls = patch.prove().calls
        logits(model)
        assert patch.prove().calls == calls > 0
        assert {layer.how for layer in patch.report().layers} == {"fused"}
        with pytest.raises(VerificationError, match=r"over the 0.00e\+00 allowed"):
            patch.prove(tolerance=0.0)


def test_a_frozen_model_stays_frozen_when_fused():
    model = tiny_model("llama", attention_bias=True).requires_grad_(False)
    with patch_model(model, "parallel", fused=True):
        assert not any(parameter.requires_grad for parameter in model.parameters())


def test_fusing_alone_has_nothing_to_measure():
    with patch_model(tiny_model("phi"), "parallel", fused=True) as patch:
        assert patch.exact
        with pytest.raises(UsageError, match="exact"):
            patch.measure()
