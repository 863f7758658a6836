"""Latent attention as a module, at its natural scale: what a layer-wise fit moves.

The stored form keeps the latent's rows tiny, in one matrix with those of the shared key, so that a norm is a constant;
no optimiser should see that. Here every factor is a parameter of its own, and there is no norm.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rehead.models.rewrite import RecoverySettings
from rehead.variants.latent.heads import LatentHeads

#: Measured on SmolLM2-135M at a third of the cache. More than some 300 steps on the default 131k tokens fit the text
#: itself: the loss falls, and the divergence on other text rises. Moments of what the changed prefix gives cost a tenth
#: more than the original's, and so does a ridge of the FFN's output as weak as that of other forms.
RECOVERY = RecoverySettings(
    rate=3e-2,
    tokens=8192,
    drift=0.5,
    reads=("down", "rope", "q_nope", "q_rope"),
    ridge=1e-3,
    on_original=True,
    refit_first=False,
    half=True,
)


class LatentAttention(nn.Module):
    """One layer's latent attention, causal, over whole sequences that begin at position 0.

    Args:
        latent: the weights, which become float32 parameters under their own names; the output projection is the module
            ``o_proj``, as classes have it.
    """

    def __init__(self, latent: LatentHeads) -> None:
        super().__init__()
        self._start = latent
        self._turns: dict[tuple[int, torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
        for name, weight in latent.weights().items():
            if name not in ("o", "o_bias"):
                self.register_parameter(name, nn.Parameter(weight.detach().float().clone()))
        self.o_proj = nn.Linear(1, 1, bias=latent.o_bias is not None)
        self.o_proj.weight = nn.Parameter(latent.o.detach().float().flatten(1).clone())
        if latent.o_bias is not None:
            self.o_proj.bias = nn.Parameter(latent.o_bias.detach().float().clone())

    @property
    def latent(self) -> LatentHeads:
        """The weights as they are now; differentiable."""
        return with_module_weights(self._start, dict(self.named_parameters()))

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """(the attention's output [b, S, m] of inputs [b, S, n], None), as attention modules of classes return it."""
        latent, key = self.latent, (hidden_states.shape[1], hidden_states.device, hidden_states.dtype)
        if key not in self._turns:  # hundreds of steps of a fit ask for the same
            self._turns[key] = latent.turn(hidden_states)
        return self.o_proj(latent.mixed(hidden_states, turn=self._turns[key])), None


def module_weights(latent: LatentHeads) -> dict[str, Tensor]:
    """A layer's weights by the names of :class:`LatentAttention`'s parameters."""
    weights = {name: weight for name, weight in latent.weights().items() if name not in ("o", "o_bias")}
    weights["o_proj.weight"] = latent.o.flatten(1)
    if latent.o_bias is not None:
        weights["o_proj.bias"] = latent.o_bias
    return weights


def with_module_weights(like: LatentHeads, weights: dict[str, Tensor]) -> LatentHeads:
    """The inverse: a layer of the sizes of ``like`` with those weights."""
    fields = {name: weight for name, weight in weights.items() if not name.startswith("o_proj.")}
    fields["o"] = weights["o_proj.weight"].unflatten(1, (like.num_heads, -1))
    if "o_proj.bias" in weights:
        fields["o_bias"] = weights["o_proj.bias"]
    return like.with_weights(fields)
