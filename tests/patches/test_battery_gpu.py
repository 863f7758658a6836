"""The patch on a GPU: the same architectures through the Triton kernels, static caches and compiled generation."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from rehead.attention.attend import attention
from rehead.benchmarks.tiny import tiny_model
from rehead.models.modeling.modeling_rehead_cache import cache_argument
from rehead.patches import patch_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

ARCHS = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {}),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3_text", {}),
    "gpt_oss": ("gpt_oss", {}),
    "llama4": ("llama4_text", {}),
    "gpt2": ("gpt2", {}),
    "falcon-alibi": (
        "falcon",
        {"alibi": True, "new_decoder_architecture": False, "multi_query": False, "num_kv_heads": 4},
    ),
    "bloom": ("bloom", {}),
    "mpt": ("mpt", {}),
    "deepseek_v3": ("deepseek_v3", {}),
}
TOKENS = torch.randint(8, 128, (2, 40), generator=torch.Generator().manual_seed(3))
LEFT = torch.ones(2, 40, dtype=torch.long)
LEFT[0, :9] = 0
# The kernels' float32 products keep more than TF32 does; logits of these models reach about ten.
TOLERANCE = 2e-4


def build(arch):
    model_type, overrides = ARCHS[arch]
    return tiny_model(model_type, **overrides).cuda()


@pytest.fixture(autouse=True)
def full_precision():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def close(mine, theirs, keep=None):
    if keep is not None:
        keep = keep.bool().to(mine.device)
        mine, theirs = mine[keep], theirs[keep]
    assert float((mine - theirs).abs().max()) <= TOLERANCE * max(1.0, float(theirs.abs().max()))


@pytest.mark.parametrize("arch", ARCHS)
def test_proof_and_revert(arch):
    model = build(arch)
    ids = TOKENS.cuda()
    before = model(ids, use_cache=False).logits
    with patch_model(model, "tiled") as patch:
        proof = patch.prove(tolerance=TOLERANCE)
        assert proof.leak <= proof.unpatched_leak
    assert torch.equal(model(ids, use_cache=False).logits, before)


def test_autocast():
    model = build("llama")
    ids = TOKENS.cuda()
    with torch.autocast("cuda", dtype=torch.bfloat16), torch.no_grad():
        theirs = model(ids, use_cache=False).logits
        with patch_model(model, "tiled"):
            mine = model(ids, use_cache=False).logits
    assert float((mine - theirs).abs().max()) <= 4e-2 * float(theirs.abs().max())


def test_any_layout_and_more_pairs_than_the_decode_grid_holds():
    """A head_dim that is not contiguous is copied; 65,536 pairs of row and KV head take the general kernels."""
    query, key, value = (torch.randn(1 << 13, 8, s, 16, device="cuda") for s in (1, 5, 5))
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)
    out = attention(query, key, value, causal=False)
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-4)
    strided = key.transpose(2, 3).contiguous().transpose(2, 3)
    torch.testing.assert_close(
        attention(query[:9], strided[:9], value[:9], causal=False), out[:9], atol=2e-5, rtol=1e-4
    )


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("arch", ["llama", "mistral", "gemma3", "gpt_oss", "llama4", "gpt2", "deepseek_v3"])
def test_decoding(arch, static):
    model = build(arch)
    ids, mask = TOKENS.cuda(), LEFT.cuda()

    def run():
        cache = StaticCache(config=model.config, max_cache_len=48) if static else DynamicCache(config=model.config)
        out = []
        with torch.no_grad():
            for start, stop in [(0, 30), *((i, i + 1) for i in range(30, 36)), (36, 40)]:
                step = model(ids[:, start:stop], attention_mask=mask[:, :stop], use_cache=True, **cache_argument(cache))
                out.append(step.logits)
        return torch.cat(out, 1)

    theirs = run()
    with patch_model(model, "tiled") as patch:
        mine = run()
        assert all(layer.calls > 0 for layer in patch.report().layers)
    close(mine, theirs, LEFT)


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt_oss"])
def test_gradients(arch):
    model = build(arch).train()
    ids, mask = TOKENS.cuda(), LEFT.cuda()
    labels = ids.masked_fill((mask == 0) | (torch.cat([mask[:, :1] * 0, mask[:, :-1]], 1) == 0), -100)

    def run():
        model.zero_grad(set_to_none=True)
        model(ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    theirs = run()
    with patch_model(model, "tiled"):
        mine = run()
    for name, grad in theirs.items():
        assert float((mine[name] - grad).abs().max()) <= 1e-3 * max(1e-2, float(grad.abs().max())), name


@pytest.mark.parametrize("arch", ["llama", "deepseek_v3"])
def test_compiled_generation_under_a_static_cache(arch):
    """generate compiles its decode step and, with reduce-overhead, replays it as a CUDA graph."""
    model = build(arch)
    arguments = {
        "attention_mask": LEFT.cuda(),
        "max_new_tokens": 12,
        "do_sample": False,
        "cache_implementation": "static",
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    theirs = model.generate(TOKENS.cuda(), disable_compile=True, **arguments)
    with patch_model(model, "tiled"):
        plain = model.generate(TOKENS.cuda(), disable_compile=True, **arguments)
        compiled = model.generate(TOKENS.cuda(), **arguments)
    assert torch.equal(plain, theirs)
    assert torch.equal(compiled, theirs)


def test_half_precision_model_is_proved():
    model = build("llama").to(torch.bfloat16)
    with patch_model(model, "tiled") as patch:
        patch.prove()
