"""Serial and parallel blocks in checkpoints: the form changed where the class has a switch, or in a class of ours.

Serial: ``y = x + Attn(N1 x); z = y + MLP(N2 y)``. Parallel (GPT-J, PaLM): ``z = x + Attn(N1 x) + MLP(N2 x)``. The two
are not the same function. Where the class can switch (GPT-NeoX, StableLM, Falcon) the result is plain; where it cannot
(LLaMA and its kin) it carries a modelling file of ours.
"""

from rehead.variants.blocks.forms import FORMS, reblock
from rehead.variants.layer_choice import parse_layers

__all__ = ["FORMS", "parse_layers", "reblock"]
