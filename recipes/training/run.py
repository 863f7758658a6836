"""Uptraining from beginning to end: open, check, tokenise, load, train, write."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from rehead.checkpoints.outputs import check_out, out_path
from rehead.checkpoints.resume import finish_commit
from rehead.console import Progress
from rehead.data.sources import identity as data_identity
from rehead.errors import UsageError
from rehead.models.live import decoder_layers
from rehead.models.positions import check_positions
from rehead.options import takes
from rehead.recipes.training import checkpoints, lora
from rehead.recipes.training.balance import warn_if_unbalanced
from rehead.recipes.training.identity import end_facts, require_same, run_identity, start_facts
from rehead.recipes.training.joint import fit_windows
from rehead.recipes.training.lanes import lanes_off
from rehead.recipes.training.log import LOG_NAME, Listener, RunLog, open_trackers
from rehead.recipes.training.loop import Loop
from rehead.recipes.training.losses import StudentWithLoss
from rehead.recipes.training.models import (
    Opened,
    checkpoint_activations,
    load,
    open_checkpoint,
    prove_isolation,
    same_tokens,
    set_attention,
    share_frozen,
    teacher_name,
)
from rehead.recipes.training.optimizer import Optimizer, Weights, choose
from rehead.recipes.training.options import UptrainOptions
from rehead.recipes.training.output import changed_tensors, plan_output, sketched, trained_tensors, write_output
from rehead.recipes.training.processes import Processes, join_processes, shard
from rehead.recipes.training.rate import Rate, rate_at_start
from rehead.recipes.training.texts import held_out_windows, open_tokens, tokenizer_of

logger = logging.getLogger("rehead.recipes.training")

RESUME = ("auto", "never")
#: Text that is repeated more often teaches less and less (Muennighoff et al. 2023, arXiv 2305.16264).
_MOST_EPOCHS = 4


@dataclass
class Uptraining:
    """What :func:`uptrain` did.

    Attributes:
        out: the finished folder.
        steps: optimiser steps.
        tokens: trained on.
        seconds: of training, over all runs that it took.
        last: figures of the last step (``step``) and of the last evaluation of each held-out text.
        facts: what the manifest records.
    """

    out: Path
    steps: int
    tokens: int
    seconds: float
    last: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return {"out": str(self.out), **self.facts}


@takes(UptrainOptions)
def uptrain(
    student: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    resume: str = "auto",
    overwrite: bool = False,
    command: str | None = None,
    progress: Progress | None = None,
    on_event: Listener | None = None,
    **options: Any,
) -> Uptraining:
    """Train a checkpoint briefly, with the model it was converted from as its teacher, and write a plain checkpoint.

    Under ``accelerate launch`` every process calls this with the same arguments; the main one writes.

    Args:
        student: a folder or Hub id (``owner/name@revision``).
        out: the folder to write; must not exist unless ``overwrite``.
        resume: ``auto`` resumes from the newest whole checkpoint of an interrupted run, ``never`` starts again.
        overwrite: replace an existing checkpoint at ``out``, at the very end.
        command: recorded in the manifest and the model card.
        progress: called with (stage, done, total); stages are "tokenising", "training", "writing".
        on_event: called with every line of the training log.

    Returns:
        What was done.

    Raises:
        UsageError: an invalid argument, data that cannot be used, models that do not fit together, or an
            interrupted run that differs.
        UnsupportedError: a checkpoint that cannot be trained, or a resource that ran out; ``out`` is as it was.
        VerificationError: a loss or gradient is not finite; the last good checkpoint is kept.
        Interrupted: SIGINT or SIGTERM; a checkpoint is kept.
    """
    chosen = UptrainOptions.parse(options)
    check_resume(resume)
    run = join_processes(chosen.device)
    return _Uptraining(os.fspath(student), out_path(out), chosen, run, resume, overwrite, command)(
        progress if run.main else None, on_event if run.main else None
    )


@dataclass
class _Uptraining:
    """The steps of :func:`uptrain`."""

    student: str
    out: Path
    options: UptrainOptions
    run: Processes
    resume: str
    overwrite: bool
    command: str | None

    def __call__(self, progress: Progress | None, on_event: Listener | None) -> Uptraining:
        options, run = self.options, self.run
        if options.rows_per_step % run.world:
            raise UsageError(
                f"--batch-tokens {options.batch_tokens}: {options.rows_per_step} rows of {options.seq_length} cannot "
                f"be shared evenly by {run.world} processes; give a multiple of {run.world * options.seq_length}"
            )
        student = open_checkpoint(self.student)
        name = teacher_name(student, options)
        teacher = None if name is None else open_checkpoint(name)
        if not self.overwrite or not os.path.lexists(self.out):
            finished = self._finished(student, teacher)
            if finished is not None:
                return finished
        check_out(self.out, getattr(student.source, "folder", None), self.overwrite)
        work = checkpoints.WorkFolder(self.out) if run.main else None
        try:
            done = self._train(student, teacher, work, progress, on_event)
        except BaseException:
            if work is not None:
                work.close(remove=not work.steps())  # nothing to resume from
            raise
        run.wait()
        if work is not None:
            work.close(remove=True)
        return done

    def _finished(self, student: Opened, teacher: Opened | None) -> Uptraining | None:
        """The result of this very command, when an earlier run was killed after its last step or has ended."""
        if self.resume == "never" or not self.run.main or self.run.world > 1:
            return None
        table = finish_commit(self.out, self._fingerprint(student, teacher))
        if table is None:
            return None
        facts = table["uptraining"]
        return Uptraining(self.out, facts["steps"], facts["tokens"], facts["seconds"], facts["last"], facts)

    def _fingerprint(self, student: Opened, teacher: Opened | None) -> dict[str, Any]:
        """As the run's identity, but known before the data is read."""
        return run_identity(self.options, student, teacher, str(data_identity(self.options.data)))

    # ---- the stages

    def _train(
        self,
        student: Opened,
        teacher: Opened | None,
        work: checkpoints.WorkFolder | None,
        progress: Progress | None,
        on_event: Listener | None,
    ) -> Uptraining:
        options, run = self.options, self.run
        tokenizer = tokenizer_of(student, "--data")
        if teacher is not None:
            same_tokens(tokenizer, tokenizer_of(teacher, "--teacher", tokenizer), (student.name, teacher.name))
        store = open_tokens(checkpoints.work_path(self.out) / "tokens", student, tokenizer, options, run, progress)
        held_out = [held_out_windows(name, student, tokenizer, options) for name in options.eval_data]
        found, broken = self._earlier(work, run_identity(options, student, teacher, store.facts.sha256))
        dtype = arithmetic(options.dtype, run.device)
        model, mentor, attention = self._load(student, teacher, dtype)
        lanes = lanes_off(model, student.name)
        names = choose(model, options.train)
        adapters = lora.add(model, names, options) if options.lora_rank else None
        # Before anything is trained: what could not be written in the end.
        changes = adapters.bases() if adapters else trained_tensors(model)
        plan_output(model, student.source, sketched(changes))
        shared = share_frozen(model, mentor) if mentor is not None and not run.sharded else 0
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        facts = start_facts(options, run, student, teacher, store, attention, dtype, trained)
        log_path = None if work is None else work.path / LOG_NAME
        trackers = open_trackers(options.tracker if run.main else (), self.out, facts["options"])
        log = RunLog(log_path, trackers, on_event)
        try:
            if found is None:
                log.write("start", **facts, shared_bytes=shared)
                if run.main:
                    warn = self._warner(log, on_event)
                    warn_if_unbalanced(student, teacher, warn)
                    beyond = check_positions(model, options.seq_length, student.name, self._length())
                    if beyond is not None:
                        warn(beyond)
                    each = store.facts.tokens // max(store.facts.documents, 1)
                    if options.repeats and options.packing == "isolated" and each < options.seq_length:
                        warn(
                            f"the data's documents have {each:,} tokens on average, so --repeats {options.repeats:g} "
                            "repeats from no further back; --packing joined does over the whole row"
                        )
                    if facts["epochs"] > _MOST_EPOCHS:
                        warn(
                            f"the data has {store.facts.tokens:,} tokens, so each is seen {facts['epochs']:.3g} times; "
                            "give more data or fewer --tokens"
                        )
                if options.joint_layers:
                    fit_windows(model, mentor, store, options, run, log, progress)
            module = StudentWithLoss(model, mentor, options.objective())
            # While the models are whole and not compiled: every process computes the same, and no shape is compiled
            # for it. A resumed run, whose student has been trained, takes the rate of its first start.
            rate = Rate(**found.state["rate"]) if found is not None else rate_at_start(module, store, options, run)
            facts |= asdict(rate)
            if found is None and rate.kl_at_start is not None:
                line = f"learning rate {rate.learning_rate:g}, as the student starts at KL {rate.kl_at_start:.4g}"
                log.write("note", note=f"{line} from its teacher; --lr sets another", **asdict(rate))
            self._prepare(module, model, mentor, dtype)
            weights = Weights({name: p for name, p in model.named_parameters() if p.requires_grad})
            optimizer = Optimizer(weights, options.model_copy(update={"learning_rate": rate.learning_rate}))
            loop = Loop(module, weights, optimizer, store, options, rate, run, log, work, held_out, progress)
            if found is not None:
                self._restore(found, loop, log)
            for line in broken:
                log.write("note", note=f"not gone on from {line}")
            loop.train(0 if found is None else found.step)
            facts = end_facts(facts, options, run, loop.elapsed(), loop.last)
            log.write("end", **{key: facts[key] for key in ("steps", "tokens", "seconds", "last", "peak_memory_bytes")})
            log.position()
        finally:
            log.close()
        write_output(
            self.out,
            student,
            model,
            lanes.stored(adapters.changed() if adapters else changed_tensors(model, weights.tensors)),
            main=run.main,
            fingerprint=self._fingerprint(student, teacher),
            uptraining=facts,
            command=self.command or "rehead.recipes.uptrain(...)",
            log=log_path,
            overwrite=self.overwrite,
            progress=progress,
        )
        return Uptraining(self.out, options.steps, facts["tokens"], facts["seconds"], loop.last, facts)

    def _load(self, student: Opened, teacher: Opened | None, dtype: torch.dtype) -> tuple[Any, Any, str]:
        """Both models on the device, and the student's attention implementation."""
        options, device = self.options, self.run.device
        model = load(student, dtype, device)
        attention = set_attention(model, options.attention, student.name, options.seq_length)
        if teacher is None:
            mentor = None
        else:
            mentor = load(teacher, dtype, device).requires_grad_(False)
            set_attention(mentor, options.attention, teacher.name, options.seq_length)
        for one, opened in ((model, student), (mentor, teacher)):
            if one is None or opened is None:
                continue
            check_positions(one, options.seq_length, opened.name, self._length())
            if options.packing == "isolated":
                # A teacher that saw the other documents would teach what the student cannot know.
                prove_isolation(one, opened.name)
        return model, mentor, attention

    def _length(self) -> str:
        return f"--seq-length {self.options.seq_length}"

    def _warner(self, log: RunLog, on_event: Listener | None) -> Callable[[str], None]:
        """Warnings go to the log; and to Python's logging where nobody listens to ours."""

        def warn(line: str) -> None:
            log.write("warning", note=line)
            if on_event is None:
                logger.warning(line)

        return warn

    def _earlier(
        self, work: checkpoints.WorkFolder | None, identity: dict[str, Any]
    ) -> tuple[checkpoints.Checkpoint | None, list[str]]:
        """The checkpoint to resume from, the same in every process; and what is wrong with newer ones."""
        step, folder = -1, checkpoints.work_path(self.out)
        broken: list[str] = []
        if work is not None:
            found, broken = (None, broken) if self.resume == "never" else work.newest()
            if found is None:
                work.clear()
            else:
                require_same(work.noted() or {}, identity, self.out)
                for newer in work.steps():
                    if newer > found.step:
                        work.drop(newer)  # its hashes do not hold
                step = found.step
            work.begin(identity)
            folder = work.path
        step = self.run.agreed(step)
        if step < 0:
            return None, broken
        place = folder / f"step-{step:08d}"
        return checkpoints.Checkpoint(place, step, checkpoints.read_state(place)), broken

    def _prepare(self, module: StudentWithLoss, model: Any, mentor: Any, dtype: torch.dtype) -> None:
        """Checkpointed activations, compiled layers and shards, where they were asked for."""
        options, run = self.options, self.run
        if options.gradient_checkpointing:
            checkpoint_activations(model)
        if options.compile:
            for one in (model, mentor):
                for layer in decoder_layers(one) if one is not None else ():
                    layer.compile()
        if run.sharded:
            shard(module, model, mentor, dtype, run)

    def _restore(self, found: checkpoints.Checkpoint, loop: Loop, log: RunLog) -> None:
        checkpoints.restore(found, loop.weights.tensors, loop.optimizer.state())
        loop.optimizer.set_step(found.step)
        loop.weights.publish()
        loop.seconds, loop.last = float(found.state["seconds"]), dict(found.state["last"])
        log.truncate(int(found.state["log_position"]))
        log.write("resume", step=found.step, processes=self.run.world, device=self.run.device.type)


def check_resume(resume: str) -> None:
    """Raise UsageError for an unknown ``--resume``."""
    if resume not in RESUME:
        raise UsageError(f"--resume {resume}: choose auto or never")


def arithmetic(name: str, device: torch.device) -> torch.dtype:
    """The dtype of ``--dtype``; ``auto`` is bfloat16 on a GPU that has it."""
    if name == "auto":
        half = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if half else torch.float32
    return torch.bfloat16 if name == "bfloat16" else torch.float32
