"""Evaluation on held-out text, alone and shared out over processes."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from rehead.recipes.training.losses import StudentWithLoss
from rehead.recipes.training.processes import Processes
from rehead.recipes.training.texts import HeldOut, evaluate_held_out


@dataclass(frozen=True)
class Rank(Processes):
    """One of two processes, run one after the other; what is summed over them is kept."""

    sent: list[Tensor] = field(default_factory=list)

    def sum(self, tensor: Tensor) -> Tensor:
        self.sent.append(tensor.clone())
        return torch.stack([part for part in self.sent if part.shape == tensor.shape]).sum(0)


def model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            initializer_range=0.3,
        )
    )  # fmt: skip


def test_two_processes_give_the_figures_of_one() -> None:
    module = StudentWithLoss(model(0), model(1), "kd")
    # Three windows: the second process has nothing to count in the second pass.
    text = HeldOut("text", torch.randint(0, 64, (3, 9), generator=torch.Generator().manual_seed(0)))
    device = torch.device("cpu")
    whole = evaluate_held_out(module, text, Processes(0, 1, device), 1)
    sent: list[Tensor] = []
    evaluate_held_out(module, text, Rank(1, 2, device, sent=sent), 1)
    shared = evaluate_held_out(module, text, Rank(0, 2, device, sent=sent), 1)
    assert shared == pytest.approx(whole, rel=1e-5)
    assert shared["tokens_counted"] == 24
