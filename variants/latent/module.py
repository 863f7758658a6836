"""Latent attention as a module, at its natural scale: what a layer-wise fit and uptraining move.

The stored form keeps the latent's rows tiny, in one matrix with those of the shared key, so that a norm is a constant;
no optimiser should see that. Here every factor is a parameter of its own, and there is no norm.
"""

from __future__ import annotations

from torch import Tensor, nn

from rehead.variants.latent.heads import LatentHeads

#: Of the layer-wise fit, measured on SmolLM2-135M at a third of the cache: Adam's step relative to each weight's root
#: mean square, tokens in a step, and how much of the prefix's drift a layer is asked to take back. More than some 300
#: steps on the default 131k tokens fit the text itself: the loss falls, and the divergence on other text rises.
FIT_RATE, FIT_TOKENS, FIT_DRIFT = 3e-2, 8192, 0.5


class LatentAttention(nn.Module):
    """One layer's latent attention, causal, over whole sequences.

    Args:
        latent: the weights, which become float32 parameters under their own names.
    """

    def __init__(self, latent: LatentHeads) -> None:
        super().__init__()
        self._start = latent
        for name, weight in latent.weights().items():
            self.register_parameter(name, nn.Parameter(weight.detach().float().clone()))

    @property
    def latent(self) -> LatentHeads:
        """The weights as they are now; differentiable."""
        return self._start.with_weights(dict(self.named_parameters()))

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """The attention's output [b, S, m] of inputs [b, S, n]."""
        return self.latent.attend(x, positions)
