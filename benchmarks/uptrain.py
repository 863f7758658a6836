"""Uptraining: tokens per second and peak memory of `rehead uptrain` beside a `transformers.Trainer` with its loss.

A student and a teacher of SmolLM2-135M's shape with random weights, written to a folder and trained for a few steps on
a random text. Rehead's rows are its own log of `rehead.recipes.uptrain`: the real command, reading, packing, logging
and all, with the layers compiled. The Trainer runs in bf16 with its defaults and a `compute_loss` that takes the KL
from both models' whole logits, as one writes it first: over float32 weights (Rehead keeps float32 masters too) and over
the checkpoint's own bf16, whose small updates are lost to rounding. Micro-batches of several sizes are tried, and the
fastest Trainer of all is what the ratios are taken over. Every step is an optimiser step of the same number of tokens;
the first ones, where kernels are compiled, do not count.

With ``--latent`` a student with latent attention (MLA) of that size trains too, beside the one with KV heads.

    python -m rehead.benchmarks.uptrain
    python -m rehead.benchmarks.uptrain --losses kd --trainer-rows 32,64 --document-tokens 1500
    python -m rehead.benchmarks.uptrain --losses kd --trainer-rows "" --latent 96 --rope-dims 32
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from rehead.benchmarks.machine import headline, machine
from rehead.errors import UsageError
from rehead.variants.latent.gauge import LANE_DEFAULT, NORM_EPS

LOSSES = ("kd", "ce")
WEIGHTS = ("float32", "bfloat16")


@dataclass(frozen=True)
class Setting:
    """Shapes of the models and of the run; the defaults are SmolLM2-135M with one KV head, 32k tokens a step.

    Attributes:
        rows: of ``length`` tokens in an optimiser step.
        steps: measured, after ``warmup`` that are not.
        document_tokens: length of a document in the text; 0 for one endless one, so that no row holds two.
        trainer_rows: micro-batches to try the Trainer with; each must divide ``rows``.
        trainer_weights: dtypes of the Trainer's weights.
        attention: of Rehead's run, as ``--attention``; the Trainer has transformers' default, SDPA.
        compile: compile the layers in Rehead's run.
        latent, rope_dims: of a further student with a latent of so many numbers, as conversions store one; none with 0.
    """

    rows: int = 64
    length: int = 512
    steps: int = 24
    warmup: int = 4
    hidden_size: int = 576
    intermediate_size: int = 1536
    layers: int = 30
    heads: int = 9
    kv_heads: int = 1
    teacher_kv_heads: int = 3
    vocab_size: int = 49152
    document_tokens: int = 0
    trainer_rows: tuple[int, ...] = (16, 32, 64)
    trainer_weights: tuple[str, ...] = ("float32", "bfloat16")
    attention: str = "sdpa"
    compile: bool = True
    latent: int = 0
    rope_dims: int = 32


@dataclass
class Row:
    """One measurement.

    Attributes:
        loss: ``kd`` or ``ce``.
        who: ``rehead``, ``latent`` (Rehead's run of that student) or ``Trainer``.
        weights: dtype of what the optimiser moves.
        rows: in a micro-batch; 0 where Rehead chose.
        tokens_per_second: over the measured steps, all that lies between them included.
        peak_bytes: most memory allocated; resident memory of the process on a CPU.
        speedup: over the fastest Trainer with this loss.
        memory: peak over that Trainer's.
    """

    loss: str
    who: str
    weights: str
    rows: int
    tokens_per_second: float
    peak_bytes: int
    speedup: float = 1.0
    memory: float = 1.0


def write_model(folder: Path, setting: Setting, kv_heads: int, seed: int) -> None:
    """A checkpoint with random weights in bf16, and a tokenizer whose words are numbers."""
    config = LlamaConfig(**_shape(setting), num_key_value_heads=kv_heads)
    torch.manual_seed(seed)
    _save(LlamaForCausalLM(config), folder, setting)


def write_latent(folder: Path, setting: Setting) -> None:
    """The same with latent attention in every layer, at the scale at which Rehead stores it."""
    size = setting.hidden_size // setting.heads
    config = DeepseekV3Config(
        **_shape(setting),
        moe_intermediate_size=setting.intermediate_size,
        first_k_dense_replace=setting.layers,
        n_routed_experts=1,
        num_experts_per_tok=1,
        n_group=1,
        topk_group=1,
        num_key_value_heads=setting.heads,
        q_lora_rank=None,
        kv_lora_rank=setting.latent,
        qk_rope_head_dim=setting.rope_dims,
        qk_nope_head_dim=size,
        v_head_dim=size,
    )
    torch.manual_seed(2)
    model: Any = DeepseekV3ForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.kv_a_layernorm.weight.fill_(LANE_DEFAULT)
            layer.self_attn.kv_a_proj_with_mqa.weight[: setting.latent] *= NORM_EPS**0.5 / LANE_DEFAULT
    _save(model, folder, setting)


def _shape(setting: Setting) -> dict[str, Any]:
    """What the configs of both classes have in common."""
    return {
        "vocab_size": setting.vocab_size,
        "hidden_size": setting.hidden_size,
        "intermediate_size": setting.intermediate_size,
        "num_hidden_layers": setting.layers,
        "num_attention_heads": setting.heads,
        "max_position_embeddings": max(setting.length, 2048),
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def _save(model: Any, folder: Path, setting: Setting) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    model.to(torch.bfloat16).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({str(i): i for i in range(setting.vocab_size)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="0", unk_token="0").save_pretrained(folder)


def write_text(path: Path, setting: Setting) -> str:
    """Random words for every step, and what to call them in ``--data``."""
    count = (setting.steps + setting.warmup) * setting.rows * setting.length + 1
    ids = torch.randint(1, setting.vocab_size, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    line = setting.document_tokens or 256
    path.write_text("\n".join(" ".join(map(str, ids[at : at + line])) for at in range(0, count, line)) + "\n")
    return f"{path}#lines" if setting.document_tokens else str(path)


def measure_rehead(folder: Path, data: str, loss: str, setting: Setting, student: str = "student") -> Row:
    """The project's own run, measured by its own log, of a student in a folder of that name."""
    from rehead.recipes import uptrain

    events: list[dict[str, Any]] = []
    uptrain(
        folder / student,
        folder / f"{student}-{loss}",
        data=[data],
        teacher=str(folder / "teacher") if loss == "kd" else None,
        loss=loss,
        tokens=(setting.steps + setting.warmup) * setting.rows * setting.length,
        batch_tokens=setting.rows * setting.length,
        seq_length=setting.length,
        attention=setting.attention,
        compile=setting.compile,
        checkpoint_every=0,
        on_event=events.append,
    )
    steps = [event for event in events if event["event"] == "step"]
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


def measure_trainer(folder: Path, loss: str, weights: str, rows: int, setting: Setting) -> Row:
    """The plain set-up, with weights of a dtype and micro-batches of ``rows``."""
    cuda = torch.cuda.is_available()
    student = LlamaForCausalLM.from_pretrained(folder / "student", dtype=getattr(torch, weights))
    clock = _Clock()
    ids = torch.randint(0, setting.vocab_size, (setting.rows * (setting.steps + setting.warmup), setting.length))
    examples: list[dict[str, Tensor]] = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=setting.rows // rows,
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


def run(setting: Setting, losses: Sequence[str] = LOSSES) -> list[Row]:
    """Measure both with every loss; ratios are over the fastest Trainer.

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
        if rows < 1 or setting.rows % rows:
            raise UsageError(f"micro-batches of {rows} rows do not make a step of {setting.rows}; choose a divisor")
    if setting.warmup < 1 or setting.steps < 1:
        raise UsageError("warm-up and steps: give at least 1 of each")
    found: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "student", setting, setting.kv_heads, 0)
        write_model(folder / "teacher", setting, setting.teacher_kv_heads, 1)
        data = write_text(folder / "text.txt", setting)
        if setting.latent:
            write_latent(folder / "latent", setting)
        for loss in losses:
            group = []
            for student in ("student", "latent")[: 1 + bool(setting.latent)]:
                _fresh()
                group.append(_told(measure_rehead(folder, data, loss, setting, student)))
            for weights, rows in product(setting.trainer_weights, setting.trainer_rows):
                _fresh()
                try:
                    group.append(_told(measure_trainer(folder, loss, weights, rows, setting)))
                except torch.OutOfMemoryError:
                    print(f"... {loss} Trainer with {rows} rows: out of memory", file=sys.stderr, flush=True)
            peers = [row for row in group if row.who == "Trainer"]
            best = max(peers, key=lambda row: row.tokens_per_second, default=None)
            for row in group if best is not None else []:
                row.speedup = row.tokens_per_second / best.tokens_per_second  # type: ignore[union-attr]
                row.memory = row.peak_bytes / best.peak_bytes  # type: ignore[union-attr]
            found += group
    return found


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text; ratios over the Trainer's fastest."""
    lines = ["loss  who      weights   micro-batch  tokens/s  peak GiB  speed-up  memory"]
    lines += [
        f"{r.loss:<4}  {r.who:<7}  {r.weights:<8}  {r.rows or 'own':>11}  {r.tokens_per_second:>8.0f}  "
        f"{r.peak_bytes / 2**30:>8.2f}  {r.speedup:>8.2f}  {r.memory:>6.2f}"
        for r in rows
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print; ``argv`` as on the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m rehead.benchmarks.uptrain", description="Uptraining beside a plain transformers.Trainer"
    )
    defaults = Setting()
    parser.add_argument("--losses", default=",".join(LOSSES))
    parser.add_argument("--trainer-rows", default=",".join(map(str, defaults.trainer_rows)))
    parser.add_argument("--trainer-weights", default=",".join(defaults.trainer_weights))
    parser.add_argument("--attention", default=defaults.attention)
    parser.add_argument("--no-compile", action="store_true", help="do not compile the layers in Rehead's run")
    for field in (
        "rows", "length", "steps", "warmup", "layers", "hidden_size", "intermediate_size", "heads", "kv_heads",
        "teacher_kv_heads", "vocab_size", "document_tokens", "latent", "rope_dims",
    ):  # fmt: skip
        parser.add_argument(f"--{field.replace('_', '-')}", type=int, default=getattr(defaults, field))
    parser.add_argument("--json", help="also write the rows to this file")
    args = parser.parse_args(argv)
    given = {name: getattr(args, name) for name in Setting.__dataclass_fields__ if hasattr(args, name)}
    given |= {
        "trainer_rows": tuple(int(n) for n in args.trainer_rows.split(",") if n),
        "trainer_weights": tuple(args.trainer_weights.split(",")),
        "compile": not args.no_compile,
    }
    setting = Setting(**given)
    rows = run(setting, args.losses.split(","))
    ran_on = machine()
    print(headline(ran_on))
    print(f"{setting.rows} x {setting.length} tokens a step")
    print(table(rows))
    if args.json:
        facts = {"machine": ran_on, "setting": asdict(setting), "rows": [asdict(row) for row in rows]}
        Path(args.json).write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
