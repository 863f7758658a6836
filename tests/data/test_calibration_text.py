"""Calibration text: how texts become sequences of tokens, and of what length."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from rehead.convert.options import ConvertOptions
from rehead.data.calibration import calibration_tokens, load_calibration
from rehead.errors import UsageError


class Letters:
    """Stands in for a tokenizer: a token for each character, after a start token."""

    def __call__(self, text: str, add_special_tokens: bool = True):
        return type("Ids", (), {"input_ids": [1] * add_special_tokens + [2 + ord(c) % 60 for c in text]})


@pytest.fixture
def letters(monkeypatch):
    monkeypatch.setattr("rehead.data.calibration._tokenizer", lambda source: Letters())


def test_texts_share_the_tokens_and_take_turns(letters, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc " * 20000)
    with gzip.open(tmp_path / "b.txt.gz", "wt") as f:
        f.write("xyz " * 20000)
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps({"text": "qrs " * 50}) for _ in range(200)))
    names = [str(tmp_path / name) for name in ("a.txt", "b.txt.gz", "c.jsonl")]
    excerpts = load_calibration(names, None, 64, 12 * 128, [128])
    (rows,) = excerpts.tokens
    assert rows.shape == (12, 128)
    assert (rows[0] == rows[3]).float().mean() > 0.2
    sets = [set(row.tolist()) - {1} for row in rows[:3]]
    assert sets[0] != sets[1] != sets[2]
    assert bool((rows[:, 0] == 1).all())
    built_in = load_calibration([], None, 64, 8 * 512, [512])
    assert built_in.tokens[0].shape == (8, 512)
    assert built_in.names == ["built in"]


def test_live_models_and_conversions_see_the_same_excerpts(letters) -> None:
    whole = load_calibration([], None, 64, 4 * 256, [256], seed=3).tokens[0]
    assert torch.equal(calibration_tokens(Letters(), 4 * 256, 256, seed=3), whole)
    assert not torch.equal(calibration_tokens(Letters(), 4 * 256, 256, seed=4), whole)
    with pytest.raises(UsageError, match="ask for shorter ones"):
        calibration_tokens(Letters(), 1 << 24, 1 << 24)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: p.write_text("too little"), "too short"),
        (lambda p: p.write_text(" \n "), "is empty"),
        (lambda p: p.write_bytes(b"\xff\xfe\x00\x01" * 4000), "not readable as text"),
    ],
)
def test_bad_texts(letters, tmp_path: Path, make, says: str) -> None:
    make(tmp_path / "t.txt")
    with pytest.raises(UsageError, match=says):
        load_calibration([str(tmp_path / "t.txt")], None, 64, 8192, [128])


def test_lengths_share_the_tokens_without_overlap(letters, tmp_path: Path) -> None:
    """Half of the tokens in each length, spread over the text, no character twice; a start token in every sequence."""
    text = "".join(chr(33 + i % 60) for i in range(40000))
    for content, name in ((text, "long"), (text[:4300], "short")):
        (tmp_path / name).write_text(content)
        excerpts = load_calibration([str(tmp_path / name)], None, 64, 4096, [64, 512])
        assert [tuple(part.shape) for part in excerpts.tokens] == [(4, 512), (32, 64)]
        assert excerpts.count == 4096
        assert all(bool((part[:, 0] == 1).all()) for part in excerpts.tokens)
    (tmp_path / "numbered").write_text(" ".join(f"{i:04d}" for i in range(860)))

    class Numbers:
        def __call__(self, text: str, add_special_tokens: bool = True):
            return type("Ids", (), {"input_ids": [1] * add_special_tokens + [2 + int(word) for word in text.split()]})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rehead.data.calibration._tokenizer", lambda source: Numbers())
        excerpts = load_calibration([str(tmp_path / "numbered")], None, 1000, 800, [40, 200])
    seen = torch.cat([part[:, 1:].flatten() for part in excerpts.tokens])
    assert len(seen) == len(seen.unique())
    assert int(seen.max()) > 780


@pytest.mark.parametrize(
    ("tokens", "lengths", "shapes"),
    [
        (131072, (512, 2048), [(32, 2048), (128, 512)]),
        (4096, (2048, 512), [(1, 2048), (4, 512)]),
        (2048, (512, 2048), [(4, 512)]),
        (1000, (512, 2048), [(1, 512)]),
        (131072, (256, 256), [(512, 256)]),
        (300, (2048,), [(1, 2048)]),
    ],
)
def test_a_length_that_its_share_does_not_fill_is_left_out(tokens: int, lengths, shapes) -> None:
    excerpts = load_calibration(["random"], None, 64, tokens, lengths)
    assert [tuple(part.shape) for part in excerpts.tokens] == shapes


@pytest.mark.parametrize(
    ("tokens", "length"),
    [(131072, 2048), (32768, 2048), (32767, 1024), (16384, 1024), (8192, 512), (1000, 512), (300, 300)],
)
def test_few_tokens_are_cut_into_shorter_sequences_unless_a_length_is_given(tokens: int, length: int) -> None:
    usual = ConvertOptions(num_key_value_heads=1, method="svd", calibration_tokens=tokens)
    assert usual.calibration_lengths == (length,)
    assert usual.as_json(positions=4096)["calibration_length"] == length
    options = ConvertOptions(num_key_value_heads=1, method="svd", calibration_tokens=tokens, calibration_length=64)
    assert options.calibration_lengths == (64,)
