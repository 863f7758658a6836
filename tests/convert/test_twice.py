"""One conversion after another: the second keeps what the first made, or is refused in one line.

What both together should give is computed from the first one's checkpoint alone, loaded by transformers: by the second
as a live patch, or by its weights changed by hand.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import loaded, logits

from rehead.convert import convert, verify
from rehead.errors import ReheadError
from rehead.patches import patch_model
from rehead.variants.contract import VARIANTS

TEXT: dict[str, Any] = {"calibration": ["random"], "calibration_tokens": 1024, "calibration_length": 32}
#: Longer than the windows and than the 8 tokens that stretched models are said to have been trained on.
IDS = torch.randint(3, tiny.VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))
#: Tiny models by name: type and what their configs say. One KV head is what a latent's shared key holds exactly.
SOURCES = {
    "llama": ("llama", {"attention_bias": False}),
    "one head": ("llama", {"attention_bias": False, "num_key_value_heads": 1}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"attention_bias": False}),
    "mistral": ("mistral", {"sliding_window": None}),
    "gemma2": ("gemma2", {}),
    "gpt_neox": ("gpt_neox", {}),
    "smollm3": ("smollm3", {}),
    "granite_swa": ("granite_swa", {}),
    "phi3": ("phi3", {}),
}


@dataclass(frozen=True)
class Step:
    """A conversion.

    Attributes:
        options: of :func:`rehead.convert.convert`.
        expected: a model before it -> the logits after it; None where they are not known.
    """

    options: dict[str, Any]
    expected: Callable[[Any], torch.Tensor | None] = lambda model: None


def by_patch(variant: str, text: str = "", **options: Any) -> Step:
    """A variant with options, which a live patch computes too."""

    def expected(model: Any) -> torch.Tensor:
        with patch_model(model, variant, **VARIANTS.get(variant).options.from_text(text, variant).model_dump()):
            return logits(model, IDS)

    return Step(options or {"variants": [f"{variant}:{text}"]}, expected)


def shared(count: int) -> Callable[[Any], torch.Tensor]:
    """Logits of a model whose KV heads are the means of groups."""

    def expected(model: Any) -> torch.Tensor | None:
        if not (hasattr(model, "model") and hasattr(model.model.layers[0].self_attn, "k_proj")):
            return None
        attention = [layer.self_attn for layer in model.model.layers]
        for each in attention:
            for name in ("k_proj", "v_proj"):
                for weight in getattr(each, name).parameters():
                    heads = weight.data.unflatten(0, (count, -1, each.head_dim))
                    heads[:] = heads.mean(1, keepdim=True)
        return logits(model, IDS)

    return expected


def same(model: Any) -> torch.Tensor:
    return logits(model, IDS)


def same_with_one_head(model: Any) -> torch.Tensor | None:
    """Whose key is the one that a latent shares; one that is normed is stretched by what was read."""
    normed = any("k_norm" in name for name, _ in model.named_modules())
    return same(model) if getattr(model.config, "num_key_value_heads", 0) == 1 and not normed else None


STEPS = {
    "pool": Step({"num_key_value_heads": 2}, shared(2)),
    "reinvest": Step({"num_key_value_heads": 2, "reinvest": "ffn", "multiple_of": 8}, shared(2)),
    "procrustes": Step({"num_key_value_heads": 1, "method": "procrustes"}),
    "uneven": Step({"variants": ["uneven:num_key_value_heads=3,layers=1"]}),
    "latent": Step({"latent": 32, "rope_dims": 16}, same_with_one_head),
    "latent in one": Step({"variants": ["latent:rank=24,rope_dims=8,layers=0"]}),
    "window": by_patch("window", "size=6"),
    "window in one": by_patch("window", "size=5,layers=1"),
    "sinks": by_patch("window", "size=6,sinks=2"),
    "sinks in one": by_patch("window", "size=5,sinks=1,layers=0"),
    "fewer sinks": by_patch("window", "size=4,sinks=1"),
    "sink logit": Step({"window": 6, "sink_logit": True}),
    "yarn": by_patch("context", "tokens=512"),
    "linear": by_patch("context", "tokens=256,rope=linear"),
    "ntk": by_patch("context", "tokens=512,rope=ntk"),
    "ntk in one": by_patch("context", "tokens=512,rope=ntk,layers=1"),
    "dynamic": by_patch("context", "tokens=1024,rope=dynamic,trained=8"),
    "longrope": by_patch("context", "tokens=1024,rope=longrope,trained=8"),
    "drope in one": by_patch("context", "tokens=512,rope=drope,layers=0"),
    "parallel": by_patch("parallel"),
    "parallel in one": by_patch("parallel", "layers=1"),
    "serial": by_patch("serial"),
    "prune": by_patch("prune", "by=weights"),
    "prune in one": by_patch("prune", "by=weights,layers=1"),
    "temperature": by_patch("temperature", "start=1.5"),
    "temperature in one": by_patch("temperature", "start=0.6,layers=1"),
    "file": Step({"host": "rehead_window"}, same),
    "granite_swa": Step({"host": "granite_swa"}, same),
    "smollm3": Step({"host": "smollm3"}, same),
}


@dataclass
class Chains:
    """Conversions by the names of their steps, each made once."""

    root: Path
    made: dict[tuple[str, ...], Path | None] = field(default_factory=dict)

    def out(self, source: str, *steps: str) -> Path | None:
        """The checkpoint after some steps, checked; None where the last is refused."""
        if (source, *steps) not in self.made:
            before = self.out(source, *steps[:-1]) if steps else None
            folder = self.root / str(len(self.made))
            if steps:
                assert before is not None
                self.made[source, *steps] = folder if converted(before, steps[-1], folder) else None
            else:
                kind, changes = SOURCES[source]
                self.made[source,] = tiny.save_tiny(kind, folder, **changes)
        return self.made[source, *steps]


def converted(before: Path, name: str, out: Path) -> bool:
    """Whether a checkpoint is converted, not refused; the result is what it should be."""
    step, said = STEPS[name], ""
    try:
        convert(before, out, **step.options, **TEXT)
    except ReheadError as refusal:
        said = str(refusal)
    assert "\n" not in said
    if said:
        assert not out.exists()
        return False
    report = verify(out, str(before))
    assert report.cache_error < 1e-3
    assert report.cache_bytes["measured"] == report.cache_bytes["layout"]
    got = logits(loaded(out), IDS)
    assert got.isfinite().all()
    try:
        want = step.expected(loaded(before))
    except ReheadError:  # what no live model of this class can have
        return True
    if want is not None:
        torch.testing.assert_close(got, want, atol=2e-3, rtol=1e-3)
    return True


@pytest.fixture(scope="module")
def chains(tmp_path_factory):
    return Chains(tmp_path_factory.mktemp("chains"))


@pytest.mark.parametrize(
    ("steps", "taken"),
    [
        (["dynamic"], True),  # said to be trained on fewer tokens than the config says
        (["dynamic", "drope in one"], False),  # which changes the length that dynamic counts from
        (["sinks in one", "window"], False),  # a layer keeps its narrower window, and with it its sink
        (["sinks in one", "sinks"], False),
        (["sinks in one", "fewer sinks"], True),
        (["sinks", "fewer sinks"], True),
    ],
)
def test_what_was_lost_once(chains, steps, taken):
    assert all(chains.out("llama", *steps[: at + 1]) is not None for at in range(len(steps) - 1))
    assert (chains.out("llama", *steps) is not None) == taken


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(source=st.sampled_from(list(SOURCES)), steps=st.lists(st.sampled_from(list(STEPS)), min_size=8, max_size=8))
def test_what_conversions_made_is_kept_by_those_after_them(chains, source, steps):
    """The first two of some steps that are not refused, one after the other."""
    done: tuple[str, ...] = ()
    for name in steps:
        if len(done) < 2 and chains.out(source, *done, name) is not None:
            done += (name,)


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
def test_every_pair_of_conversions(chains, source):
    taken = [name for name in STEPS if chains.out(source, name) is not None]
    both = [pair for pair in itertools.product(taken, STEPS) if chains.out(source, *pair) is not None]
    assert len(both) > 20
