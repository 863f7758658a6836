"""What an uptraining would do, and about how long and how much memory it takes; reads no weights, writes nothing."""

from __future__ import annotations

import os
from typing import Any

import torch

from rehead.checkpoints.outputs import check_out, out_path
from rehead.data.sources import documents_of, parse_source
from rehead.errors import UsageError
from rehead.options import takes
from rehead.recipes.estimate import Cost, Estimate, Sketch, memory_of, resident, timed
from rehead.recipes.training import lora
from rehead.recipes.training.losses import StudentWithLoss
from rehead.recipes.training.models import (
    Opened,
    checkpoint_activations,
    open_checkpoint,
    same_tokens,
    set_attention,
    teacher_name,
)
from rehead.recipes.training.optimizer import Optimizer, Weights, choose
from rehead.recipes.training.options import UptrainOptions
from rehead.recipes.training.processes import join_processes
from rehead.recipes.training.rate import HIGHEST, is_measured, peak_rate
from rehead.recipes.training.run import arithmetic, check_resume
from rehead.recipes.training.texts import first_micro_batch, tokenizer_of

#: Bytes of each trained number beside the parameter itself: its gradient, and the two moments by the optimiser.
_GRADIENT, _MOMENTS = 4, {"adamw": 8, "adamw-8bit": 2}


