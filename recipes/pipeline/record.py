"""What a finished stage left behind, and whether that still holds: the reason why a stage is skipped or done again."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rehead.checkpoints.files import write_file
from rehead.checkpoints.opening import open_source, split_revision
from rehead.checkpoints.smallfiles import CARD_NAME, MANIFEST_NAME
from rehead.checkpoints.stream import hash_file
from rehead.recipes.pipeline.graph import Place, Stage
from rehead.recipes.training.log import LOG_NAME
from rehead.version import __version__

FOLDER = "stages"
FORMAT = 1
#: Files that say how a checkpoint was made or how it went; two runs of one stage may differ in them.
_TELLING = frozenset({CARD_NAME, MANIFEST_NAME, LOG_NAME})


@dataclass(frozen=True)
class State:
    """Whether a stage's output holds.

    Attributes:
        done: it need not be run.
        reason: why it must be; empty when done.
        content: hash of what later stages read; empty unless done.
    """

    done: bool
    reason: str = ""
    content: str = ""


def record_path(out: Path, name: str) -> Path:
    """Where a stage's record lies."""
    return out / FOLDER / f"{name}.json"


def outside(stage: Stage) -> dict[str, Any]:
    """What tells the models and texts that a stage reads from outside the recipe from others of the same names.

    Raises:
        UsageError: an invalid model or text.
        UnsupportedError: a model on the Hub cannot be reached.
    """
    from rehead.data.sources import identity

    identities: dict[str, Any] = {}
    for role, place in stage.models.items():
        if place.model is not None:
            with open_source(*name_of(place)) as opened:
                identities[role] = opened.fingerprint()
    for option, texts in stage.data.items():
        if texts and texts != ["random"]:
            identities[option] = identity(texts, f"--{option.replace('_', '-')}")
    return json.loads(json.dumps(identities))


def name_of(place: Place) -> tuple[str, str | None]:
    """A model's name and revision, which may stand in the name as ``id@revision``."""
    assert place.model is not None
    return split_revision(place.model) if place.revision is None else (place.model, place.revision)


def state(stage: Stage, out: Path, contents: Mapping[str, str], around: Mapping[str, Any]) -> State:
    """Whether a stage's output is there, made of the same things, and undamaged.

    Args:
        stage: which.
        out: the recipe's folder.
        contents: hash of what each stage that it reads from holds now, by role.
        around: from :func:`outside`.
    """
    path = record_path(out, stage.name)
    try:
        table = json.loads(path.read_bytes())
        files, made_of = table["files"], table["inputs"]
        known = table["format"] == FORMAT and table["key"] == stage.key
    except FileNotFoundError:
        return State(False, "not run yet")
    except (OSError, ValueError, KeyError, TypeError):
        return State(False, "its record cannot be read")
    if not known:
        return State(False, "its record is of something else")
    if table.get("version") != __version__:
        return State(False, f"made by Rehead {table.get('version')}, this is {__version__}")
    for role, content in contents.items():
        if made_of.get(role) != content:
            return State(False, f"its {role} has changed")
    for role, value in around.items():
        if made_of.get(role) != value:
            return State(False, f"its {role} has changed")
    folder = out / stage.name
    for name, entry in files.items():
        try:
            if hash_file(folder / name) != (entry["size"], entry["sha256"]):
                return State(False, f"{name} has changed")
        except FileNotFoundError:
            return State(False, f"{name} is missing")
        except (OSError, KeyError, TypeError):
            return State(False, f"{name} cannot be read")
    return State(True, content=content_of(files))


def content_of(files: Mapping[str, Any]) -> str:
    """One hash over the files that later stages read."""
    digest = hashlib.sha256()
    for name, entry in sorted(files.items()):
        if name not in _TELLING:
            digest.update(f"{name}\0{entry['sha256']}\n".encode())
    return digest.hexdigest()


def write_record(
    stage: Stage, out: Path, contents: Mapping[str, str], around: Mapping[str, Any], seconds: float
) -> str:
    """Record a stage's output; returns the hash of what later stages read.

    Raises:
        ResourceError: the disk is full or fails.
    """
    folder = out / stage.name
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        size, sha = hash_file(path)
        files[path.relative_to(folder).as_posix()] = {"size": size, "sha256": sha}
    table = {
        "format": FORMAT,
        "kind": stage.kind,
        "title": stage.title,
        "key": stage.key,
        "version": __version__,
        "seconds": round(seconds, 2),
        "options": stage.options,
        "models": {role: place.stage or place.model for role, place in stage.models.items()},
        "data": stage.data,
        "inputs": {**contents, **around},
        "files": files,
    }
    write_file(record_path(out, stage.name), json.dumps(table, indent=1, ensure_ascii=False) + "\n")
    return content_of(files)


def drop(stage: Stage, out: Path) -> None:
    """Remove a recorded output that no longer holds, so that the stage starts afresh.

    Only what was recorded is removed: a folder without a record is an interrupted run's, which resumes from it, or
    somebody else's.
    """
    path = record_path(out, stage.name)
    if path.exists():
        shutil.rmtree(out / stage.name, ignore_errors=True)
        path.unlink()
