"""Models inside something else: compiled, parallel, offloaded, quantised."""

import copy

import pytest
import torch
from probes import TOKENS, logits, one_line
from torch import nn

from rehead.attention.discover import find_attention
from rehead.benchmarks.tiny import tiny_model
from rehead.errors import UnsupportedError
from rehead.models.modeling.modeling_rehead_cache import OLD
from rehead.patches import patch_model


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")], ids=["dp", "compile"])
def test_a_wrapper_is_looked_through(model, wrap):
    before = logits(model)
    wrapper = wrap(model)
    with patch_model(wrapper, "tiled") as patch:
        assert patch.model is model
        assert patch.prove().layers == 2
        torch.testing.assert_close(logits(wrapper), before, atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(wrapper), before)
    assert "_rehead_patch" not in {**vars(wrapper), **vars(model)}


@pytest.mark.parametrize("model_type", ["llama", "gpt_oss", "bloom", "gptj"])
def test_an_offloaded_model(model_type):
    hooks = pytest.importorskip("accelerate.hooks")
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model(model_type)
    before = logits(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in model.parameters())
    with patch_model(model, "tiled") as patch:
        assert patch.prove().layers == 2
        torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(model), before)
    hooks.remove_hook_from_submodules(model)
    with pytest.raises(UnsupportedError, match="load the weights") as error:
        patch_model(model.to("meta"), "tiled").apply()
    one_line(error)


def test_weights_that_are_no_parameters(model):
    """As quantised linear layers keep theirs."""

    class Packed(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.register_buffer("weight", linear.weight.detach())

        def forward(self, x):
            return nn.functional.linear(x, self.weight)

    packed = copy.deepcopy(model)
    for layer in packed.model.layers:
        for name, linear in list(layer.self_attn.named_children()):
            setattr(layer.self_attn, name, Packed(linear))
    assert not list(packed.model.layers[0].self_attn.parameters())
    assert len(find_attention(packed).interface) == 2
    with patch_model(packed, "tiled") as patch:
        patch.prove()
        torch.testing.assert_close(packed(TOKENS).logits, model(TOKENS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings(f"default:.*{OLD}:FutureWarning")  # PEFT hands prefixes over under the old name
@pytest.mark.parametrize("kind", ["PrefixTuningConfig", "PromptTuningConfig"])
def test_virtual_tokens(model, kind):
    """A cache that is there before the first token, and rows of logits that no token of the input has."""
    peft = pytest.importorskip("peft")
    tuned = peft.get_peft_model(model, getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=5)).eval()
    mask = torch.ones_like(TOKENS)
    mask[0, :7] = 0

    def run():
        with torch.no_grad():
            return tuned(TOKENS, attention_mask=mask).logits[:, -TOKENS.shape[1] :][mask.bool()]

    before = run()
    with patch_model(tuned, "tiled") as patch:
        assert patch.prove().layers == 2
        torch.testing.assert_close(run(), before, atol=1e-5, rtol=1e-5)
