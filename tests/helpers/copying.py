"""A model that copies by construction, however far back."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig
from transformers import MistralForCausalLM as Mistral

VOCABULARY, CODE = 512, 64


def copying(window: int | None = None, local: bool = False):
    """A real LLaMA (or, with a window, a Mistral that sees only so far back) that copies by construction.

    Hidden states are four blocks of 64: the token's own code, the code of the token before it, what is to be said, and
    a constant. The first layer's queries and keys are constants whose rotary phases agree one token back, so it writes
    the previous token's code. The second matches the own code against previous codes, in rotary pairs that hardly turn,
    and writes the code of the token that it finds: an induction head (arXiv 2209.11895). There is nothing else in it.

    With ``local`` the second layer also prefers near keys, by constants in pairs that turn by half a turn in some
    600 tokens: it copies from near alone, as a model trained on short texts would.
    """
    shape = {
        "vocab_size": VOCABULARY, "hidden_size": 4 * CODE, "intermediate_size": 8, "num_hidden_layers": 2,
        "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 2 * CODE, "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e8}, "tie_word_embeddings": False,
        "rms_norm_eps": 1e-8, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    if window is None:
        model = LlamaForCausalLM(LlamaConfig(**shape))
    else:
        model = Mistral(MistralConfig(**shape, sliding_window=window))
    codes = torch.nn.functional.normalize(
        torch.randn(VOCABULARY, CODE, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    own, before, said, constant = (slice(at * CODE, (at + 1) * CODE) for at in range(4))
    still = torch.cat([torch.arange(32, 64), torch.arange(96, 128)])  # dimensions of the pairs that hardly turn
    angles = 1e8 ** (-torch.arange(64) / 64)
    first, second = (layer.self_attn for layer in model.model.layers)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0) if parameter.ndim == 1 else parameter.zero_()
        model.model.embed_tokens.weight[:, own] = codes
        model.model.embed_tokens.weight[:, constant.start] = 1.0
        turning = torch.arange(16)
        first.q_proj.weight[turning, constant.start] = 1.7 * torch.cos(angles[turning])
        first.q_proj.weight[turning + 64, constant.start] = -1.7 * torch.sin(angles[turning])
        first.k_proj.weight[turning, constant.start] = 1.7
        first.v_proj.weight[:CODE, own] = torch.eye(CODE)
        first.o_proj.weight[before, :CODE] = torch.eye(CODE) / 128**0.5  # undoes the norm before the layer
        second.q_proj.weight[still, own] = 3 * torch.eye(CODE)
        second.k_proj.weight[still, before] = 3 * torch.eye(CODE)
        if local:
            for pair in (19, 20):
                second.q_proj.weight[pair, constant.start] = second.k_proj.weight[pair, constant.start] = 2.1
        second.v_proj.weight[:CODE, own] = torch.eye(CODE)
        second.o_proj.weight[said, :CODE] = torch.eye(CODE)
        model.lm_head.weight[:, said] = codes
    return model.eval()
