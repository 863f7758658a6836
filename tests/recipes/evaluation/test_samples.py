"""Continuations beside each other: what transformers' own greedy generation gives, and where two of them part."""

from __future__ import annotations

import torch
from tiny import tiny_model

from rehead.recipes.evaluation.samples import PROMPT, continue_greedily, samples


def test_continuations_are_those_of_generate(load, original, converted, tokenizer, tokens):
    models = {"baseline": load(original), "model": load(converted)}
    found = samples(models, tokens, tokenizer, 3, 12, "the text")
    assert len(found) == 3
    for sample in found:
        prompt = tokens[sample.position : sample.position + PROMPT]
        assert sample.prompt == tokenizer.decode(prompt)
        # A whole sentence's beginning, and no word cut in two.
        assert sample.position == 0 or tokenizer.decode(tokens[sample.position - 1]).endswith((".", "\n"))
        assert sample.prompt.endswith("\n") or tokenizer.decode(tokens[sample.position + PROMPT]).startswith(
            (" ", "\n")
        )
        assert sample.truth == tokenizer.decode(tokens[sample.position + PROMPT : sample.position + PROMPT + 12])
        for one in sample.continuations:
            whole = models[one.who].generate(
                prompt[None], attention_mask=torch.ones(1, PROMPT), max_new_tokens=12, do_sample=False, pad_token_id=0
            )
            said = tokenizer.decode(whole[0, PROMPT:], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            assert one.text == said
    again = samples(models, tokens, tokenizer, 3, 12, "the text")
    assert again == found


def test_where_two_continuations_part_is_said(load, original, converted, tokenizer, tokens):
    same = samples({"baseline": load(original), "model": load(original)}, tokens, tokenizer, 1, 8, "t")[0]
    assert [one.same for one in same.continuations] == [None, same.continuations[0].tokens]
    assert same.continuations[1].same_text == same.continuations[1].text
    alone = samples({"model": load(original)}, tokens, tokenizer, 1, 8, "t")[0]
    assert alone.continuations[0].same is None
    other = samples({"baseline": load(original), "model": load(converted)}, tokens, tokenizer, 3, 12, "t")
    for first, second in (sample.continuations for sample in other):
        assert second.same < 12  # one head in place of four
        assert first.text.startswith(second.same_text)


def test_a_text_or_model_that_is_too_short_gives_none(load, original, tokenizer, tokens):
    assert samples({"model": load(original)}, tokens[:30], tokenizer, 3, 12, "t") == []
    for length in (512, 1024, 10**6):  # it has 512 positions
        assert samples({"model": load(original)}, tokens, tokenizer, 3, length, "t") == []
    few = samples({"model": load(original)}, tokens[:53], tokenizer, 3, 12, "t")
    assert len(few) <= 2  # the same piece is shown once


def test_a_model_without_a_cache_reads_everything_again():
    model = tiny_model("mamba").eval()
    rows = torch.arange(10).view(2, 5)
    by_hand = rows
    for _ in range(4):
        with torch.no_grad():
            by_hand = torch.cat([by_hand, model(by_hand).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(continue_greedily(model, rows, 4), by_hand[:, 5:])
