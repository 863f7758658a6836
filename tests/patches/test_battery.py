"""Every architecture in every situation: patched against eager, in float32, to 1e-5 of the largest logit.

A pairing is skipped only where eager attention itself cannot run it (no position_ids, no sliding layers, a cache that
the model refuses).
"""

import functools
import inspect

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.masking_utils import create_masks_for_generate

from rehead.attention.discover import mask_style
from rehead.benchmarks.tiny import tiny_model
from rehead.models.modeling.modeling_rehead_cache import cache_argument
from rehead.patches import patch_model
from rehead.recipes.training.models import checkpoint_activations

ALIBI = {"alibi": True, "new_decoder_architecture": False, "multi_query": False, "num_kv_heads": 4}
ARCHS = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {}),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3_text", {}),
    "gpt_oss": ("gpt_oss", {}),
    "llama4": ("llama4_text", {}),
    "qwen3": ("qwen3", {}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt2": ("gpt2", {}),
    "opt": ("opt", {}),
    "phi": ("phi", {}),
    "cohere": ("cohere", {}),
    "falcon": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-mqa": ("falcon", {"new_decoder_architecture": False, "multi_query": True}),
    "falcon-alibi": ("falcon", ALIBI),
    "bloom": ("bloom", {}),
    "mpt": ("mpt", {}),
    "gptj": ("gptj", {}),
    "deepseek_v3": ("deepseek_v3", {}),
    "youtu": ("youtu", {}),
}
# Under eager, transformers adds falcon's ALiBi twice; its SDPA path is the function that falcon-rw was trained as.
REFERENCE = {"falcon-alibi": "sdpa"}

TOKENS = torch.randint(8, 128, (2, 40), generator=torch.Generator().manual_seed(3))
LEFT = torch.ones(2, 40, dtype=torch.long)
LEFT[0, :9] = 0
RIGHT = LEFT.flip(1)


def build(arch):
    model_type, overrides = ARCHS[arch]
    return tiny_model(model_type, REFERENCE.get(arch, "eager"), **overrides)


@functools.cache
def shared(arch):
    return build(arch)


def close(mine, theirs, keep=None):
    if keep is not None:
        mine, theirs = mine[keep.bool()], theirs[keep.bool()]
    limit = 1e-5 * max(1.0, float(theirs.abs().max()))
    assert float((mine - theirs).abs().max()) <= limit


def both(arch, run):
    """Run on the eager model, then on the same model patched; skip where eager cannot."""
    model = shared(arch)
    torch.manual_seed(0)
    try:
        theirs = run(model)
    except Exception as error:
        pytest.skip(f"eager {arch} cannot run this: {type(error).__name__}: {str(error)[:80]}")
    with patch_model(model, "tiled") as patch:
        torch.manual_seed(0)
        mine = run(model)
        assert all(layer.calls > 0 for layer in patch.report().layers)
    return mine, theirs


def no_mask(arch):
    close(*both(arch, lambda m: m(TOKENS, use_cache=False).logits))


def left_padding(arch):
    close(*both(arch, lambda m: m(TOKENS, attention_mask=LEFT, use_cache=False).logits), LEFT)


def right_padding(arch):
    close(*both(arch, lambda m: m(TOKENS, attention_mask=RIGHT, use_cache=False).logits), RIGHT)


def packed(arch):
    if "position_ids" not in inspect.signature(shared(arch).forward).parameters or arch.startswith("falcon"):
        pytest.skip(f"{arch} has no packed sequences in transformers")
    positions = torch.cat([torch.arange(17), torch.arange(23)])[None]
    mine, theirs = both(arch, lambda m: m(TOKENS[:1], position_ids=positions, use_cache=False).logits)
    close(mine, theirs)
    # Another first sequence must not change the second.
    other = TOKENS[:1].clone()
    other[:, :17] = other[:, :17].flip(1)
    again, reference = both(arch, lambda m: m(other, position_ids=positions, use_cache=False).logits)
    close(again, reference)
    if float((reference - theirs)[:, 17:].abs().max()) < 1e-4:
        close(again[:, 17:], mine[:, 17:])
    else:
        # OPT, like the falcons, does not hand positions to its mask: packing leaks there in eager too.
        assert arch in ("opt", "gpt_oss")


