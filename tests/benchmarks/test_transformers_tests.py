"""The comparison of transformers' own tests sees what fails only with tiled attention, and why."""

from __future__ import annotations

from pathlib import Path

import pytest

from rehead.benchmarks import transformers_tests
from rehead.benchmarks.transformers_tests import Outcome, only_with_ours

TEST = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM

CONFIG = dict(vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)


def logits(name, **options):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG, **options, attn_implementation=name))
    model.train(bool(options))
    return model(torch.arange(12)[None]).logits


def test_same_as_eager():
    torch.testing.assert_close(logits("sdpa"), logits("eager"))


def test_dropout_trains():
    assert logits("sdpa", attention_dropout=0.5).isfinite().all()


def test_broken_anyway():
    assert False


def test_sees_whose_attention_runs():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    assert "rehead" not in ALL_ATTENTION_FUNCTIONS["sdpa"].__module__
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "tests" / "models" / "llama"
    folder.mkdir(parents=True)
    (folder / "test_modeling_llama.py").write_text(TEST)
    return tmp_path


def test_what_fails_only_with_ours_is_found(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        transformers_tests.main([str(checkout), "--models", "llama"])
    assert ended.value.code == 4
    said = capsys.readouterr().out
    assert "as they are: 3 passed, 1 failed, 0 skipped" in said
    assert "with tiled attention: 1 passed, 3 failed, 0 skipped" in said
    assert "refused 1 x test_dropout_trains: rehead.errors.UnsupportedError" in said
    assert "FAILED models.llama.test_modeling_llama::test_sees_whose_attention_runs" in said
    assert "2 fail only with tiled attention, 1 of them refused by name" in said


def test_a_folder_that_is_no_checkout_and_another_version_are_refused(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for models, said in ((["mistral"], "has no tests/models/mistral"), (["llama"], "not of the installed version")):
        if models == ["llama"]:
            (checkout / "src" / "transformers").mkdir(parents=True)
            (checkout / "src" / "transformers" / "__init__.py").write_text('__version__ = "4.0.0"\n')
        with pytest.raises(SystemExit) as ended:
            transformers_tests.main([str(checkout), "--models", *models])
        assert ended.value.code == 2
        assert said in capsys.readouterr().err


def test_a_test_that_failed_before_is_not_ours() -> None:
    before = {"a": Outcome("failed", "x"), "b": Outcome("passed"), "c": Outcome("skipped")}
    after = {"a": Outcome("failed", "x"), "b": Outcome("failed", "y"), "c": Outcome("failed", "z")}
    assert set(only_with_ours(before, after)) == {"b", "c"}
