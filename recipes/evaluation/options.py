"""The options of an evaluation: one object behind the API's arguments, the CLI's flags and a recipe's keys."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from rehead.errors import UsageError, unknown_name
from rehead.recipes.evaluation.gates import check_gates
from rehead.recipes.training.options import parse_count

CONVENTIONS = ("disjoint", "strided", "rolling")
#: A needle, its line ends and its repeated key take about half of this.
MIN_NEEDLE = 32
DTYPES = ("auto", "float32", "bfloat16", "float16")


def _listed(value: Any) -> Any:
    """A single value as a list of one, and ``"a,b"`` as two."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else value


Count = Annotated[int, BeforeValidator(parse_count), Field(ge=1)]
Names = Annotated[tuple[str, ...], BeforeValidator(_listed)]
Counts = Annotated[tuple[Count, ...], BeforeValidator(_listed)]
Depth = Annotated[float, Field(ge=0, le=1)]


class EvaluateOptions(BaseModel):
    """What an evaluation is asked to do.

    Attributes:
        window: tokens that the model sees at once.
        stride: from one window of the strided convention to the next; half a window when None.
        conventions: of the perplexity: ``disjoint``, ``strided``, ``rolling``.
        tokens: the first so many of each text.
        damage: measure each layer alone in the baseline.
        damage_tokens: on so many tokens of the first text.
        needle: context lengths at which retrieval is tried; none when empty.
        needle_depths: where the needle stands, from 0 to 1.
        needle_trials: at each length and depth.
        tasks: lm-evaluation-harness tasks by name.
        tasks_dir: a folder with task files of one's own, which need no network.
        task_limit: samples of each task; all when None.
        shots: examples before each question; the task's own number when None.
        speed: measure prefill and decoding.
        speed_batch, speed_context: at these sizes.
        speed_repeats: of which medians are taken.
        batch_tokens: tokens in a forward pass; by the device when None.
        attention: transformers' attention implementation; its own choice when None.
        device: ``auto``, ``cpu``, ``cuda``, ...
        dtype: of weights and arithmetic; ``auto`` is float32 on a CPU and the checkpoint's own elsewhere.
        resamples: of the bootstrap.
        seed: of everything that is drawn.
        fail_above, fail_below: quality gates, limits by name (see ``rehead.recipes.evaluation.gates``).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    window: Count = 512
    stride: Count | None = None
    conventions: Names = ("disjoint", "strided")
    tokens: Count = 32768
    damage: bool = False
    damage_tokens: Count = 2048
    needle: Counts = ()
    needle_depths: Annotated[tuple[Depth, ...], BeforeValidator(_listed)] = (0.0, 0.25, 0.5, 0.75, 1.0)
    needle_trials: Count = 8
    tasks: Names = ()
    tasks_dir: str | None = None
    task_limit: Count | None = None
    shots: Annotated[int, Field(ge=0)] | None = None
    speed: bool = False
    speed_batch: Counts = (1, 8)
    speed_context: Counts = (512, 2048)
    speed_repeats: Count = 5
    batch_tokens: Count | None = None
    attention: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    resamples: Count = 2000
    seed: Annotated[int, Field(ge=0)] = 0
    fail_above: dict[str, float] = {}
    fail_below: dict[str, float] = {}

    @model_validator(mode="after")
    def _meant(self) -> EvaluateOptions:
        for convention in self.conventions:
            if convention not in CONVENTIONS:
                raise UsageError(unknown_name("convention", convention, CONVENTIONS))
        if self.dtype not in DTYPES:
            raise UsageError(unknown_name("dtype", self.dtype, DTYPES))
        if self.window < 2:
            raise UsageError(f"--window {self.window}: must be 2 or more tokens")
        if self.stride is not None and self.stride > self.window:
            raise UsageError(f"--stride {self.stride}: is more than the window of {self.window}, and would skip tokens")
        if self.tokens < self.window:
            raise UsageError(f"--tokens {self.tokens}: is less than one window of {self.window}; give more")
        if self.needle and min(self.needle) < MIN_NEEDLE:
            raise UsageError(f"--needle {min(self.needle)}: must be {MIN_NEEDLE} or more tokens")
        check_gates(self.fail_above, self.fail_below)
        return self


def checked_options(values: dict[str, Any]) -> EvaluateOptions:
    """Options from keyword arguments.

    Raises:
        UsageError: one that does not exist or cannot be meant.
    """
    try:
        return EvaluateOptions.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        if first["type"] == "extra_forbidden":
            raise UsageError(unknown_name("option", name, EvaluateOptions.model_fields)) from None
        given = repr(first.get("input"))[:60]
        what = first["msg"].removeprefix("Value error, ")
        raise UsageError(f"--{name.replace('_', '-')} {given}: {what[:1].lower()}{what[1:]}") from None
