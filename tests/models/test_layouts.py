"""Every table entry against the class it describes: names, packing, pairing, norms, gates, and the config's count."""

from __future__ import annotations

from pathlib import Path

import canonical
import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from rehead.models.families import FAMILIES
from rehead.models.families.layouts import GATE, merge, shared_norm_names, split, tensor_names
from rehead.models.families.resolve import with_checkpoint_prefix
from rehead.models.heads import Heads

NAMES = [*FAMILIES, *tiny.VARIANTS, *tiny.CLAMPED]
IDS = torch.arange(24).view(2, 12) * 7 % tiny.VOCAB


def same(a: Heads, b: Heads) -> bool:
    left, right = a.tensors() | a.extras, b.tensors() | b.extras
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("name", NAMES)
def test_entry_describes_its_class(name: str, tmp_path: Path) -> None:
    """Saved tensors survive a round trip, and attention computed from canonical heads is the real module's."""
    family = tiny.family_of(name)
    model = tiny.tiny_model(name)
    config = model.config
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    stored = with_checkpoint_prefix(family, saved)
    layers = family.attention_layers(config)
    assert layers, "a tiny model has at least one attention layer"

    calls: dict[int, tuple] = {}
    for layer in range(config.num_hidden_layers):
        names = tensor_names(stored, config, layer, saved) + shared_norm_names(stored, config, layer, saved)
        prefix = stored.prefix(layer)
        if layer not in layers:
            # What a hybrid's other layers hold is not attention, though it may use the same names.
            continue
        # Nothing below the attention module may go unseen but what is the same for all heads.
        norms = tuple(prefix + stem + ".bias" for stem in (family.names.query_norm, family.names.key_norm))
        unseen = [key for key in saved if key.startswith(prefix) and key not in names and not key.endswith(norms)]
        assert not unseen
        model.get_submodule(family.prefix(layer)[:-1]).register_forward_hook(_recorder(calls, layer), with_kwargs=True)
    with torch.no_grad():
        logits = model(IDS, use_cache=False).logits
    assert logits.isfinite().all()

    for layer in layers:
        heads = split(stored, config, layer, saved)
        merged = merge(stored, layer, heads, saved)
        assert set(merged) == set(tensor_names(stored, config, layer, saved))
        assert all(torch.equal(merged[key], saved[key]) for key in merged)
        assert same(split(stored, config, layer, saved | merged), heads)
        x, kwargs, real = calls[layer]
        with torch.no_grad():
            computed = canonical.attention(family, model, layer, heads, saved, (x, kwargs))
        assert computed.std() > 1e-2, "the comparison would say nothing about zeros"
        torch.testing.assert_close(computed, real, atol=1e-5, rtol=1e-5)


def _recorder(calls: dict[int, tuple], layer: int):
    def hook(module, args, kwargs, output) -> None:
        x = kwargs.get("hidden_states", args[0] if args else None)
        calls[layer] = (x, kwargs, output[0] if isinstance(output, tuple) else output)

    return hook


@pytest.mark.parametrize("name", NAMES)
def test_output_joins_the_stream_as_documented(name: str) -> None:
    """``post_norm``, ``residual_scale`` and ``block``, by nudging the attention's output and watching the layer's.

    With the rest of the layer silenced, the nudge comes out scaled, unless a norm lies between; with the rest alive it
    still does in a parallel block, where nothing else reads the attention's output.
    """
    family = tiny.family_of(name)
    model = tiny.tiny_model(name)
    config = model.config
    nudge = torch.randn(2, 12, config.hidden_size, generator=torch.Generator().manual_seed(1))
    for layer in family.attention_layers(config):
        path = family.layer.format(i=layer)[:-1]
        attention = model.get_submodule(family.prefix(layer)[:-1])
        wanted = nudge * family.residual_scale(config, layer)
        alive = _answer(model, model.get_submodule(path), attention, nudge)
        others = [
            parameter
            for key, parameter in model.get_submodule(path).named_parameters()
            if not key.startswith(family.attention) and "norm" not in key.rsplit(".", 2)[-2] and "ln_" not in key
        ]
        with torch.no_grad():
            for parameter in others:
                parameter.zero_()
        silent = _answer(model, model.get_submodule(path), attention, nudge)
        assert torch.allclose(silent, wanted, atol=1e-4) is not family.post_norm_of(config)
        if others:  # some hybrids' layers hold attention and nothing else
            assert torch.allclose(alive, wanted, atol=1e-4) is (family.block_of(config) == "parallel")


def _answer(model, layer, attention, nudge: torch.Tensor) -> torch.Tensor:
    """How a decoder layer's output changes when ``nudge`` is added to its attention's."""
    outputs = []
    for amount in (0.0, 1.0):

        def add(module, args, output, amount=amount):
            return (output[0] + amount * nudge, *output[1:]) if isinstance(output, tuple) else output + amount * nudge

        handles = [
            attention.register_forward_hook(add),
            layer.register_forward_hook(lambda m, a, out: outputs.append(out[0] if isinstance(out, tuple) else out)),
        ]
        with torch.no_grad():
            model(IDS, use_cache=False)
        for handle in handles:
            handle.remove()
    return outputs[1] - outputs[0]


