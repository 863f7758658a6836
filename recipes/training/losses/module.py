"""Student, teacher and loss as one module: what a training loop calls, wraps and steps.

The head's weight is used inside ``forward``, so that whatever gathers or watches a module's parameters around its
forward pass (FSDP2, DDP) does so for the head too. For speed, a loop should

- pass ``position_ids`` only when a row holds more than one document: the mask between documents keeps attention off
  its fastest kernels;
- pass ``counted_index``, made on the host, where the labels come from; where it is left out and ``labels`` are on a
  GPU, finding it waits for the device;
- read ``loss_sum`` and ``metrics`` on the host only when it logs;
- give micro-batches of 16k tokens and more: the smaller ones leave a modern GPU idle between launches.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rehead.data.store import IGNORED
from rehead.errors import UsageError
from rehead.recipes.training.losses.chunked import Side, head_loss
from rehead.recipes.training.losses.head import Head, base_model, final_hidden, find_head, transformer
from rehead.recipes.training.losses.registry import Objective, parse_objective


class LossOutput(NamedTuple):
    """Sums over one micro-batch of one process; dividing by all counted tokens of a step is the loop's work.

    Attributes:
        loss_sum: scalar with a gradient, summed over counted tokens, float32 or wider.
        counted: how many tokens were counted, an int64 scalar tensor on the loss's device.
        metrics: detached sums over the counted tokens: ``cross_entropy``; with a teacher ``kl`` (teacher || student, at
            temperature 1) and ``top1_agreement``.
    """

    loss_sum: Tensor
    counted: Tensor
    metrics: dict[str, Tensor]


class StudentWithLoss(nn.Module):
    """A student, and the loss that uptrains it.

    Only the student is a submodule: the teacher's parameters are in no ``state_dict`` and under no wrapper. Both must
    be on their device, whole, when this is made, since their heads are found by running them; wrap and shard afterwards
    (a teacher that is too large: ``fully_shard`` its layers, in place, and leave its head whole).

    Args:
        student: a causal language model of transformers, or a PEFT model around one.
        teacher: another of the same vocabulary, put into evaluation mode and frozen; needed by most losses, and welcome
            by the others, whose metrics it completes.
        loss: an :class:`~.registry.Objective`, or what ``--loss`` takes.
        chunk: tokens whose logits are there at a time; None chooses by vocabulary and device.
        vocabulary: how many ids there are, where the rows behind them are padding; needed when student and teacher are
            padded differently.

    Raises:
        UsageError: a loss that needs a teacher has none, or the two do not fit together.
        UnsupportedError: a model's way to its logits could not be found.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None = None,
        loss: str | Objective = "kd",
        chunk: int | None = None,
        *,
        vocabulary: int | None = None,
    ) -> None:
        super().__init__()
        self.objective = parse_objective(loss) if isinstance(loss, str) else loss
        if self.objective.needs_teacher and teacher is None:
            raise UsageError(f"--loss {self.objective}: needs a teacher; give one, or use --loss ce")
        if chunk is not None and chunk < 1:
            raise UsageError(f"chunk {chunk}: must be 1 token or more; leave it out to have it chosen")
        self.student = student
        self.chunk = chunk
        self._head = find_head(student)
        # In a tuple, so that nn.Module does not take the teacher for a part of this one.
        self._frozen: tuple[nn.Module, Head] | None = None
        if teacher is not None:
            teacher.requires_grad_(False).eval()
            self._frozen = (teacher, find_head(teacher))
        self._fit(vocabulary)

    @property
    def teacher(self) -> nn.Module | None:
        """The teacher, or None."""
        return None if self._frozen is None else self._frozen[0]

    @property
    def _no_split_modules(self) -> list[str]:
        """The classes that sharding wraps one by one, as a transformers model names them."""
        return list(getattr(transformer(self.student), "_no_split_modules", None) or [])

    def tie_weights(self) -> None:
        """Tie the student's embeddings again, after something has exchanged its parameters."""
        transformer(self.student).tie_weights()

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor | None = None,
        counted_index: Tensor | None = None,
        **inputs: Any,
    ) -> LossOutput:
        """The loss of a micro-batch.

        Args:
            input_ids: int64 [B, S].
            labels: int64 [B, S]: the token that *follows* each of ``input_ids`` (already shifted), -100 where a
                position does not count. Those cost nothing but their place in the transformer.
            position_ids: int64 [B, S], beginning again at 0 in each document of a row; None where no row holds two.
            counted_index: int64 [N], where ``labels.flatten()`` is not -100, in order; None to look.
            inputs: passed on to both base models, e.g. ``attention_mask``.
        """
        index = _counted(labels, counted_index)
        inputs = {"input_ids": input_ids, "use_cache": False, **inputs}
        if position_ids is not None:
            inputs["position_ids"] = position_ids
        theirs: Any = None
        if self._frozen is not None:
            with torch.no_grad(), _as_it_is(self._frozen[0], input_ids.device):
                theirs = base_model(self._frozen[0])(**inputs)
        ours: Any = base_model(self.student)(**inputs)

        device = final_hidden(ours).device
        targets = _picked(labels.to(device), index)
        student = _side(final_hidden(ours), index, self._head, True)
        teacher = None if self._frozen is None else _side(final_hidden(theirs), index, self._frozen[1], False)
        loss, metrics = head_loss(student, teacher, targets, self.objective, self.chunk)
        return LossOutput(loss, torch.full((), targets.numel(), device=device), metrics)

    def _fit(self, vocabulary: int | None) -> None:
        """Bring both heads to one vocabulary, or say that they have none in common."""
        if vocabulary is not None:
            self._head = self._head.narrowed(vocabulary)
        size = self._head.shape.vocabulary
        if vocabulary is not None and size != vocabulary:
            raise UsageError(f"vocabulary {vocabulary}: the student has only {size} logits")
        if self._frozen is None:
            return
        teacher, head = self._frozen
        head = head if vocabulary is None else head.narrowed(vocabulary)
        if head.shape.vocabulary != size:
            raise UsageError(
                f"student and teacher have different vocabularies, {size} and {head.shape.vocabulary}; give a teacher "
                "with the student's tokenizer"
            )
        self._frozen = (teacher, head)


def _counted(labels: Tensor, index: Tensor | None) -> Tensor | None:
    """Flat positions of the counted tokens; None for all of them."""
    if index is None:
        index = (labels.flatten() != IGNORED).nonzero().squeeze(-1)
    return None if index.numel() == labels.numel() else index


def _picked(rows: Tensor, index: Tensor | None) -> Tensor:
    rows = rows.flatten() if rows.dtype == torch.int64 else rows
    return rows if index is None else rows.index_select(0, index.to(rows.device))


def _side(hidden_states: Tensor, index: Tensor | None, head: Head, trained: bool) -> Side:
    """The counted hidden states, scaled and in the dtype of the head's product."""
    hidden = _picked(hidden_states.flatten(0, -2), index)
    if head.hidden_scale != 1:
        hidden = hidden * head.hidden_scale
    kind = hidden.device.type
    dtype = next(head.module.parameters()).dtype
    if trained and dtype == torch.float32 and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    return Side(hidden.to(dtype) if head.linear else hidden, head)


def _as_it_is(model: nn.Module, device: torch.device) -> AbstractContextManager[Any]:
    """Runs a model of half precision without autocast, which would widen its norms for nothing."""
    half = next(model.parameters()).dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(device.type, enabled=False) if half else nullcontext()
