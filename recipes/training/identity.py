"""What is recorded of a run, what decides its result, and what differs between two."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from rehead.checkpoints.smallfiles import MANIFEST_NAME
from rehead.data.store import TokenStore
from rehead.errors import UsageError
from rehead.options import flag_of
from rehead.recipes.training.loop import peak_memory
from rehead.recipes.training.models import Opened
from rehead.recipes.training.options import UptrainOptions
from rehead.recipes.training.processes import Processes
from rehead.version import __version__

#: ``from a.b import c, d``, its names in parentheses or not, and ``import a.b``, wherever they stand.
_IMPORTS = re.compile(r"^[ \t]*(?:from ([\w.]+) import (\([^)]*\)|[^\n]*)|import ([\w.]+))", re.MULTILINE)


def start_facts(
    options: UptrainOptions,
    run: Processes,
    student: Opened,
    teacher: Opened | None,
    store: TokenStore,
    attention: str,
    dtype: torch.dtype,
    trained: int,
) -> dict[str, Any]:
    """What is known before the first step.

    Args:
        options: of the run.
        run: the processes.
        student, teacher: open checkpoints.
        store: the tokens.
        attention: the implementation in use.
        dtype: of the arithmetic.
        trained: how many weights train.
    """
    cuda = run.device.type == "cuda"
    return {
        "student": student.name,
        "teacher": None if teacher is None else teacher.name,
        "options": options.model_dump(mode="json"),
        "steps": options.steps,
        "rows_per_step": options.rows_per_step,
        "batch_tokens": options.rows_per_step * options.seq_length,
        "data_tokens": store.facts.tokens,
        "data_documents": store.facts.documents,
        "data_sha256": store.facts.sha256,
        "epochs": round(options.steps * options.rows_per_step / store.rows(options.seq_length), 4),
        "trained_parameters": trained,
        "attention": attention,
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(run.device) if cuda else run.device.type,
        "processes": run.world,
        "sharded": run.sharded,
        "versions": code_version(),
    }


def end_facts(
    start: Mapping[str, Any], options: UptrainOptions, run: Processes, seconds: float, last: Mapping[str, Any]
) -> dict[str, Any]:
    """The same with what the run came to.

    Args:
        start: of :func:`start_facts`.
        options: of the run.
        run: the processes.
        seconds: of training.
        last: figures of the last step and of the last evaluations.
    """
    return {
        **start,
        "tokens": options.steps * options.rows_per_step * options.seq_length,
        "seconds": round(seconds, 3),
        "peak_memory_bytes": peak_memory(run.device),
        "last": dict(last),
    }


def run_identity(options: UptrainOptions, student: Opened, teacher: Opened | None, data: str) -> dict[str, Any]:
    """Everything that a resumed run must agree in, in parts that a message can name.

    Args:
        options: of the run.
        student, teacher: open checkpoints.
        data: SHA-256 of the tokens.
    """
    return {
        "options": options.identity(),
        "student": checkpoint_identity(student),
        "teacher": None if teacher is None else checkpoint_identity(teacher),
        "data": data,
        "code": code_version(),
    }


def checkpoint_identity(opened: Opened) -> str:
    """What tells a checkpoint from any other: its manifest's hash, or its files' sizes and times."""
    if opened.conversion:
        return hashlib.sha256(opened.source.small_path(MANIFEST_NAME).read_bytes()).hexdigest()
    return opened.source.fingerprint()


@cache
def code_version() -> dict[str, str]:
    """Versions of what computes, with a hash of the text of all of Rehead that training imports."""
    import transformers

    root = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for path in imported_files(Path(__file__).parent.rglob("*.py"), root):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return {
        "rehead": f"{__version__}+{digest.hexdigest()[:12]}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def imported_files(files: Iterable[Path], root: Path) -> list[Path]:
    """Files of this package, with those that they import and those import in turn, late imports too; sorted.

    Args:
        files: to begin with.
        root: the package's folder.
    """
    found: set[Path] = set()
    left = list(files)
    while left:
        path = left.pop()
        if path in found:
            continue
        found.add(path)
        for module, several, alone in _IMPORTS.findall(path.read_text(encoding="utf-8")):
            for name in (alone or module, *(f"{module}.{part}" for part in re.findall(r"\w+", several))):
                package, *parts = name.split(".")
                # The package's own name: a clone's folder may have any.
                if package == __name__.partition(".")[0] and parts:
                    place = root.joinpath(*parts)
                    left += [one for one in (place.with_suffix(".py"), place / "__init__.py") if one.is_file()]
    return sorted(found)


def require_same(noted: Mapping[str, Any], identity: Mapping[str, Any], out: Path) -> None:
    """Refuse to go on with a run that would become another.

    Raises:
        UsageError: names what differs, then and now.
    """
    now = json.loads(json.dumps(identity))
    differ = list(_differences(noted, now))
    if differ:
        more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
        raise UsageError(
            f"{out}: cannot go on with the interrupted run, since {', '.join(differ[:3])}{more} changed; "
            "give the old values back, or start from the beginning with --resume never"
        )


def _differences(then: Any, now: Any, place: tuple[str, ...] = ()) -> Iterator[str]:
    if isinstance(then, dict) and isinstance(now, dict):
        for key in sorted({*then, *now}):
            yield from _differences(then.get(key), now.get(key), (*place, key))
    elif then != now:
        kind = place[0]
        if kind == "options":
            yield f"{flag_of(UptrainOptions, place[1])} ({json.dumps(then)} then, {json.dumps(now)} now)"
        elif kind == "code":
            yield f"the code's version of {place[1]} ({then} then, {now} now)"
        else:
            yield {"data": "the data (other text or tokenizer)"}.get(kind, f"the {kind} checkpoint")
