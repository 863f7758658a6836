"""Which layers get windows: measured by prose and by recall, so that what looks far back keeps doing so."""

from __future__ import annotations

import pytest
import torch
from copying import copying

from rehead.convert import convert
from rehead.errors import UsageError
from rehead.models.recall import recall, recall_texts
from rehead.variants.ranking import choose_layers
from rehead.variants.stack import live_variant

RUNNING = torch.randint(0, 300, (2048,), generator=torch.Generator().manual_seed(3)).view(8, 256)
WORDS = torch.arange(300, 500)


def test_a_planted_induction_head_keeps_its_layer_at_any_budget():
    """Layer 0 looks one token back, layer 1 as far as the copy."""
    model = copying()
    texts = recall_texts(RUNNING.flatten(), [200], words=WORDS, trials=1)
    for budget in (1e-6, 0.01, 1.0):
        choice = choose_layers(live_variant(model, "window", size=40), RUNNING[:2], kl_budget=budget, recalled=texts)
        assert choice.layers == [0]
    choice = choose_layers(live_variant(model, "window", size=40), RUNNING[:2], count=1, recalled=texts)
    assert choice.layers == [0]
    assert choice.kl < 1e-6  # its heads look at most so far back
    assert choice.compared["last"] > 1


def test_recall_counts_beside_prose():
    """The loss of a set of layers is that on the texts and that of what is recalled."""
    model = copying()
    texts = recall_texts(RUNNING.flatten(), [200], words=WORDS, trials=1)
    alone, both = (
        choose_layers(live_variant(model, "window", size=40), RUNNING[:2], count=2, recalled=recalled).kl
        for recalled in ((), texts)
    )
    assert both > alone + 1


def test_convert_chooses_layers(tmp_path):
    model = copying()
    model.save_pretrained(tmp_path / "source")
    options = {"calibration": ["random"], "calibration_tokens": 4096, "calibration_length": 256, "window": 40}
    done = convert(tmp_path / "source", tmp_path / "out", layers="auto", kl_budget=0.5, **options)
    assert done.plan.raw_config["layer_types"] == ["sliding_attention", "full_attention"]
    assert done.plan.options.layers == (0,)
    from transformers import AutoModelForCausalLM

    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    texts = recall_texts(RUNNING.flatten(), [300], words=WORDS, trials=1)
    assert [row.top1 > 0.97 for row in recall(saved, texts)] == [True, True]
    with pytest.raises(UsageError, match="calibration sequences of 64 tokens hardly show"):
        convert(tmp_path / "source", tmp_path / "no", layers="auto:1", **(options | {"calibration_length": 64}))
