"""Retrieval: found by a model that copies by construction, not by one that cannot see so far."""

from __future__ import annotations

import gzip
from importlib.resources import files

import pytest
import torch

from rehead.errors import UsageError
from rehead.models import recall
from rehead.recipes.evaluation import options
from rehead.recipes.evaluation.needle import KEY, VALUE, needle_cells, prompt, word_tokens
from rehead.recipes.evaluation.recalling import recall_rows
from rehead.recipes.scratch import train_tokenizer

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@pytest.fixture(scope="module")
def running() -> torch.Tensor:
    return torch.randint(0, 400, (3000,), generator=torch.Generator().manual_seed(3))


def test_found_at_every_length_and_depth_by_a_model_that_copies(copying_model, running):
    cells, notes = needle_cells({"model": copying_model()}, running, None, [48, 300, 1000], DEPTHS, trials=4)
    assert len(cells) == 15
    assert not notes
    assert [(cell.hits, cell.trials) for cell in cells] == [(4, 4)] * 15


def test_not_found_behind_a_window(copying_model, running):
    """The same weights with attention over 24 tokens find only what lies nearer than that."""
    window = 24
    cells, _ = needle_cells(
        {"model": copying_model(window)}, running, None, [200], (0.0, 0.5, 0.8, 0.95, 1.0), trials=6
    )
    for cell in cells:
        behind = (1 - cell.depth) * (200 - 2 * KEY - VALUE) + KEY + VALUE
        assert cell.hits == (cell.trials if behind <= window - KEY else 0), cell


def test_not_found_by_a_model_that_does_not_copy(load, original, tokens, tokenizer):
    cells, _ = needle_cells({"model": load(original)}, tokens, tokenizer, [64, 128], DEPTHS)
    assert sum(cell.hits for cell in cells) == 0


def test_a_hit_is_what_generate_gives(copying_model, running):
    """Read off one pass, the hit is that of greedy generation."""
    for window, expected in ((None, True), (24, False)):
        model = copying_model(window)
        row = prompt(running, torch.arange(400, 500), None, 120, 0.3, (0,))
        made = model.generate(row[None, :-VALUE], max_new_tokens=VALUE, do_sample=False, pad_token_id=0)
        assert torch.equal(made[0, -VALUE:], row[-VALUE:]) == expected


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("length", [48, 200])
def test_prompts_are_what_they_say(tokens, tokenizer, length, depth):
    words = word_tokens(tokens, tokenizer)
    row = prompt(tokens, words, tokenizer, length, depth, (1, 2))
    assert len(row) == length + VALUE
    key, value = row[-KEY - VALUE : -VALUE], row[-VALUE:]
    places = [at for at in range(length - KEY) if torch.equal(row[at : at + KEY], key)]
    assert len(places) == 1
    assert torch.equal(row[places[0] + KEY : places[0] + KEY + VALUE], value)
    room = length - KEY - (KEY + VALUE + 3)
    assert places[0] == pytest.approx(depth * room, abs=3)
    assert torch.equal(row, prompt(tokens, words, tokenizer, length, depth, (1, 2)))
    assert not torch.equal(row, prompt(tokens, words, tokenizer, length, depth, (1, 3)))


def test_words_are_words(tokens, tokenizer):
    speech = gzip.decompress((files("rehead.recipes.assets") / "heldout.txt.gz").read_bytes()).decode()[:40000]
    large = train_tokenizer([speech], 800)
    texts = [large.decode([token]) for token in word_tokens(torch.tensor(large(speech).input_ids), large).tolist()]
    assert len(texts) > 50
    # A vocabulary without enough words has its other tokens drawn, but no special one.
    assert tokenizer.eos_token_id not in word_tokens(tokens, tokenizer)
    assert all(text.startswith(" ") and text.strip().isalpha() and len(text.strip()) >= 3 for text in texts)


def test_too_long_for_the_model_or_the_text(copying_model, running):
    cells, notes = needle_cells({"model": copying_model()}, running, None, [64, 2048], (0.5,), trials=1)
    assert [cell.length for cell in cells] == [64]
    assert notes == ["needle at 2048 tokens left out for the model: it has positions for 2048"]
    with pytest.raises(UsageError, match="has only 3000 tokens"):
        needle_cells({"model": copying_model()}, running, None, [4000], (0.5,))
    with pytest.raises(UsageError, match="too few to hide one"):
        needle_cells({"model": copying_model()}, torch.tensor([1, 2, 3] * 50), None, [64], (0.5,))
    with pytest.raises(UsageError, match=r"^--recall: the text has 3 different words"):
        recall_rows({"model": copying_model()}, torch.tensor([1, 2, 3] * 50), None, [64])


def test_the_shortest_distance_is_the_probes_own():
    assert options.SHORTEST == recall.SHORTEST