@takes(UptrainOptions)
def estimate_uptraining(
    student: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    resume: str = "auto",
    overwrite: bool = False,
    **options: Any,
) -> Estimate:
    """Estimate :func:`rehead.recipes.uptrain` with the same arguments.

    Raises:
        UsageError, UnsupportedError: as ``uptrain``, as far as it shows before the texts are tokenised.
    """
    chosen = UptrainOptions.parse(options)
    check_resume(resume)
    run = join_processes(chosen.device)
    if run.world > 1:
        raise UsageError("--dry-run: estimates one process; run it without accelerate launch")
    opened = open_checkpoint(os.fspath(student))
    name = teacher_name(opened, chosen)
    teacher = None if name is None else open_checkpoint(name)
    check_out(out_path(out), getattr(opened.source, "folder", None), overwrite)
    tokenizer = tokenizer_of(opened, "--data")
    if teacher is not None:
        same_tokens(tokenizer, tokenizer_of(teacher, "--teacher", tokenizer), (opened.name, teacher.name))
    for text in (*chosen.data, *chosen.eval_data):
        next(iter(documents_of(parse_source(text), streaming=True)), None)  # its first document can be read
    base, dtype = resident(run.device), arithmetic(chosen.dtype, run.device)
    pupil = Sketch.of(opened.name, opened.source)
    mentor = None if teacher is None else Sketch.of(teacher.name, teacher.source)
    micro = first_micro_batch(chosen, run)
    passes = -(-chosen.rows_per_step // micro)
    tries = {
        count: _tried((opened, pupil), (teacher, mentor), count, micro, chosen, dtype, run.device)
        for count in sorted({1, pupil.tried})
    }
    trained = _trained(pupil, chosen, tries[pupil.tried][4], dtype)
    forward, both, kept, update = (Cost.fitted({n: each[i] for n, each in tries.items()}) for i in range(4))
    step = passes * both.of(pupil.layers) + update.of(pupil.layers)
    seconds = {"loading": sum(each.load_seconds() for each in (pupil, mentor) if each is not None)}
    seconds["training"] = chosen.steps * step
    if chosen.eval_data:
        times = 1 + -(-chosen.steps // chosen.evaluation_interval)
        read = len(chosen.eval_data) * chosen.eval_tokens / (micro * chosen.seq_length)
        seconds["evaluating"] = times * read * forward.of(pupil.layers)
    seconds["writing"] = pupil.load_seconds()
    moments = _MOMENTS[chosen.optimizer]
    weights = pupil.parameters * dtype.itemsize + trained * (_GRADIENT + moments + (4 if dtype != torch.float32 else 0))
    teaching = 0 if mentor is None else mentor.parameters * dtype.itemsize
    kept_on_disk = chosen.keep if 0 < chosen.checkpoint_every < chosen.steps else 0
    saved = trained * (4 + moments) * kept_on_disk
    result = Estimate(seconds, base + weights + teaching + kept.of(pupil.layers), pupil.stored_bytes + saved)
    result.facts = {
        "steps": f"{chosen.steps:,} of {chosen.rows_per_step * chosen.seq_length:,} tokens, {passes} passes each",
        "trains": f"{trained:,} of {pupil.parameters:,} numbers, {chosen.loss}",
        "learning rate": f"chosen at the start by the KL to the teacher, {HIGHEST:g} at most"
        if is_measured(chosen)
        else f"{peak_rate(chosen):g}",
        "teacher": "none" if teacher is None else teacher.name,
        "pace": f"{chosen.rows_per_step * chosen.seq_length / step:,.0f} tokens per second",
        "on": f"{run.device}, {str(dtype).removeprefix('torch.')}",
    }
    result.notes.append("tokenising the data")
    if chosen.joint_layers:
        result.notes.append("the joint fit of --joint-layers")
    if chosen.compile:
        result.notes.append("what --compile costs once and saves later")
    return result


def _tried(
    student: tuple[Opened, Sketch],
    teacher: tuple[Opened | None, Sketch | None],
    count: int,
    micro: int,
    options: UptrainOptions,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[float, float, float, float, float]:
    """Models of ``count`` layers on one micro-batch.

    Returns:
        (seconds forward, seconds forward and backward, bytes beyond weights and gradients, seconds of an optimiser
        step, share of the parameters that trains).
    """
    (opened, sketch), (_, other) = student, teacher
    model = sketch.first_layers(count, dtype, device)
    set_attention(model, options.attention, opened.name, options.seq_length)
    mentor = None if other is None else other.first_layers(min(count, other.layers), dtype, device)
    if mentor is not None and other is not None:
        set_attention(mentor.requires_grad_(False), options.attention, other.name, options.seq_length)
    everything = sum(parameter.numel() for parameter in model.parameters())
    names = choose(model, options.train)
    if options.lora_rank:
        lora.add(model, names, options)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    module = StudentWithLoss(model, mentor, options.objective())
    if options.gradient_checkpointing:
        checkpoint_activations(model)
    weights = Weights({name: p for name, p in model.named_parameters() if p.requires_grad})
    optimizer = Optimizer(weights, options)
    size = int(model.get_input_embeddings().weight.shape[0])
    rows = torch.randint(0, size, (micro, options.seq_length), generator=torch.Generator().manual_seed(0)).to(device)

    def one_pass(rows: torch.Tensor = rows) -> torch.Tensor:
        loss = module(input_ids=rows, labels=rows).loss_sum / rows.numel()
        loss.backward()
        weights.collect()
        return loss.detach()

    @torch.no_grad()
    def only_forward() -> None:
        module(input_ids=rows, labels=rows)

    module.train()
    loss = one_pass(rows[:1, :8])
    weights.gradients()  # all are there from now on
    both: list[float] = []
    kept = memory_of(lambda: both.append(timed(one_pass, device, 2)), device)
    forward = timed(only_forward, device, 1)
    update = timed(lambda: optimizer.step(1e-9, loss), device, 2)
    return forward, both[0], kept, update, trained / everything


def _trained(sketch: Sketch, options: UptrainOptions, share: float, dtype: torch.dtype) -> int:
    """Numbers that train in the whole model: counted where they are its own, else by their share in what was tried."""
    if options.lora_rank:
        return int(share * sketch.parameters)
    whole = sketch.first_layers(sketch.layers, dtype, torch.device("meta"))
    choose(whole, options.train)
    return sum(parameter.numel() for parameter in whole.parameters() if parameter.requires_grad)
