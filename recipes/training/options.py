"""The options of an uptraining: one object behind the API's arguments, the CLI's flags and a recipe's keys."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rehead.counts import Count, Length, Seed, Tokens
from rehead.options import Flag, Names, Options, flag_of, pairs

#: Tokens of the shortest row that repeats anything (:func:`rehead.data.repeats.with_repeats`).
_REPEATING = 66


class UptrainOptions(Options):
    """What an uptraining is asked to do."""

    data: Annotated[Names, Flag(metavar="TEXT")] = Field(
        description="Text to train on: file, folder or Hub dataset (repeat for more); NAME#lines takes "
        "every line as a document, NAME#chars=A:B a part."
    )
    streaming: bool = Field(
        False,
        description="Read no more of the data than --tokens, in its own order, taking "
        "documents from the sources in turn.",
    )
    packing: Literal["isolated", "joined"] = Field(
        "isolated",
        description="Whether documents in a row see each other: "
        "isolated (positions restart, no attention across) or joined.",
    )
    repeats: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the rows in which later stretches repeat earlier ones of the same document, from all "
        "distances, so that the model learns to look far back.",
    )
    teacher: Annotated[
        str | None, Flag(metavar="MODEL", default="what STUDENT was converted from, where the loss needs one")
    ] = Field(None, description="Model to learn from.")
    loss: str = Field("kd", description="kd (KL to the teacher), ce, or a weighted sum such as kd+0.1*ce.")
    temperature: float = Field(1.0, gt=0, description="Of losses that compare distributions.")
    tokens: Tokens = Field(8_000_000, gt=0, description="Tokens to train on, e.g. 8M.")
    batch_tokens: Tokens = Field(32768, gt=0, description="Tokens in an optimiser step, over all processes.")
    seq_length: Length = Field(512, ge=2, description="Tokens in a row.")
    micro_batch: Annotated[Count | None, Flag(default="as many as fit, tried out on a GPU")] = Field(
        None, gt=0, description="Rows in a forward pass."
    )
    learning_rate: Annotated[
        float | None, Flag("--lr", default="5e-4, or less for a student that starts near its teacher")
    ] = Field(None, gt=0, description="Peak learning rate.")
    learning_rates: Annotated[
        dict[str, Annotated[float, Field(ge=0)]],
        pairs("PATTERN=FACTOR", "k_proj=2"),
        Flag("--lr-for", metavar="PATTERN=FACTOR"),
    ] = Field(
        default_factory=dict,
        description="Another learning rate for parameters whose names hold PATTERN "
        "(a regular expression); repeat for more.",
    )
    schedule: Literal["cosine", "wsd", "constant"] = Field("cosine", description="Of the learning rate after warm-up.")
    warmup: float = Field(0.05, ge=0, description="Linear warm-up: a share of all steps below 1, or so many steps.")
    decay: float = Field(0.2, gt=0, le=1, description="Share of all steps in which wsd goes down.")
    final_learning_rate: float = Field(0.0, ge=0, le=1, description="Where the schedule ends, as a share of the peak.")
    optimizer: Literal["adamw", "adamw-8bit"] = Field(
        "adamw",
        description="adamw, or adamw-8bit, whose two moments take 2 bytes of each trained number where AdamW's take 8 "
        "(needs torchao).",
    )
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's decay rates.")
    epsilon: float = Field(1e-8, gt=0, description="AdamW's epsilon.")
    weight_decay: float = Field(0.0, ge=0, description="On matrices only.")
    clip: float = Field(1.0, ge=0, description="Largest norm of the gradient; 0 does not clip.")
    train: str = Field(
        "all",
        description="What trains: all, attention, mlp, norms, embeddings, or regular expressions on "
        "parameter names, joined by commas.",
    )
    lora_rank: Count = Field(
        0,
        ge=0,
        description="Train low-rank adapters of this rank on the chosen matrices instead; they are merged at the end.",
    )
    lora_alpha: Annotated[float | None, Flag(default="twice the rank")] = Field(
        None, gt=0, description="Scale of the adapters."
    )
    joint_layers: Count = Field(
        0, ge=0, description="First fit windows of so many neighbouring layers to the teacher's hidden states."
    )
    joint_tokens: Tokens = Field(500_000, gt=0, description="Tokens for each window of that stage.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations in the backward pass.")
    compile: bool = Field(False, description="Compile each layer with torch.compile.")
    attention: str = Field(
        "auto", description="auto, tiled, or an implementation of transformers such as sdpa or eager."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Of the arithmetic; master weights are float32. auto: bfloat16 on a GPU."
    )
    device: str = Field("auto", description="auto, cpu, cuda, ...")
    seed: Seed = Field(0, description="Of the order of the data and of everything drawn.")
    checkpoint_every: Count = Field(
        100, ge=0, description="Steps between checkpoints; 0 writes one only when interrupted."
    )
    keep: Count = Field(2, ge=1, description="Checkpoints to keep.")
    eval_data: Annotated[Names, Flag(metavar="TEXT")] = Field(
        (), description="Held-out text to evaluate on while training (repeat for more)."
    )
    eval_every: Count = Field(0, ge=0, description="Steps between evaluations; 0: ten times in all.")
    eval_tokens: Tokens = Field(32768, gt=0, description="Tokens of each held-out text.")
    token_cache: Annotated[str | None, Flag(metavar="DIR")] = Field(
        None, description="Folder that keeps tokenised data, so that runs on the same data tokenise it once."
    )
    tracker: Names = Field((), description="tensorboard, wandb or trackio (repeat for more).")

    @model_validator(mode="after")
    def _consistent(self) -> UptrainOptions:
        if not self.data:
            raise ValueError("data: name at least one text")
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            raise ValueError(f"warmup {self.warmup:g}: is neither a share below 1 nor a number of steps")
        if self.warmup > max(self.steps, 1):
            raise ValueError(
                f"warmup {self.warmup:g}: is more than the run's {self.steps} step{'s' * (self.steps != 1)}, so it "
                "would never reach its learning rate; give fewer, or a share such as 0.05"
            )
        if self.repeats and self.seq_length < _REPEATING:
            raise ValueError(
                f"--repeats {self.repeats:g}: rows of {self.seq_length} tokens are too short to repeat anything; give "
                f"--seq-length {_REPEATING} or more"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {self.betas}: must lie in [0, 1)")
        for pattern in self.learning_rates:
            _regex(pattern, "learning_rates")
        for part in self.train.split(","):
            _regex(part.strip(), "train")
        return self

    @property
    def rows_per_step(self) -> int:
        """Rows of ``seq_length`` tokens in an optimiser step; at least one."""
        return max(self.batch_tokens // self.seq_length, 1)

    @property
    def steps(self) -> int:
        """Optimiser steps: the fewest that see ``tokens`` tokens."""
        return -(-self.tokens // (self.rows_per_step * self.seq_length))

    @property
    def evaluation_interval(self) -> int:
        """Steps between evaluations of the held-out texts."""
        return self.eval_every or -(-self.steps // 10)

    def objective(self) -> Any:
        """The parsed loss (:class:`rehead.recipes.training.losses.Objective`)."""
        from rehead.recipes.training.losses import parse_objective

        return parse_objective(self.loss, temperature=self.temperature)

    def identity(self) -> dict[str, Any]:
        """The options that decide what comes out, as JSON; a resumed run must agree in them."""
        return {name: value for name, value in self.model_dump(mode="json").items() if name not in _FREE}


#: Options that say how a run is done or watched, not what it makes; ``device`` may change the last digits.
ENVIRONMENT = frozenset({"device", "checkpoint_every", "keep", "token_cache", "tracker"})
#: Options that a resumed run may change; data and teacher are compared by what they hold.
_FREE = ENVIRONMENT | {"eval_data", "eval_every", "eval_tokens", "data", "teacher"}


def _regex(pattern: str, where: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{flag_of(UptrainOptions, where)} {pattern!r}: is no regular expression ({error})") from None