@pytest.mark.parametrize("name", NAMES)
def test_class_takes_fewer_heads(name: str) -> None:
    """``set_kv`` makes a config whose class has exactly the shapes that merging fewer heads gives."""
    family = tiny.family_of(name)
    config = tiny.tiny_config(name)
    old = family.num_kv_heads(config)
    raw = config.to_diff_dict()  # as save_pretrained writes it
    model = _on_meta(config)
    for kv in [k for k in (old, old // 2, 1) if k]:
        refused = family.refusal(config, kv)
        if refused or (family.hosted and kv != old):
            continue
        changed = {**raw}
        family.set_kv(changed, kv) if kv != old else None
        target = AutoConfig.for_model(**changed)
        assert family.num_kv_heads(target) == kv
        wanted = {key: tuple(value.shape) for key, value in _on_meta(target).state_dict().items()}
        state = dict(model.state_dict())
        for layer in family.attention_layers(config):
            heads = split(family, config, layer, state)
            heads = _first_of_groups(heads, kv)
            for key in tensor_names(family, config, layer, state):
                del state[key]
            state |= merge(family, layer, heads, model.state_dict())
        assert {key: tuple(value.shape) for key, value in state.items()} == wanted


def _on_meta(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _first_of_groups(heads: Heads, kv: int) -> Heads:
    step = heads.num_kv_heads // kv
    fields = ["k", "v", "k_bias", "v_bias"]
    if heads.k_norm is not None and heads.k_norm.ndim == 2:
        fields.append("k_norm")
    kept = {key: getattr(heads, key) for key in fields}
    return Heads(**{**vars(heads), **{key: t[::step] if t is not None else None for key, t in kept.items()}})


def test_packings_place_rows_as_documented() -> None:
    """Blocks and groups by hand, so that a mistake made twice in split and merge still shows."""
    from rehead.models.families.layouts import _pack, _unpack

    fused = torch.arange((4 + 2 * 2) * 3)[:, None]
    q, k, v = _unpack(fused, "blocks", 4, 2, 3)
    assert q.flatten().tolist() == list(range(12))
    assert k.flatten().tolist() == list(range(12, 18))
    assert v.flatten().tolist() == list(range(18, 24))
    q, k, v = _unpack(fused, "groups", 4, 2, 3)
    assert q.flatten().tolist() == [*range(6), *range(12, 18)]
    assert k.flatten().tolist() == [*range(6, 9), *range(18, 21)]
    assert v.flatten().tolist() == [*range(9, 12), *range(21, 24)]
    for packing in ("blocks", "groups"):
        parts = [t.reshape(-1, 3, 1) for t in _unpack(fused, packing, 4, 2, 3)]
        assert torch.equal(_pack(*parts, packing), fused)
    fused = torch.arange(4 * 3 * 2 * 3)[:, None]  # four parts of two heads: queries, values, keys
    q, k, v = _unpack(fused, "quarters", 8, 8, 3)
    assert q.flatten().tolist() == [*range(6), *range(18, 24), *range(36, 42), *range(54, 60)]
    assert v.flatten().tolist()[:6] == list(range(6, 12))
    assert k.flatten().tolist()[:6] == list(range(12, 18))
    assert torch.equal(_pack(*(t.reshape(-1, 3, 1) for t in (q, k, v)), "quarters"), fused)


@pytest.mark.parametrize("name", ["gpt_oss", "afmoe", "beam", "bitnet", "qwen3_next", "laguna", "olmo2", "cohere"])
def test_moving_query_heads_moves_all_that_is_theirs(name: str) -> None:
    """Swapping whole groups (query heads with sinks, gates and norms, KV heads) leaves the layer's output as it was."""
    family = tiny.family_of(name)
    model = tiny.tiny_model(name)
    config, state = model.config, dict(model.state_dict())
    before = _logits(model)
    order = torch.arange(tiny.KV_HEADS - 1, -1, -1)
    for layer in family.attention_layers(config):
        heads = split(family, config, layer, state)
        group = heads.group_size
        queries = (order[:, None] * group + torch.arange(group)).flatten()
        moved = heads.permute_queries(queries)
        moved.k, moved.v = heads.k[order], heads.v[order]
        for key in ("k_bias", "v_bias"):
            if getattr(heads, key) is not None:
                setattr(moved, key, getattr(heads, key)[order])
        if heads.k_norm is not None and heads.k_norm.ndim == 2:
            moved.k_norm = heads.k_norm[order]
        state |= merge(family, layer, moved, state)
    model.load_state_dict(state)
    torch.testing.assert_close(_logits(model), before, atol=1e-5, rtol=1e-5)
    if family.gate_in_query:
        assert GATE in heads.extras


def _logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits
