"""The training loop: steps, evaluations, checkpoints, and a stop that keeps one."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from rehead.checkpoints.stream import ResourceError
from rehead.console import Progress
from rehead.data.store import IGNORED, Rows, TokenStore
from rehead.errors import EXIT_INTERRUPTED, ReheadError, VerificationError
from rehead.recipes.training.checkpoints import WorkFolder, save
from rehead.recipes.training.log import RunLog
from rehead.recipes.training.optimizer import Optimizer, Weights, rate_factor
from rehead.recipes.training.options import UptrainOptions
from rehead.recipes.training.processes import Processes
from rehead.recipes.training.rate import Rate
from rehead.recipes.training.texts import HeldOut, evaluate_held_out, first_micro_batch, forward_inputs, rows_to_train


class Interrupted(ReheadError):
    """The run was asked to stop and has kept a checkpoint: exit code 130, or 143 for SIGTERM."""

    def __init__(self, message: str, number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.exit_code = EXIT_INTERRUPTED if number == signal.SIGINT else 128 + number


class StopRequests:
    """Notes the first SIGINT or SIGTERM inside a ``with`` block; the second acts at once, as it would have.

    Args:
        announce: say on standard error that the step is finished first; a step can take a minute.

    Attributes:
        number: the signal that came, or 0.
    """

    def __init__(self, announce: bool = False) -> None:
        self.number = 0
        self._announce = announce
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._restore()
        if self._announce:
            # Past Python's streams, which the signal may have found in the middle of a write.
            with contextlib.suppress(OSError):
                os.write(2, b"\nstopping after this step, with a checkpoint; once more stops at once, without\n")

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()


@dataclass
class _PendingLog:
    """Figures of a step that the device may still be computing."""

    step: int
    values: Tensor
    names: list[str]
    rate: float
    ready: Any = None


@dataclass
class Loop:
    """One run: what is trained, on what, and where it is told.

    Attributes:
        module: the student with its loss.
        weights: what trains.
        optimizer: of those.
        store: the tokens.
        options: of the run.
        rate: the peak learning rate, which checkpoints keep.
        run: the processes.
        log: of the main process; the others' writes nothing.
        work: the checkpoints' folder, in the main process.
        held_out: texts to evaluate on.
        progress: called with ("training", steps done, steps).
        seconds: spent so far, by earlier runs too.
        last: figures of the last step and of the last evaluation of each text.
    """

    module: Any
    weights: Weights
    optimizer: Optimizer
    store: TokenStore
    options: UptrainOptions
    rate: Rate
    run: Processes
    log: RunLog
    work: WorkFolder | None
    held_out: Sequence[HeldOut] = ()
    progress: Progress | None = None
    seconds: float = 0.0
    last: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._pending: deque[_PendingLog] = deque()
        self._started = self._ticked = time.monotonic()
        self._stopping = False
        self._saved = -1
        self._micro = first_micro_batch(self.options, self.run)

    # ---- the loop

    def train(self, start: int) -> None:
        """Run the steps from ``start`` on.

        Raises:
            VerificationError: a loss or gradient that is not finite; names the step and the checkpoint to go back to.
            Interrupted: SIGINT or SIGTERM; a checkpoint has been kept.
            ResourceError: memory or disk ran out.
        """
        self._saved = start if start else -1
        if self.run.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.run.device)
        self.module.train()
        with StopRequests(announce=self.run.main) as requests:
            if start == 0:
                self._evaluate(0)
            for step in range(start, self.options.steps):
                self._step(step, requests.number)
                if len(self._pending) > (0 if self.optimizer.waits else 1):
                    self._settle()
                done = step + 1
                # First, so that a run which resumes from the checkpoint finds the evaluation done.
                if self.held_out and self._due(done, self.options.evaluation_interval):
                    self._settle_all()
                    self._evaluate(done)
                if self._due(done, self.options.checkpoint_every) and done < self.options.steps:
                    self._settle_all()
                    self._checkpoint(done)
                if self._stopping:
                    # A process may hear of the stop from another before its own signal comes.
                    ended = self.run.sum(torch.tensor(float(requests.number == signal.SIGTERM)))
                    self._stop(done, signal.SIGTERM if ended > 0 else signal.SIGINT)
            self._settle_all()
            self._evaluate(self.options.steps)

    def _due(self, done: int, every: int) -> bool:
        return bool(every) and done % every == 0

    def _step(self, step: int, stop: int) -> None:
        options, run = self.options, self.run
        # Whatever a step draws, it draws again when it is repeated after a resume.
        torch.manual_seed((options.seed * 1_000_003 + step) * run.world + run.rank)
        batch = rows_to_train(self.store, options, step, options.seed)
        counted = int((batch.labels != IGNORED).sum())
        share = options.rows_per_step // run.world
        mine = Rows(*(part[run.rank * share : (run.rank + 1) * share] for part in batch))
        sums = self._accumulate(mine, max(counted, 1), step)
        names = sorted(set(sums) - {"loss"})
        if not run.sharded:
            run.sum_gradients(self.weights.gradients())
        values = torch.stack([sums["loss"], *(sums[name] for name in names)]).float() / max(counted, 1)
        # Filled on the device: a tensor made of a Python number would be copied there, for which the host waits.
        values = run.sum(torch.cat([values, values.new_full((1,), float(stop != 0))]))
        factor = rate_factor(step, options)
        norm = self.optimizer.step(factor, values[0])
        values = torch.cat([norm.to(values)[None], values])
        pending = _PendingLog(step, values, ["gradient_norm", "loss", *names, "stop"], self.optimizer.rate())
        if values.is_cuda:
            pending.values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            pending.values.copy_(values, non_blocking=True)
            pending.ready = torch.cuda.Event()
            pending.ready.record()
        self._pending.append(pending)

    def _accumulate(self, rows: Rows, counted: int, step: int) -> dict[str, Tensor]:
        """Forward and backward over this process's rows; a GPU that runs out of memory is given fewer at a time."""
        while True:
            # Out of the handler before anything is given back: inside it, the error holds what the pass had allocated.
            with contextlib.suppress(torch.OutOfMemoryError):
                return self._passes(rows, counted)
            self.weights.clear()
            torch.cuda.empty_cache()
            if self._micro == 1 or self.run.world > 1 or self.options.micro_batch:
                raise ResourceError(
                    f"out of GPU memory at step {step + 1} with {self._micro} rows of {self.options.seq_length} "
                    "tokens in a forward pass; give a smaller --micro-batch or --gradient-checkpointing"
                )
            self._micro = -(-self._micro // 2)
            self.log.write(
                "note", step=step + 1, note=f"out of memory; {self._micro} rows in a forward pass from here on"
            )

    def _passes(self, rows: Rows, counted: int) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}
        # FSDP2 takes the mean over processes where the sum is meant.
        run = self.run
        scale = run.world if run.sharded else 1
        for at in range(0, len(rows.input_ids), self._micro):
            part = Rows(*(tensor[at : at + self._micro] for tensor in rows))
            out = self.module(**forward_inputs(part, run.device))
            (out.loss_sum * (scale / counted)).backward()
            self.weights.collect()
            for name, value in {"loss": out.loss_sum.detach(), **out.metrics}.items():
                sums[name] = sums[name] + value if name in sums else value
        return sums

    # ---- what has been computed

    def _settle_all(self) -> None:
        while self._pending:
            self._settle()

    def _settle(self) -> None:
        """Read the oldest step's figures, which on a GPU were computed while the next was being launched."""
        pending = self._pending.popleft()
        if pending.ready is not None:
            pending.ready.synchronize()
        figures = dict(zip(pending.names, pending.values.tolist()))
        self._stopping |= figures.pop("stop") > 0
        now = time.monotonic()
        tokens = self.options.rows_per_step * self.options.seq_length
        speed, self._ticked = tokens / max(now - self._ticked, 1e-9), now
        done = pending.step + 1
        figures = {"loss": figures.pop("loss"), "learning_rate": pending.rate, **figures}
        self.last["step"] = {"step": done, "tokens": done * tokens, **figures}
        self.log.write(
            "step",
            **self.last["step"],
            tokens_per_second=round(speed, 1),
            seconds=round(self.elapsed(), 3),
            peak_memory_bytes=peak_memory(self.run.device),
        )
        if not (math.isfinite(figures["loss"]) and math.isfinite(figures["gradient_norm"])):
            what = "loss" if not math.isfinite(figures["loss"]) else "gradient"
            kept = f"the checkpoint of step {self._saved} is kept" if self._saved >= 0 else "there is no checkpoint yet"
            raise VerificationError(
                f"the {what} of step {done} is not finite, so training stopped; {kept}; "
                "start again with a lower --lr or a longer --warmup (--resume never)"
            )
        if self.progress is not None:
            self.progress("training", done, self.options.steps)

    def elapsed(self) -> float:
        """Seconds of training, with those of the runs that this one resumes."""
        return self.seconds + time.monotonic() - self._started

    def _checkpoint(self, done: int) -> None:
        started = time.monotonic()
        position = self.log.position()
        state = {
            "log_position": position,
            "seconds": round(self.elapsed(), 3),
            "processes": self.run.world,
            "device": self.run.device.type,
            "rate": asdict(self.rate),
            "last": self.last,
        }
        size = save(self.work, done, self.weights.tensors, self.optimizer.state(), state)
        self.run.wait()
        self._saved = done
        if self.work is not None:
            self.work.prune(self.options.keep)
        self.log.write("checkpoint", step=done, bytes=size, seconds=round(time.monotonic() - started, 3))
        self._ticked = time.monotonic()

    def _evaluate(self, done: int) -> None:
        for text in self.held_out:
            if self.last.get(f"evaluation {text.name}", {}).get("step") == done:
                continue
            rows = max(self._micro * self.options.seq_length // text.windows.shape[1], 1)
            facts = {
                "step": done,
                "tokens": done * self.options.rows_per_step * self.options.seq_length,
                "data": text.name,
                **evaluate_held_out(self.module, text, self.run, rows),
            }
            self.log.write("evaluation", **facts)
            measured = "kl" if "kl" in facts else "perplexity"
            start = self.last.get(f"evaluation {text.name}", {}).get("at_start", {measured: facts[measured]})
            self.last[f"evaluation {text.name}"] = {**facts, "at_start": start}
            if done == self.options.steps and facts[measured] > start[measured]:
                change = f"{measured} {start[measured]:.4g} before, {facts[measured]:.4g} now"
                self.log.write("warning", note=f"{text.name}: further away than at the start ({change}); lower --lr")
        self._ticked = time.monotonic()

    def _stop(self, done: int, number: int) -> None:
        self._settle_all()
        if done < self.options.steps:
            if self._saved != done:
                self._checkpoint(done)
            raise Interrupted(
                f"interrupted after step {done} of {self.options.steps}; its checkpoint is kept and the same command "
                "resumes from it",
                number,
            )


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: allocated on a GPU, resident of the process elsewhere."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource  # not on every system

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
