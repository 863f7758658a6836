"""Tasks of EleutherAI's lm-evaluation-harness (Gao et al. 2021) by name, run on the models that are already loaded.

The harness is an extra (``pip install "rehead[tasks]"``). Its own tasks fetch their data sets from the Hub; a folder of
task files of one's own, with data files beside them, needs no network::

    rehead evaluate MODEL --data TEXT --tasks my_questions --tasks-dir ./tasks
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rehead.data.beginning import text_start
from rehead.errors import UnsupportedError, UsageError, first_line, unknown_name
from rehead.recipes import evaluation_schema as schema

if TYPE_CHECKING:
    from rehead.recipes.evaluation.models import JudgedModel

#: Harness metrics that are notes on the run rather than scores.
_NOT_SCORES = ("alias", "name", "sample_len", "sample_count", "samples")
#: What the harness notes of the machine beside its figures.
_RUN_NOTES = ("get_git_commit_hash", "add_env_info")


def require_harness() -> None:
    """Raise UsageError where the extra is not installed, before anything else takes its time."""
    from importlib.util import find_spec

    if find_spec("lm_eval") is None:
        raise UsageError('--tasks: needs the lm-evaluation-harness; run pip install "rehead[tasks]"')


def task_manager(tasks: Sequence[str], folder: str | None = None) -> Any:
    """The harness's index of tasks.

    Args:
        tasks: names of tasks, groups or tags.
        folder: task files of one's own; where they hold all that is named, the harness's own are not even listed.

    Raises:
        UsageError: no such folder, or a name that no task has (the nearest is suggested).
    """
    from lm_eval.tasks import TaskManager

    if folder is not None and not Path(folder).is_dir():
        raise UsageError(f"--tasks-dir {folder}: no such folder; give one with the harness's task files (.yaml)")
    manager = None
    with quiet_harness():
        if folder is not None:
            manager = TaskManager(include_path=folder, include_defaults=False)
        if manager is None or not set(tasks) <= set(manager.all_tasks):
            manager = TaskManager(include_path=folder)
    for task in tasks:
        if task not in manager.all_tasks:
            raise UsageError(f"--tasks: {_unknown(task, manager.all_tasks)}")
    return manager


def task_scores(
    loaded: JudgedModel,
    tasks: Sequence[str],
    manager: Any,
    *,
    shots: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    progress: Callable[[float, float], None] | None = None,
) -> list[schema.TaskScore]:
    """Every metric of every task for one model.

    Args:
        loaded: the model; its tokenizer is used.
        tasks: names.
        manager: from :func:`task_manager`.
        shots: examples before each question; each task's own number when None.
        limit: samples of each task; all when None.
        seed: of examples and samples that are drawn.
        progress: called with (tasks done, tasks).

    Raises:
        UsageError: the model has no tokenizer.
        UnsupportedError: a task cannot be run, say because its data cannot be fetched.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    if loaded.tokenizer is None:
        raise UsageError(f"{loaded.name}: has no tokenizer, and --tasks needs one; put its files beside the weights")
    rows: list[schema.TaskScore] = []
    with quiet_harness():
        begins = bool(len(text_start(loaded.tokenizer)))
        model = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=8, add_bos_token=begins or None)
        for done, task in enumerate(tasks):
            if progress is not None:
                progress(done, len(tasks))
            try:
                found = simple_evaluate(
                    model=model,
                    tasks=[task],
                    num_fewshot=shots,
                    limit=limit,
                    bootstrap_iters=1000,
                    log_samples=False,
                    task_manager=manager,
                    random_seed=seed,
                    numpy_random_seed=seed,
                    torch_random_seed=seed,
                    fewshot_random_seed=seed,
                )
            except Exception as error:
                raise UnsupportedError(
                    f"--tasks {task}: cannot be run ({first_line(error)}); offline, give task files with --tasks-dir"
                ) from None
            rows += _rows(loaded.who, dict(found or {}))
    return rows


def _rows(who: schema.Who, found: dict[str, Any]) -> list[schema.TaskScore]:
    """The harness's ``{task: {"metric,filter": value}}`` as rows."""
    rows = []
    for task, metrics in found.get("results", {}).items():
        better = found.get("higher_is_better", {}).get(task, {})
        for key, value in metrics.items():
            name, _, kind = key.partition(",")
            if name in _NOT_SCORES or name.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = metrics.get(f"{name}_stderr,{kind}")
            rows.append(
                schema.TaskScore(
                    who=who,
                    task=task,
                    metric=name if kind in ("", "none") else f"{name} ({kind})",
                    value=float(value),
                    stderr=float(error) if isinstance(error, (int, float)) else None,
                    higher_is_better=better.get(name),
                    shots=found.get("n-shot", {}).get(task),
                    samples=found.get("n-samples", {}).get(task, {}).get("effective"),
                )
            )
    return rows


def _unknown(task: str, known: Sequence[str]) -> str:
    """One line for an unknown task; the harness has thousands, so they are not listed."""
    line = unknown_name("task", task, known)
    return line if len(line) < 300 else f"unknown task {task!r}; `lm-eval ls tasks` lists the harness's"


@contextmanager
def quiet_harness() -> Iterator[None]:
    """Silence the harness's log and bars, which it draws whatever it is told; errors still raise.

    Nor does it look for a git commit in the working folder, where git complains unless that is a repository, or spend
    seconds on listing what is installed: neither is used.
    """
    from lm_eval import evaluator
    from tqdm import tqdm

    logger = logging.getLogger("lm_eval")
    level, begin = logger.level, tqdm.__init__
    notes = {name: getattr(evaluator, name) for name in _RUN_NOTES if hasattr(evaluator, name)}

    def silent(self: Any, *args: Any, **options: Any) -> None:
        begin(self, *args, **{**options, "disable": True})

    logger.setLevel(logging.CRITICAL)
    tqdm.__init__ = silent
    for name in notes:
        setattr(evaluator, name, lambda *args: None)
    try:
        yield
    finally:
        for name, function in notes.items():
            setattr(evaluator, name, function)
        tqdm.__init__ = begin
        logger.setLevel(level)
