"""Writing an evaluation: ``evaluation.json``, which any tool can read, and the report, which a person can."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from rehead.checkpoints.markdown import without_folders
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
    shown = without_paths(found)
    paths = write_report(folder, [(shown.model.name, shown)])
    return str(paths.html)


def push(found: Evaluation, repo_id: str) -> str:
    """Add the document and the report to a Hub repository, in its folder ``evaluation``; no local path goes with them.

    Returns:
        The commit's URL.

    Raises:
        ReheadError: as :func:`rehead.checkpoints.push.push_files`.
    """
    from rehead.checkpoints.push import push_files

    with tempfile.TemporaryDirectory() as folder:
        write(without_paths(found), folder)
        files = {f"evaluation/{name}": Path(folder) / name for name in REPORTS}
        said = f"Evaluate {Path(found.model.name).name} with Rehead"
        return push_files(files, repo_id, mine=f"evaluation/{FILE}", message=said)


def without_paths(found: Evaluation) -> Evaluation:
    """The same evaluation with the last name of each local path in the path's place; two that end alike stay apart."""
    facts = found.facts().values()
    paths = [*(one.name for one in facts), *(text.name for text in found.conditions.data)]
    names: dict[str, str] = {}
    for path in dict.fromkeys(paths):
        local = path if os.path.exists(path) or os.path.isabs(path) else ""
        name = Path(os.path.abspath(local)).name if local else ""
        if name and name in names.values():
            name = f"{Path(os.path.abspath(local)).parent.name}/{name}"
        if name:
            names[path] = name

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list):
            return [plain(item) for item in value]
        if not isinstance(value, str):
            return value
        if value in names:
            return names[value]
        for path, name in names.items():
            value = value.replace(path, name) if os.path.isabs(path) else value
        return without_folders(value) if os.path.isabs(value) else value

    table = found.as_json()
    # What models wrote, and the versions, hold no paths of this machine.
    kept = {key: table.pop(key) for key in ("samples", "kv_cache", "speed")}
    samples = [{**sample, "data": names.get(sample["data"], sample["data"])} for sample in kept.pop("samples")]
    return Evaluation.model_validate({**plain(table), **kept, "samples": samples})


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