def through_cache(make, steps, mask):
    """Feed the tokens in steps through a cache; logits of all steps on rows that are tokens."""

    def run(model):
        cache = make(model)
        out = []
        # ALiBi is built from the 2-D mask at the length of a static cache (its own `generate` pads it so).
        full = mask is not None and make is static and model.config.model_type in ("bloom", "falcon")
        padded = torch.nn.functional.pad(mask, (0, 8)) if full else mask
        with torch.no_grad():
            for start, stop in steps:
                step = model(
                    TOKENS[:, start:stop],
                    attention_mask=padded if full or mask is None else mask[:, :stop],
                    **cache_argument(cache),
                    use_cache=True,
                )
                out.append(step.logits[:, : stop - start])
        logits = torch.cat(out, 1)
        return logits if mask is None else logits[mask[:, : logits.shape[1]].bool()]

    return run


def dynamic(model):
    return DynamicCache(config=model.config)


def static(model):
    return StaticCache(config=model.config, max_cache_len=48)


ONE_BY_ONE = [(0, 30), *((i, i + 1) for i in range(30, 40))]


def chunked_prefill(arch):
    close(*both(arch, through_cache(dynamic, [(0, 13), (13, 30), (30, 40)], LEFT)))


def dynamic_cache(arch):
    close(*both(arch, through_cache(dynamic, ONE_BY_ONE, LEFT)))
    close(*both(arch, through_cache(dynamic, ONE_BY_ONE, None)))


def static_cache(arch):
    close(*both(arch, through_cache(static, ONE_BY_ONE, LEFT)))
    if arch != "falcon-alibi":  # eager builds its ALiBi for the tokens, not for the cache
        close(*both(arch, through_cache(static, [(0, 25), (25, 40)], None)))


def sliding_cache(arch):
    kinds = getattr(shared(arch).config, "layer_types", None) or []
    sliding = getattr(shared(arch).config, "sliding_window", None) or ("chunked_attention" in kinds)
    if not sliding or arch in ("qwen3", "phi"):
        pytest.skip(f"{arch} has no sliding layers")
    # A window of 16 is full before the prefill ends, after it, and in the middle of a chunk.
    for steps in ([(0, 12), (12, 13), (13, 14), (14, 21), (21, 40)], [(0, 20), *((i, i + 1) for i in range(20, 40))]):
        for make in (dynamic, static):
            for mask in (None, LEFT):
                close(*both(arch, through_cache(make, steps, mask)))


def gradients(model, mask=LEFT):
    model.zero_grad(set_to_none=True)
    # The first token of a padded row is predicted from a row that sees nothing, whose value nothing defines.
    first = torch.cat([mask[:, :1] * 0, mask[:, :-1]], 1)
    labels = TOKENS.masked_fill((mask == 0) | (first == 0), -100)
    loss = model(TOKENS, attention_mask=mask, labels=labels, use_cache=False).loss
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return grads


def same_gradients(arch, run):
    mine, theirs = both(arch, run)
    assert mine.keys() == theirs.keys()
    for name, grad in theirs.items():
        scale = max(float(grad.abs().max()), 1e-3)
        assert float((mine[name] - grad).abs().max()) <= 2e-5 * max(1.0, scale), name


def training(arch):
    def run(model):
        model.train()
        try:
            return gradients(model)
        finally:
            model.eval()

    same_gradients(arch, run)


def gradient_checkpointing(arch):
    def run(model):
        model.train()
        checkpoint_activations(model)
        try:
            return gradients(model)
        finally:
            model._set_gradient_checkpointing(enable=False)
            model.eval()

    same_gradients(arch, run)


def peft_wrapped(arch):
    peft = pytest.importorskip("peft")
    base = build(arch)
    linear = {
        name.rpartition(".")[2] for name, m in base.named_modules() if "attn" in name.lower() or "attention" in name
    }
    names = [n for n in ("q_proj", "c_attn", "query_key_value", "Wqkv", "kv_b_proj") if n in linear]
    assert names
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=names, init_lora_weights=False))
    model.eval()
    theirs = model(input_ids=TOKENS, attention_mask=LEFT, use_cache=False).logits
    with patch_model(model, "tiled") as patch:
        close(model(input_ids=TOKENS, attention_mask=LEFT, use_cache=False).logits, theirs, LEFT)
        assert all(layer.calls > 0 for layer in patch.report().layers)
        patch.prove()
    assert torch.equal(model(input_ids=TOKENS, attention_mask=LEFT, use_cache=False).logits, theirs)


