"""Writing an evaluation: ``evaluation.json``, which any tool can read, and the report, which a person can."""

from __future__ import annotations

import json
import os
from pathlib import Path

from rehead.errors import UsageError, output_expected
from rehead.recipes.evaluation_schema import Evaluation

FILE = "evaluation.json"
#: What is written beside it.
REPORTS = (FILE, "report.html", "report.md", "report.json")


def check_folder(out: str) -> None:
    """Refuse a place for the report before anything is measured.

    Raises:
        UsageError: it is a file, a checkpoint, whose manifest would no longer hold, or a folder with a report that this
            command did not write.
    """
    from rehead.checkpoints.smallfiles import MANIFEST_NAME

    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out {out}: is a file; give a folder")
    if (folder / MANIFEST_NAME).exists() or (folder / "config.json").exists():
        raise UsageError(f"--out {out}: is a checkpoint, and the report is no part of it; give another folder")
    if not _ours(folder):
        taken = next((name for name in REPORTS if os.path.lexists(folder / name)), None)
        if taken is not None:
            raise UsageError(
                f"--out {out}: {taken} there is not of an evaluation, and would be replaced; give another folder"
            )


def _ours(folder: Path) -> bool:
    """Whether an earlier evaluation wrote this folder's reports: it left its document beside them."""
    try:
        table = json.loads((folder / FILE).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(table, dict) and "format" in table and "conditions" in table


def write(found: Evaluation, out: str) -> str:
    """Write the document and the report.

    Args:
        found: the evaluation.
        out: a folder, made where it is missing; an earlier report in it is replaced.

    Returns:
        The path of the report for a person.
    """
    from rehead.checkpoints.files import write_file
    from rehead.recipes.report import write_report

    folder = Path(out)
    for name in REPORTS:
        output_expected(folder / name)
    write_file(folder / FILE, json.dumps(found.as_json(), indent=2, ensure_ascii=False) + "\n")
    paths = write_report(folder, [(Path(found.model.name).name or found.model.name, found)])
    return str(paths.html)


def read(path: str | Path) -> Evaluation:
    """An evaluation from its file, or from the folder that holds it.

    Raises:
        UsageError: there is none, or it is not one.
    """
    from pydantic import ValidationError

    place = Path(path)
    place = place / FILE if place.is_dir() else place
    try:
        return Evaluation.model_validate_json(place.read_bytes())
    except OSError as error:
        raise UsageError(f"{place}: cannot be read ({error.strerror}); run rehead evaluate --out first") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UsageError(
            f"{place}: is no evaluation of this version ({where}: {first['msg']}); evaluate again"
        ) from None
