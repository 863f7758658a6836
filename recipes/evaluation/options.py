"""The options of an evaluation, stated once: keyword arguments, flags and a recipe's section."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rehead.counts import Count, Held, Length, Seed, Tokens
from rehead.errors import UsageError
from rehead.options import SPLIT, Flag, Options, pairs
from rehead.options import Names as Texts
from rehead.recipes.evaluation.gates import check_gates

#: As :data:`rehead.models.recall.SHORTEST`, which a command's help must not import torch for.
SHORTEST = 6
#: A needle, its line ends and its repeated key take about half of this.
MIN_NEEDLE = 32

Positive = Annotated[Count, Field(ge=1)]
Counts = Annotated[tuple[Positive, ...], SPLIT]
Lengths = Annotated[tuple[Annotated[Length, Field(ge=1)], ...], SPLIT]
Names = Annotated[tuple[str, ...], SPLIT]
# Of a limit that is given twice the stricter counts.
Highest = Annotated[dict[str, float], pairs("NAME=LIMIT", "kl=0.5", min), Flag(metavar="NAME=LIMIT")]
Lowest = Annotated[dict[str, float], pairs("NAME=LIMIT", "top1-agreement=0.9", max), Flag(metavar="NAME=LIMIT")]


class EvaluateOptions(Options):
    """What an evaluation is asked to do."""

    window: Length = Field(512, ge=2, description="Tokens that the model sees at once.")
    stride: Annotated[Length | None, Flag(default="half a window")] = Field(
        None, ge=1, description="Tokens from one window of the strided convention to the next."
    )
    conventions: Annotated[
        tuple[Literal["disjoint", "strided", "rolling"], ...], SPLIT, Flag("--convention", metavar="NAME")
    ] = Field(
        ("disjoint", "strided"),
        description="Of the perplexity: disjoint, strided, or rolling as the harness has it; repeat for more.",
    )
    tokens: Tokens = Field(32768, ge=1, description="The first so many of each text.")
    samples: Count = Field(3, ge=0, description="Pieces of the first text that the models continue, word for word.")
    sample_tokens: Length = Field(32, ge=1, description="Tokens of each continuation, the most likely ones.")
    damage: bool = Field(False, description="Measure each layer of MODEL alone in the baseline.")
    damage_tokens: Tokens = Field(2048, ge=1, description="On so many tokens of the first text.")
    needle: Lengths = Field((), description="Context lengths at which retrieval is tried, e.g. 512,2048.")
    needle_depths: Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], SPLIT] = Field(
        (0.0, 0.25, 0.5, 0.75, 1.0), description="Where the needle stands, from 0 to 1."
    )
    needle_trials: Count = Field(8, ge=1, description="At each length and depth.")
    recall: Lengths = Field(
        (), description="Distances at which copying and key-value recall are tried, e.g. 256,1024; what windows cost."
    )
    recall_trials: Count = Field(8, ge=1, description="Texts at each distance.")
    tasks: Annotated[Names, Flag(metavar="NAMES")] = Field(
        (), description="lm-evaluation-harness tasks: arc_easy,piqa (extra: rehead[tasks])."
    )
    tasks_dir: Annotated[str | None, Flag(metavar="DIR")] = Field(
        None, description="Task files of your own, which need no network."
    )
    task_limit: Annotated[Count | None, Flag(default="all")] = Field(None, ge=1, description="Samples of each task.")
    shots: Annotated[Count | None, Flag(default="the task's own")] = Field(
        None, ge=0, description="Examples before each question."
    )
    speed: bool = Field(False, description="Measure prefill and decoding, tokens per second.")
    speed_batch: Counts = Field((1, 8), description="Sequences at once.")
    speed_context: Lengths = Field((512, 2048), description="Tokens of context.")
    speed_repeats: Count = Field(6, ge=1, description="Runs of which medians are taken; 6 or more give 95% intervals.")
    batch_tokens: Annotated[Held | None, Flag(default="by the device")] = Field(
        None, ge=1, description="Tokens in a forward pass."
    )
    patches: Annotated[Texts, Flag("--patch", metavar="NAME:key=value")] = Field(
        (), description="Variant put on MODEL, beside MODEL as it is, e.g. window:size=1k; repeat to stack more."
    )
    attention: Annotated[str | None, Flag(default="the model's own")] = Field(
        None, description="Implementation: sdpa, eager, ... or tiled for Rehead's."
    )
    device: str = Field("auto", description="auto, cpu, cuda, ...")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Of weights and arithmetic; auto is float32 on a CPU and the checkpoint's own elsewhere."
    )
    resamples: Count = Field(2000, ge=1, le=1_000_000, description="Of the bootstrap behind the intervals.")
    seed: Seed = Field(0, description="Of everything that is drawn.")
    fail_above: Highest = Field(
        {}, description="Exit with 5 where a figure is above, e.g. kl=0.5 or perplexity-ratio=1.2; repeat for more."
    )
    fail_below: Lowest = Field({}, description="The same for one below: top1-agreement=0.9.")

    @model_validator(mode="after")
    def _consistent(self) -> EvaluateOptions:
        if self.stride is not None and self.stride > self.window:
            raise UsageError(f"--stride {self.stride}: is more than the window of {self.window}, and would skip tokens")
        if self.tokens < self.window:
            raise UsageError(f"--tokens {self.tokens}: is less than one window of {self.window}; give more")
        if self.needle and min(self.needle) < MIN_NEEDLE:
            raise UsageError(f"--needle {min(self.needle)}: must be {MIN_NEEDLE} or more tokens")
        if self.recall and min(self.recall) < SHORTEST:
            raise UsageError(f"--recall {min(self.recall)}: must be {SHORTEST} or more tokens")
        check_gates(self.fail_above, self.fail_below)
        return self
