"""One minus the cosine between hidden states, the direction alone (Sanh et al. 2019, DistilBERT, arXiv 1910.01108)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from rehead.recipes.training.losses.registry import loss


@loss("cosine", "one minus the cosine between hidden states, mean over layers (DistilBERT)", kind="hidden")
def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cos(student, teacher) of every token, [N], from two [N, hidden]."""
    return 1 - functional.cosine_similarity(student, teacher, dim=-1)
