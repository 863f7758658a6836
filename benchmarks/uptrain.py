"""Uptraining: tokens per second and peak memory of `rehead uptrain` beside a `transformers.Trainer` with its loss.

A student and a teacher with random weights (SmolLM2-135M's shape, or with ``--shape 7b`` LLaMA 2's) are written to a
folder, and the student is trained for a few steps on a random text. Rehead's rows are its own log of
`rehead.recipes.uptrain`: the real command, reading, packing, logging and all, with the layers compiled. The Trainer
runs in bf16 with its defaults and a `compute_loss` that takes the KL from both models' whole logits, as one writes it
first: over float32 weights (Rehead keeps float32 masters too) and over the checkpoint's own bf16, whose small updates
are lost to rounding. Micro-batches of several sizes are tried, and the fastest Trainer of all is what the ratios are
taken over. Every step is an optimiser step of the same number of tokens; the first ones, where kernels are compiled, do
not count.

On a GPU the operations that a step needs (what is computed again to save memory left out) are given as a share of the
rate of a large bf16 matrix product there: model FLOPs utilisation (MFU; Chowdhery et al. 2022, arXiv 2204.02311).

With ``--latent`` a student with latent attention (MLA) of that size trains too, beside the one with KV heads.

    python -m rehead.benchmarks.uptrain
    python -m rehead.benchmarks.uptrain --losses kd --trainer-rows 32,64 --document-tokens 1500
    python -m rehead.benchmarks.uptrain --losses kd --trainer-rows "" --latent 96 --rope-dims 32
    python -m rehead.benchmarks.uptrain --shape 7b --losses kd --lora-rank 16 --trainer-rows ""
    accelerate launch --config_file recipes/library/accelerate/fsdp2.yaml --num_processes 2 \
        -m rehead.benchmarks.uptrain --shape 7b --losses kd
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from rehead.benchmarks.latent_decode import matrix_rate
from rehead.benchmarks.machine import headline, machine
from rehead.benchmarks.uptrain_models import (
    Setting,
    text_name,
    training_operations,
    write_latent,
    write_model,
    write_text,
)
from rehead.errors import UsageError, check_names
from rehead.models.ranks import Ranks, join_ranks
from rehead.recipes.training.models import checkpoint_activations

SHAPES = {
    "smollm2": Setting(),
    "7b": Setting(
        rows=16, length=2048, steps=6, warmup=3, hidden_size=4096, intermediate_size=11008, layers=32, heads=32,
        kv_heads=8, teacher_kv_heads=32, vocab_size=32000, tied=False, trainer_rows=(1, 2),
        trainer_weights=("float32",), micro_batch=2, gradient_checkpointing=True,
    ),
}  # fmt: skip
LOSSES = ("kd", "ce")
WEIGHTS = ("float32", "bfloat16")


@dataclass
class Row:
    """One measurement.

    Attributes:
        loss: ``kd`` or ``ce``.
        who: ``rehead``, ``latent`` (Rehead's run of that student) or ``Trainer``.
        weights: dtype of what the optimiser moves.
        rows: in a micro-batch; 0 where Rehead chose.
        tokens_per_second: over the measured steps, all that lies between them included, of all processes.
        peak_bytes: most memory allocated in the main process; its resident memory on a CPU.
        speedup: over the fastest Trainer with this loss.
        memory: peak over that Trainer's.
        utilisation: operations that the steps needed over what the GPUs' matrix products could have done; 0 on a CPU.
    """

    loss: str
    who: str
    weights: str
    rows: int
    tokens_per_second: float
    peak_bytes: int
    speedup: float = 1.0
    memory: float = 1.0
    utilisation: float = 0.0


def measure_rehead(folder: Path, data: str, loss: str, setting: Setting, student: str = "student") -> Row | None:
    """The project's own run, measured by its own log, of a student in a folder of that name; in the main process."""
    from rehead.recipes import uptrain

    events: list[dict[str, Any]] = []
    uptrain(
        folder / student,
        folder / f"{student}-{loss}",
        data=[data],
        teacher=str(folder / "teacher") if loss == "kd" else None,
        loss=loss,
        tokens=setting.tokens,
        batch_tokens=setting.rows * setting.length,
        seq_length=setting.length,
        attention=setting.attention,
        compile=setting.compile,
        micro_batch=setting.micro_batch or None,
        gradient_checkpointing=setting.gradient_checkpointing,
        lora_rank=setting.lora_rank,
        checkpoint_every=0,
        on_event=events.append,
    )
    steps = [event for event in events if event["event"] == "step"]
    if not steps:
        return None
    first, last = steps[setting.warmup - 1], steps[-1]
    speed = (last["tokens"] - first["tokens"]) / (last["seconds"] - first["seconds"])
    return Row(loss, "rehead" if student == "student" else student, "float32", 0, speed, int(last["peak_memory_bytes"]))


class _Distilling(Trainer):
    """A Trainer whose loss is the KL from a teacher's logits, over the whole vocabulary."""

    teacher: Any = None

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """KL(teacher || student), summed over tokens and divided by their number in the step."""
        if self.teacher is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        ids = inputs["input_ids"]
        logits = model(input_ids=ids).logits
        with torch.no_grad():
            wanted = self.teacher(input_ids=ids).logits
        ours, theirs = (z.float().log_softmax(-1).flatten(0, 1) for z in (logits, wanted))
        loss = nn.functional.kl_div(ours, theirs, log_target=True, reduction="sum")
        return loss / (ids.numel() if num_items_in_batch is None else num_items_in_batch)


class _Clock(TrainerCallback):
    """When each optimiser step ended on the device."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wait for the device and look at the clock."""
        _wait()
        self.ends.append(time.perf_counter())


def measure_trainer(folder: Path, loss: str, weights: str, rows: int, setting: Setting, world: int = 1) -> Row:
    """The plain set-up, with weights of a dtype and micro-batches of ``rows`` in each of ``world`` processes."""
    cuda = torch.cuda.is_available()
    student = LlamaForCausalLM.from_pretrained(folder / "student", dtype=getattr(torch, weights))
    clock = _Clock()
    if setting.gradient_checkpointing:
        checkpoint_activations(student)
    ids = torch.randint(0, setting.vocab_size, (setting.rows * (setting.steps + setting.warmup), setting.length))
    examples: list[dict[str, Tensor]] = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=setting.rows // rows // world,
        max_steps=setting.steps + setting.warmup,
        bf16=True,
        use_cpu=not cuda,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    trainer = _Distilling(model=student, args=arguments, train_dataset=examples, callbacks=[clock])  # type: ignore[arg-type]
    if loss == "kd":
        teacher: Any = LlamaForCausalLM.from_pretrained(folder / "teacher", dtype=torch.bfloat16)
        trainer.teacher = teacher.to(arguments.device).eval()
    trainer.train()
    seconds = clock.ends[-1] - clock.ends[setting.warmup - 1]
    return Row(loss, "Trainer", weights, rows, setting.steps * setting.rows * setting.length / seconds, _peak())


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _peak() -> int:
    from rehead.recipes.training.loop import peak_memory

    return peak_memory(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _fresh() -> None:
    """Nothing of the run before in memory, in the compiler or in the peak."""
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _told(row: Row) -> Row:
    print(f"... {row}", file=sys.stderr, flush=True)
    return row


def check(setting: Setting, losses: Sequence[str], world: int) -> None:
    """Refuse what cannot be measured.

    Raises:
        UsageError: a loss that the Trainer has no counterpart for, or micro-batches that do not divide the batch.
    """
    for loss in losses:
        if loss not in LOSSES:
            raise UsageError(f"unknown loss {loss!r}; choose from {', '.join(LOSSES)}")
    for weights in setting.trainer_weights:
        if weights not in WEIGHTS:
            raise UsageError(f"unknown weights {weights!r}; choose from {', '.join(WEIGHTS)}")
    for rows in setting.trainer_rows:
        if rows < 1 or setting.rows % (rows * world):
            raise UsageError(f"micro-batches of {rows} rows do not make a step of {setting.rows}; choose a divisor")
    if setting.warmup < 1 or setting.steps < 1:
        raise UsageError("warm-up and steps: give at least 1 of each")


def run(setting: Setting, losses: Sequence[str] = LOSSES, ranks: Ranks | None = None) -> list[Row]:
    """Measure both with every loss; ratios are over the fastest Trainer. All processes of a launch call this.

    Raises:
        UsageError: see :func:`check`.
    """
    ranks = ranks or join_ranks("auto")
    check(setting, losses, ranks.world)
    on_gpu = ranks.device.type == "cuda"
    rate = matrix_rate() if on_gpu else 0.0
    found: list[Row] = []
    with ranks.announced(), tempfile.TemporaryDirectory() as own:
        folder = Path(ranks.from_main(lambda: own))
        if ranks.main:
            write_model(folder / "student", setting, setting.kv_heads, 0, ranks.device)
            write_model(folder / "teacher", setting, setting.teacher_kv_heads, 1, ranks.device)
            write_text(folder / "text.txt", setting)
            if setting.latent:
                write_latent(folder / "latent", setting)
        data = ranks.from_main(lambda: text_name(folder / "text.txt", setting))
        for loss in losses:
            group = []
            for student in ("student", "latent")[: 1 + bool(setting.latent)]:
                _fresh()
                row = measure_rehead(folder, data, loss, setting, student)
                if row is not None:
                    group.append(_told(row))
            for weights, rows in product(setting.trainer_weights, setting.trainer_rows):
                _fresh()
                try:
                    row = measure_trainer(folder, loss, weights, rows, setting, ranks.world)
                except torch.OutOfMemoryError:
                    print(f"... {loss} Trainer with {rows} rows: out of memory", file=sys.stderr, flush=True)
                    continue
                if ranks.main:
                    group.append(_told(row))
            peers = [row for row in group if row.who == "Trainer"]
            best = max(peers, key=lambda row: row.tokens_per_second, default=None)
            for row in group:
                if best is not None:
                    row.speedup = row.tokens_per_second / best.tokens_per_second
                    row.memory = row.peak_bytes / best.peak_bytes
                if on_gpu:
                    needed = row.tokens_per_second * training_operations(setting, loss)
                    row.utilisation = needed / (rate * ranks.world)
            found += group
        ranks.wait()
    return found


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text; ratios over the Trainer's fastest."""
    lines = ["loss  who      weights   micro-batch  tokens/s  peak GiB  speed-up  memory   MFU"]
    lines += [
        f"{r.loss:<4}  {r.who:<7}  {r.weights:<8}  {r.rows or 'own':>11}  {r.tokens_per_second:>8.0f}  "
        f"{r.peak_bytes / 2**30:>8.2f}  {r.speedup:>8.2f}  {r.memory:>6.2f}  {r.utilisation:>4.2f}"
        for r in rows
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print; ``argv`` as on the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m rehead.benchmarks.uptrain", description="Uptraining beside a plain transformers.Trainer"
    )
    parser.add_argument("--shape", default="smollm2", help=f"one of {', '.join(SHAPES)}; single sizes replace its own")
    parser.add_argument("--losses", default=",".join(LOSSES))
    for field in fields(Setting):
        flag = f"--{field.name.replace('_', '-')}"
        if field.type == "bool":
            parser.add_argument(flag, action=argparse.BooleanOptionalAction)
        else:
            parser.add_argument(flag, type=int if field.type == "int" else str)
    parser.add_argument("--json", help="also write the rows to this file")
    args = parser.parse_args(argv)
    check_names("--shape", [args.shape], SHAPES)
    given = {name: value for name, value in vars(args).items() if name in Setting.__dataclass_fields__}
    given = {name: value for name, value in given.items() if value is not None}
    if "trainer_rows" in given:
        given["trainer_rows"] = tuple(int(n) for n in given["trainer_rows"].split(",") if n)
    if "trainer_weights" in given:
        given["trainer_weights"] = tuple(given["trainer_weights"].split(","))
    setting = replace(SHAPES[args.shape], **given)
    ranks = join_ranks("auto")
    rows = run(setting, args.losses.split(","), ranks)
    if not ranks.main:
        return
    ran_on = machine()
    print(headline(ran_on))
    print(f"{setting.rows} x {setting.length} tokens a step; processes: {ranks.world}")
    print(table(rows))
    if args.json:
        facts = {"machine": ran_on, "setting": asdict(setting), "processes": ranks.world}
        facts["rows"] = [asdict(row) for row in rows]
        Path(args.json).write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
