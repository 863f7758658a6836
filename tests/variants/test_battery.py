"""One battery for every variant: what each must do on a live model, from its easiest options to its hardest.

A new variant adds its rows to :data:`ROWS`; nothing else here names one.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from transformers import DynamicCache, modeling_rope_utils

from rehead.benchmarks.tiny import tiny_model
from rehead.models.modeling.modeling_rehead_cache import cache_argument
from rehead.patches import live_names, patch_model
from rehead.variants.contract import VARIANTS
from rehead.variants.stack import stack_of

TOKENS = torch.randint(8, 120, (2, 26), generator=torch.Generator().manual_seed(0))
PADDED = torch.ones_like(TOKENS)
PADDED[0, :6] = 0

#: Tiny models: attention by the interface and by an adapter, serial and parallel blocks, windows and soft caps of their
#: own; and the variant that changes the form of their blocks, where one does.
MODELS = {
    "llama": ("llama", {}, "parallel"),
    # With older transformers its sdpa leaves the cap on scores out.
    "gemma2": ("gemma2", {"attn_implementation": "eager"}, None),
    "gptj": ("gptj", {}, "serial"),
    "gpt2": ("gpt2", {}, "parallel"),
}

#: With older transformers a longrope model asks for the text's length between two graphs.
LONGROPE_TRACES = "torch.where" in inspect.getsource(modeling_rope_utils.dynamic_rope_update)


@dataclass(frozen=True)
class Row:
    """One variant under some options.

    Attributes:
        variant: its name.
        options: of the variant.
        models: of :data:`MODELS`; all by default.
        decodes: largest difference between decoding from a cache and one pass, as a share of the largest logit.
        one_graph: a compiled model computes texts with it in one graph.
        padded_graph: padded ones too.
    """

    variant: str
    options: dict[str, Any] = field(default_factory=dict)
    models: tuple[str, ...] = tuple(MODELS)
    decodes: float = 2e-5
    one_graph: bool = True
    padded_graph: bool = True

    def __str__(self) -> str:
        return "-".join([self.variant, *(f"{name}={value}" for name, value in self.options.items())])


ROWS = (
    Row("tiled"),
    Row("tiled", {"window": 9}, ("gemma2",), one_graph=False),
    Row("window", {"size": 20}, ("llama",)),
    Row("window", {"size": 5, "sinks": 3}),
    Row("window", {"size": 1, "sinks": 1, "layers": [1]}, ("gpt2",)),
    Row(
        "sparse",
        {"lost_mass": 0.5, "min_keys": 4, "block": 16, "first": 0, "local": 0},
        ("llama", "gptj", "gpt2"),
        9.0,
        one_graph=False,
    ),
    Row("far", {"size": 1, "block": 16, "first": 0}, ("llama", "gptj", "gpt2"), 9.0),
    Row("sparse", {"lost_mass": 0.0, "min_keys": 4}, ("llama",)),
    Row("temperature", {"start": 1.1}),
    Row("temperature", {"start": 3.0, "layers": [0]}, ("llama",)),
    Row("prune", {"by": "weights"}, ("llama", "gemma2")),
    Row("prune", {"by": "weights", "layers": [1]}, ("llama",)),
    Row("context", {"tokens": 4096}, ("llama", "gemma2")),
    Row("context", {"tokens": 64, "trained": 8, "rope": "longrope"}, ("llama",), one_graph=LONGROPE_TRACES),
    Row("context", {"tokens": 64, "trained": 20, "rope": "ntk", "layers": [1]}, ("llama",)),
    Row("context", {"rope": "drope"}, ("llama", "gemma2")),
    Row("dual_chunk", {"trained": 8, "chunk": 6}, ("llama", "gptj"), padded_graph=False),
    Row("dual_chunk", {"trained": 17, "chunk": 3}, ("gemma2",), one_graph=False),
    Row("dual_chunk", {"trained": 9, "chunk": 4}, ("llama",), padded_graph=False),
    Row("self_extend", {"trained": 12, "group": 8, "neighbours": 4}, ("llama", "gptj"), padded_graph=False),
    Row("self_extend", {"trained": 16, "group": 8, "neighbours": 3}, ("gemma2",), one_graph=False),
    Row("parallel", {}, ("llama", "gpt2")),
    Row("parallel", {"fused": True, "layers": [1]}, ("llama",)),
    Row("serial", {}, ("gptj",)),
    Row("serial", {"fused": True}, ("gptj",)),
    Row("fuse", {}, ("llama", "gptj")),
)
CASES = [pytest.param(row, name, id=f"{row}-{name}") for row in ROWS for name in row.models]


@functools.cache
def shared(name):
    model_type, options, _ = MODELS[name]
    return tiny_model(model_type, **options)


def logits(model, **inputs):
    with torch.no_grad():
        return model(TOKENS, use_cache=False, **inputs).logits


def close(got, want, share=1e-5):
    assert float((got - want).abs().max()) <= share * max(1.0, float(want.abs().max()))


def contents(model):
    """What a model consists of, to see that nothing is left behind."""
    return {
        name: (list(module.__dict__), list(module._parameters), list(module._modules), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    }


def test_every_variant_of_live_models_has_rows():
    assert set(live_names()) == {row.variant for row in ROWS}


@pytest.mark.parametrize(("row", "name"), CASES)
def test_off_is_the_original(row, name):
    model, variant = shared(name), VARIANTS.get(row.variant)
    before, padded = logits(model), logits(model, attention_mask=PADDED)[PADDED.bool()]
    off = {**dict(variant.off(variant.options.parse(row.options))), "window": None}
    off = {name: value for name, value in off.items() if name in variant.options.model_fields}
    with patch_model(model, row.variant, **off) as patch:
        if variant.attend is None:  # a block's form has no options under which it is the other one
            with patch.only(()):
                assert torch.equal(logits(model), before) or row.variant == "fuse" or "fused" in row.options
        else:
            close(logits(model), before)
            close(logits(model, attention_mask=PADDED)[PADDED.bool()], padded)


@pytest.mark.parametrize(("row", "name"), CASES)
def test_proved_or_measured_and_taken_back(row, name):
    model = shared(name)
    before, parts, weights = logits(model), contents(model), dict(model.state_dict())
    with patch_model(model, row.variant, **row.options) as patch:
        changed = logits(model)
        if patch.exact:
            proof = patch.prove()
            assert proof.layers == len({state.name for state in patch.states})
            close(changed, before)
        else:
            measured = patch.measure(input_ids=TOKENS)
            assert measured.kl > 0
            assert measured.residual <= 1e-5 * max(1.0, float(before.abs().max()))
            assert set(measured.layers) == set(patch.layers)
        assert torch.equal(logits(model), changed)
        assert all(layer.calls for layer in patch.report().layers)
    assert torch.equal(logits(model), before)
    assert contents(model) == parts
    now = model.state_dict()
    assert list(now) == list(weights)
    assert all(torch.equal(now[key], weights[key]) for key in weights)


@pytest.mark.parametrize(("row", "name"), CASES)
def test_decoding_from_a_cache_is_one_pass(row, name):
    model = shared(name)
    keep = PADDED.bool()
    with patch_model(model, row.variant, **row.options):
        whole = logits(model, attention_mask=PADDED)
        cache, steps = DynamicCache(config=model.config), []
        with torch.no_grad():
            for start, stop in ((0, 11), (11, 12), (12, 13), (13, 19), (19, 26)):
                inputs = {"attention_mask": PADDED[:, :stop], **cache_argument(cache), "use_cache": True}
                steps.append(model(TOKENS[:, start:stop], **inputs).logits)
    close(torch.cat(steps, 1)[keep], whole[keep], row.decodes)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_compiles(row):
    """In one graph; what reads the values of a mask, or chooses by scores, runs between graphs."""
    model = shared(row.models[0])
    padded = row.one_graph and row.padded_graph
    inputs, seen = ({"attention_mask": PADDED}, PADDED.bool()) if padded else ({}, ...)
    with patch_model(model, row.variant, **row.options):
        plain = logits(model, **inputs)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=row.one_graph)
        if row.one_graph and not padded:  # transformers takes a text without mask and cache for several packed ones
            inputs |= cache_argument(DynamicCache(config=model.config))
        close(logits(compiled, **inputs)[seen], plain[seen])


@pytest.mark.parametrize(("row", "name"), CASES)
def test_gradients_reach_what_trains(row, name):
    model, trains = shared(name), VARIANTS.get(row.variant).trains
    with patch_model(model, row.variant, **row.options) as patch:
        model(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        for state in patch.states:
            module = model.get_submodule(state.name)
            parameters = list(module.parameters() if trains is None else trains(module))
            if row.variant != "fuse" and "fused" not in row.options:  # there they are in fused matrices meanwhile
                assert parameters
                assert all(bool(p.grad.abs().sum() > 0) for p in parameters)
            assert all(p.grad is not None for p in parameters)
        model.zero_grad(set_to_none=True)


@pytest.mark.parametrize(("row", "name"), CASES)
def test_stacks_with_others_in_any_order(row, name):
    """The same function in whatever order patches come, and what is left is right in whatever order they go."""
    model = shared(name)
    form = MODELS[name][2]
    others = [other for other in ("tiled", form) if other is not None]
    taken = {row.variant, *(also for also, _ in VARIANTS.get(row.variant).also(_parsed(row)))}
    names = [row.variant, *(other for other in others if other not in taken)]
    options = {row.variant: row.options}
    before, parts = logits(model), contents(model)
    alone = {}
    for some in itertools.chain.from_iterable(itertools.combinations(names, n) for n in range(len(names) + 1)):
        alone[frozenset(some)] = _under(model, some, options)
    # Each of them comes first once, and goes first once.
    orders = [names[at:] + names[:at] for at in range(len(names))]
    for coming, going in zip(orders, [orders[-1], *orders]):
        patches = {each: patch_model(model, each, **options.get(each, {})).apply() for each in coming}
        close(logits(model), alone[frozenset(names)])
        assert len(stack_of(model)) >= len(names)
        left = set(names)
        for each in going:
            patches[each].revert()
            left.remove(each)
            close(logits(model), alone[frozenset(left)])
        assert torch.equal(logits(model), before)
    assert contents(model) == parts


def _parsed(row):
    return VARIANTS.get(row.variant).options.parse(row.options)


def _under(model, names, options):
    patches = [patch_model(model, each, **options.get(each, {})).apply() for each in names]
    try:
        return logits(model)
    finally:
        for patch in reversed(patches):
            patch.revert()
