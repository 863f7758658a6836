"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) through PEFT, merged into a plain checkpoint at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rehead.errors import UnsupportedError, UsageError
from rehead.recipes.training.checkpoints import gathered
from rehead.recipes.training.options import UptrainOptions

_ADAPTER = "uptraining"


@dataclass(frozen=True)
class Adapters:
    """The adapters of a model.

    Attributes:
        modules: PEFT's layers by the names of the weights that they adapt.
    """

    modules: dict[str, Any]

    def bases(self) -> dict[str, Tensor]:
        """The adapted weights as they were."""
        return {name: module.base_layer.weight for name, module in self.modules.items()}

    def changed(self) -> dict[str, Callable[[], Tensor]]:
        """What gives each adapted weight with its adapter merged, float32 and whole, on the CPU."""
        return {name: (lambda module=module: _merged(module)) for name, module in self.modules.items()}  # type: ignore[misc]


def add(model: nn.Module, names: Sequence[str], options: UptrainOptions) -> Adapters:
    """Put adapters on the chosen matrices and freeze everything else.

    Args:
        model: changed in place.
        names: parameters that were chosen to train; those that are the weight of a linear layer below the head get an
            adapter.
        options: rank, alpha and seed are read.

    Raises:
        UsageError: no such matrix was chosen.
        UnsupportedError: PEFT is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UnsupportedError("--lora-rank needs peft; run `pip install peft`") from None
    from transformers.pytorch_utils import Conv1D

    head = getattr(model, "get_output_embeddings", lambda: None)()
    chosen = {name.removesuffix(".weight") for name in names if name.endswith(".weight")}
    targets = [
        name
        for name, module in model.named_modules()
        if name in chosen and isinstance(module, (nn.Linear, Conv1D)) and module is not head
    ]
    if not targets:
        raise UsageError(
            f"--lora-rank {options.lora_rank}: --train {options.train} chooses no linear layer; choose others"
        )
    config = LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha or 2 * options.lora_rank,  # type: ignore[arg-type]
        target_modules=targets,
        lora_dropout=0.0,
        bias="none",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        inject_adapter_in_model(config, model, adapter_name=_ADAPTER)
    modules: dict[str, Any] = {f"{name}.weight": model.get_submodule(name) for name in targets}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if parameter.requires_grad:
            # Small, so they may be float32 outright; PEFT casts what goes in and out of them.
            parameter.data = parameter.data.to(torch.float32)
    return Adapters(modules)


def _merged(module: Any) -> Tensor:
    base = gathered(module.base_layer.weight).float()
    first, second = (gathered(part[_ADAPTER].weight).float() for part in (module.lora_A, module.lora_B))
    delta = module.scaling[_ADAPTER] * (second @ first)
    return base + (delta.T if module.fan_in_fan_out else delta)