def compiled(arch, backend="aot_eager"):
    torch._dynamo.reset()

    def run(model):
        return model(TOKENS, attention_mask=LEFT, use_cache=False).logits

    model = shared(arch)
    theirs = run(model)
    with patch_model(model, "tiled"), torch.no_grad():
        fast = torch.compile(model, backend=backend)
        mine = fast(TOKENS, attention_mask=LEFT, use_cache=False).logits
    close(mine, theirs, LEFT)


SITUATIONS = [
    no_mask, left_padding, right_padding, packed, chunked_prefill, dynamic_cache, static_cache, sliding_cache,
    training, gradient_checkpointing, peft_wrapped,
]  # fmt: skip


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("arch", ARCHS)
def test_parity(arch, situation):
    situation(arch)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3"])
def test_parity_compiled(arch):
    compiled(arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_parity_compiled_everywhere(arch):
    compiled(arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["llama", "gpt_oss"])
def test_parity_compiled_by_inductor(arch):
    compiled(arch, "inductor")


def traces(model):
    """Everything about a model that a revert has to restore, besides its outputs."""
    return {
        name: (
            sorted(module.__dict__),
            {key: id(value) for key, value in module.__dict__.items() if not key.startswith("_")},
            len(module._forward_pre_hooks),
            len(module._forward_hooks),
            getattr(module.__dict__.get("config"), "_attn_implementation", None),
        )
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("arch", ARCHS)
def test_proof_leak_and_revert(arch):
    model = shared(arch)
    before, config = model(TOKENS, use_cache=False).logits, model.config.to_dict()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen = traces(model)
    with patch_model(model, "tiled") as patch:
        proof = patch.prove()
        assert proof.leak == 0.0
        assert proof.layers == len(patch.report().layers)
    assert torch.equal(model(TOKENS, use_cache=False).logits, before)
    assert traces(model) == seen
    assert model.config.to_dict() == config
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_training_compiles_without_graph_breaks():
    torch._dynamo.reset()
    model = shared("llama")
    theirs = model(TOKENS, attention_mask=LEFT, use_cache=False).logits
    with patch_model(model, "tiled"):
        fast = torch.compile(model, backend="aot_eager", fullgraph=True)
        close(fast(TOKENS, attention_mask=LEFT, use_cache=False).logits, theirs, LEFT)
        fast(TOKENS, attention_mask=LEFT, use_cache=False).logits.sum().backward()
        # Without a mask transformers hands over positions, which are looked at outside the graph.
        plain = torch.compile(model, backend="aot_eager")
        close(plain(TOKENS, use_cache=False).logits, model(TOKENS, use_cache=False).logits)
    model.zero_grad(set_to_none=True)


def test_a_model_loaded_by_name_compiles_without_graph_breaks():
    """Before anything has looked at its class."""
    torch._dynamo.reset()
    mask_style.cache_clear()
    model = tiny_model("llama", "rehead_tiled")
    fast = torch.compile(model, backend="aot_eager", fullgraph=True)
    theirs = shared("llama")(TOKENS, attention_mask=LEFT, use_cache=False).logits
    close(fast(TOKENS, attention_mask=LEFT, use_cache=False).logits, theirs, LEFT)


@pytest.mark.parametrize("arch", ["llama", "gpt_oss"])
def test_compiled_decoding_is_one_graph(arch, monkeypatch):
    """As `generate` does on a GPU: masks made outside, positions as tensors; every step runs the same graph."""
    monkeypatch.setattr("rehead.attention.mask_function._may_wait", lambda tensor, rows: rows > 16)
    model = shared(arch)

    def run(step):
        cache = static(model)
        with torch.no_grad():
            out = [model(TOKENS[:, :30], attention_mask=LEFT[:, :30], use_cache=True, **cache_argument(cache)).logits]
            for i in range(30, 36):
                blank = torch.empty(2, 1, 0)
                mask = create_masks_for_generate(model.config, blank, LEFT[:, : i + 1], cache, None)
                positions = torch.full((2, 1), i)
                out.append(
                    step(
                        TOKENS[:, i : i + 1],
                        attention_mask=mask,
                        **cache_argument(cache),
                        use_cache=True,
                        position_ids=positions,
                    ).logits
                )
        return torch.cat(out, 1)

    theirs = run(model)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    with patch_model(model, "tiled"):
        mine = run(torch.compile(model.__call__, backend="aot_eager"))
    close(mine, theirs, LEFT[:, :36])
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] <= 2
