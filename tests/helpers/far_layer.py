"""A planted model of which one layer alone reads what is far."""

import torch

from tests.helpers.tiny import tiny_model

CONTEXT, LAYERS = 512, 4


def planted_model(folder, keeper=2, seed=0):
    """A model in which one layer reads all of the text and the others hardly write anything."""
    model = tiny_model("llama", seed, num_hidden_layers=LAYERS, max_position_embeddings=CONTEXT)
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            layer.self_attn.o_proj.weight.mul_(0.02)
            if index == keeper:
                layer.self_attn.q_proj.weight.zero_()  # all tokens alike: what is far counts as what is near
                layer.self_attn.o_proj.weight.mul_(400)
    model.save_pretrained(folder)
    return folder
