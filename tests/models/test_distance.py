"""Comparing logits in pieces: the same figures as whole, for every class's own head, in little memory."""

import math
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from rehead.benchmarks.tiny import tiny_model
from rehead.models import distance, predictions
from rehead.models.distance import Distances, difference, distances, largest, token_nll
from rehead.models.modeling.modeling_rehead_cache import cache_argument, returned_cache
from rehead.models.predictions import Predictions, predict, predict_step


@pytest.fixture
def small_pieces(monkeypatch):
    """Five rows of the tiny vocabulary at a time, three in a step."""
    monkeypatch.setitem(predictions.PIECE_BYTES, "cpu", 5 * 128 * 4)
    monkeypatch.setitem(distance._STEP_BYTES, "cpu", 3 * 128 * 8)


@given(st.integers(1, 7), st.integers(1, 5), st.integers(2, 40), st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_distances_are_those_of_the_definition(batch, length, vocabulary, seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = (3 * torch.randn(batch, length, vocabulary, generator=generator) for _ in range(2))
    targets = torch.randint(0, vocabulary, (batch, length), generator=generator)
    p, q = (x.double().flatten(0, 1).log_softmax(-1) for x in (a, b))
    apart = distances(a, b, targets)
    kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(apart.kl, kl.clamp_min(0))
    assert apart.largest == pytest.approx(float((a.double() - b.double()).abs().max()))
    assert torch.equal(apart.agree, (a.argmax(-1) == b.argmax(-1)).flatten())
    torch.testing.assert_close(apart.nll, -q.gather(-1, targets.view(-1, 1))[:, 0])
    torch.testing.assert_close(token_nll(a, targets), apart.reference_nll)
    assert difference(a, b) == apart.largest
    assert largest(a) == float(a.abs().max())


def test_equal_logits_are_at_no_distance_and_rows_can_be_joined():
    logits = torch.randn(4, 9).half()
    apart = Distances.cat([distances(logits, logits.clone()), distances(logits[:2], logits[:2])])
    assert apart.mean_kl == apart.largest == 0.0
    assert apart.top1_agreement == 1.0
    assert len(apart.kl) == 6
    assert difference(logits[:0], logits[:0]) == largest(logits[:0]) == 0.0


def test_ruled_out_entries_weigh_nothing_and_what_is_no_number_shows():
    a, b = torch.zeros(1, 4), torch.zeros(1, 4)
    a[0, 3] = b[0, 3] = -math.inf
    assert distances(a, b).mean_kl == difference(a, b) == 0.0
    b[0, 2] = -math.inf
    assert distances(a, b).mean_kl == math.inf
    b[0, 2] = math.nan
    assert math.isnan(distances(a, b).mean_kl)
    assert difference(a, b) == math.inf
    assert largest(b) == 0.0


def test_different_shapes_are_refused():
    with pytest.raises(ValueError, match="different shapes"):
        distances(torch.zeros(2, 3), torch.zeros(2, 4))


FAMILIES = [
    "llama",
    "gpt2",
    "opt",
    "gemma2",
    "cohere",
    "granite",
    "gemma3_text",
    "mixtral",
    "mamba",
    "modernbert-decoder",
]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_head_in_pieces_gives_the_logits_of_the_whole(name, small_pieces, monkeypatch):
    """Whatever a class does to its logits (scales, soft caps, biases, one more layer) is done to the pieces."""
    model = tiny_model(name).eval()
    tokens = torch.randint(8, 120, (2, 12), generator=torch.Generator().manual_seed(0))
    pieces, last = predict(model, {"input_ids": tokens}), predict(model, {"input_ids": tokens}, last=7)
    assert pieces.head is not None
    assert pieces.rows_at_once() == 5
    assert "forward" not in pieces.head.body.__dict__
    monkeypatch.setitem(predictions.PIECE_BYTES, "cpu", 1 << 20)
    whole = predict(model, {"input_ids": tokens})
    assert whole.head is None
    assert difference(pieces, whole) <= 1e-5
    assert difference(last, whole[:, -7:]) <= 1e-5
    assert torch.equal(pieces.argmax(), whole.argmax())
    mask = tokens > 60
    assert difference(pieces[mask], whole.states[mask]) <= 1e-5
    assert pieces.whole().shape == (2, 12, 128)


def test_a_cache_is_kept_beside_pieces(small_pieces):
    model = tiny_model("llama").eval()
    tokens = torch.randint(8, 120, (2, 12))
    parts, step = [], {}
    for start, stop in ((0, 8), (8, 9), (9, 12)):
        inputs = {"input_ids": tokens[:, start:stop], "use_cache": True, **step}
        part, out = predict_step(model, inputs, rows=tokens.numel())
        step = cache_argument(returned_cache(out))
        parts.append(part)
    full = predict(model, {"input_ids": tokens}).whole()
    joined = Predictions.cat(parts)
    # One token's logits are small, and still the head of all is left for later.
    assert joined.head is not None
    expected = torch.cat([full[:, :8].flatten(0, 1), full[:, 8:9].flatten(0, 1), full[:, 9:].flatten(0, 1)])
    assert difference(joined, expected) <= 1e-5


def test_a_large_vocabulary_is_compared_in_little_memory():
    """Two models' logits of 256 tokens with 262,144 entries are 0.5 GB in float32, and twice that in float64."""
    config = LlamaConfig(
        vocab_size=262_144, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    tokens = torch.randint(0, 262_144, (1, 256))
    made, most = [], [0]

    def note(module, args, out):
        made.append(weakref.ref(out))
        most[0] = max(most[0], sum(piece().nbytes for piece in made if piece() is not None))

    model.lm_head.register_forward_hook(note)
    a, b = (predict(model, {"input_ids": tokens}) for _ in range(2))
    assert distances(a, b, tokens).mean_kl == 0.0
    assert difference(a, b) == 0.0
    assert len(made) > 4 * 256 * 262_144 * 4 // predictions.PIECE_BYTES["cpu"]
    assert most[0] <= 4 * predictions.PIECE_BYTES["cpu"]
