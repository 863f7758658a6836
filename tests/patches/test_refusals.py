"""Bad input: one line with the mend, and the model left as it was."""

import copy
import io

import pytest
import torch
from probes import TOKENS, logits, one_line
from torch import nn
from transformers import DynamicCache, LlamaForCausalLM
from transformers.cache_utils import DynamicLayer

from rehead.benchmarks.tiny import tiny_model
from rehead.errors import ReheadError, UnsupportedError, UsageError, VerificationError
from rehead.models.modeling.modeling_rehead_cache import cache_argument
from rehead.patches import patch_model


@pytest.mark.parametrize(
    ("name", "options", "word"),
    [
        ("tield", {}, "did you mean 'tiled'"),
        ("tiled", {"windw": 3}, "did you mean 'window'"),
        ("tiled", {"window": 0}, "1 or more"),
        ("tiled", {"window": "wide"}, "whole number"),
    ],
)
def test_unknown_names_and_values(model, name, options, word):
    with pytest.raises(UsageError, match=word) as error:
        patch_model(model, name, **options)
    one_line(error)


def test_a_patch_already_applied(model):
    with patch_model(model, "tiled"):
        with pytest.raises(UsageError, match="already applied") as error:
            patch_model(model, "tiled").apply()
        one_line(error)
        with pytest.raises(UsageError, match="already applied"):
            patch_model(model.model, "tiled").apply()
        assert model.config._attn_implementation == "rehead_tiled"
    with pytest.raises(UsageError, match="not applied"):
        patch_model(model, "tiled").revert()


def refused(model, error_type, word):
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    with pytest.raises(error_type, match=word) as error:
        patch_model(model, "tiled").apply()
    one_line(error)
    for name, module in model.named_modules():
        assert module.__dict__.keys() == before[name].keys()


def test_meta_device():
    with torch.device("meta"):
        model = LlamaForCausalLM(tiny_model("llama").config)
    refused(model, UnsupportedError, "load the weights")


def test_nothing_to_patch():
    refused(tiny_model("mamba"), UnsupportedError, "no softmax attention")
    refused(nn.Linear(2, 2), UnsupportedError, "no softmax attention")


@pytest.mark.parametrize("model_type", ["xlnet", "prophetnet", "big_bird", "cpmant"])
def test_attention_without_an_adapter(model_type):
    refused(tiny_model(model_type), UnsupportedError, "no adapter")


def test_tensor_parallel(model):
    model._tp_size = 2
    refused(model, UnsupportedError, "tensor parallelism")


def test_unsupported_dtype(model):
    refused(model.to(torch.float8_e4m3fn), UnsupportedError, "cast it")


def test_attention_weights(model):
    with patch_model(model, "tiled"), pytest.raises(UsageError, match="revert the patch") as error:
        model(TOKENS, output_attentions=True)
    one_line(error)
    assert model(TOKENS, output_attentions=False).logits is not None


def test_attention_weights_in_the_config():
    eager = tiny_model("llama", "eager")
    eager.config.output_attentions = True
    refused(eager, UsageError, "set it to False")


def test_a_name_that_is_no_text_is_refused(model):
    with pytest.raises(UsageError, match="wants the name of a variant, not 3"):
        patch_model(model, 3)


def test_something_that_is_not_a_model():
    with pytest.raises(UsageError, match="wants a loaded model, not str") as error:
        patch_model("gpt2", "tiled")
    one_line(error)


def test_pickling_a_patched_model(model):
    with patch_model(model, "tiled"):
        with pytest.raises(UsageError, match="cannot be pickled") as error:
            torch.save(model, io.BytesIO())
        one_line(error)
    torch.save(model, io.BytesIO())


def test_patching_a_copy_of_a_patched_model(model):
    with patch_model(model, "tiled"):
        clone = copy.deepcopy(model)
    with pytest.raises(UsageError, match="is a copy of one") as error:
        patch_model(clone, "tiled").apply()
    one_line(error)


def test_a_quantised_cache(model):
    class QuantizedLayer(DynamicLayer):
        """Named as transformers' own are; their backends are not installed here."""

    cache = DynamicCache(config=model.config)
    cache.layers[0] = QuantizedLayer()
    with patch_model(model, "tiled"), pytest.raises(UnsupportedError, match="quantised") as error:
        model(TOKENS, **cache_argument(cache))
    one_line(error)


def test_dropout_in_training():
    model = tiny_model("gpt2", attn_pdrop=0.1)
    with patch_model(model, "tiled"):
        model.eval()
        logits(model)
        model.train()
        with pytest.raises(UnsupportedError, match=r"dropout 0\.1") as error:
            model(TOKENS)
    one_line(error)


def test_errors_carry_exit_codes():
    assert UsageError.exit_code == 2
    assert UnsupportedError.exit_code == 3
    assert VerificationError.exit_code == 4
    assert issubclass(UnsupportedError, ReheadError)
