"""Build cases, ask transformers, ask engines, compare."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rehead.benchmarks.engines import environments, reference
from rehead.benchmarks.engines.building import build
from rehead.benchmarks.engines.cases import CASES
from rehead.models.serving import DIFFERENT, REFUSED, SAME, facts_of

#: A token counts as computed alike if its log-probability (nats) is this close. Float32 gives about 1e-5. llama.cpp's
#: GELU is a table in half precision: 1e-3 in two layers, 7e-3 in Gemma 3's six, and transformers rounded in the same
#: place gives the same. Another activation or rotary base gives 4e-2 and more.
CLOSE = 1e-2


def references(names: Iterable[str], work: Path) -> dict[str, dict[str, Any]]:
    """Build each case and let transformers continue its prompt; read again where it was done before.

    Returns:
        By case: ``model``, ``model_type``, ``facts`` and the fields of :class:`reference.Reference`; or ``error``.
    """
    answers = {}
    for name in names:
        path = work / name / "reference.json"
        if not path.is_file():
            folder = build(name, work)
            config = json.loads((folder / "config.json").read_text())
            prompt = reference.prompt_of(folder, CASES[name].prompt_tokens)
            answer = reference.continue_greedily(folder, prompt).as_json()
            path.write_text(
                json.dumps(
                    {**answer, "model": str(folder), "model_type": config["model_type"], "facts": facts_of(config)}
                )
            )
            print(f"{name}: {config['model_type']}, margin {answer['margin']:.1e}", flush=True)
        answers[name] = json.loads(path.read_text())
    return answers


def ask(name: str, cases: Sequence[str], answers: dict[str, dict[str, Any]], folder: Path, work: Path) -> list[Any]:
    """Run one engine's client on cases; one process for all, which forks for each.

    Args:
        name: of the engine.
        cases: names of cases, all with a reference.
        folder: of the engines' environments.
        work: where jobs, logs and answers are kept.

    Returns:
        A row for each case: ``case`` and the fields of :class:`rehead.models.serving.Run` but its case.
    """
    home = work / "clients" / name
    home.mkdir(parents=True, exist_ok=True)
    jobs, lines = home / "jobs.json", home / "results.jsonl"
    lines.unlink(missing_ok=True)
    cases = [case for case in cases if not CASES[case].only or name in CASES[case].only]
    jobs.write_text(json.dumps([_job(name, case, answers[case], home) for case in cases]))
    client = environments.CLIENTS / environments.engine(name).client
    python = str(environments.python_of(name, folder))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    with (home / "client.log").open("w") as log:
        code = subprocess.run(
            [python, str(client), str(jobs), str(lines)], env=environment, stdout=log, stderr=subprocess.STDOUT
        ).returncode
    outcomes = [json.loads(line) for line in lines.read_text().splitlines()] if lines.is_file() else []
    if len(outcomes) != len(cases):
        print(f"{name}: the client ended with {code}; see {home / 'client.log'}", file=sys.stderr)
    return [{"case": row["case"], **judge(name, row, answers[row["case"]])} for row in outcomes]


def _job(name: str, case: str, answer: dict[str, Any], home: Path) -> dict[str, Any]:
    work = home / case
    work.mkdir(parents=True, exist_ok=True)
    return {
        "case": case,
        "model": answer["model"],
        "prompt": answer["prompt"],
        "new_tokens": len(answer["tokens"]),
        "options": CASES[case].client.get(name, {}),
        "work": str(work),
        "log": str(work / "engine.log"),
    }


def judge(name: str, outcome: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
    """Compare an engine's answer with transformers'.

    Log-probabilities decide beside tokens: a model that is nearly right may write the right words.
    """
    row: dict[str, Any] = {
        "engine": environments.engine(name).title,
        "version": outcome["version"],
        "outcome": REFUSED,
        "tokens": 0,
        "of": len(answer["tokens"]),
        "logprob_difference": None,
        "cache_bytes_per_token": None,
        "notes": [_short(outcome["error"])] if "error" in outcome else outcome["notes"],
    }
    if "error" in outcome:
        return row
    row["tokens"], difference = _alike(outcome, answer)
    row["cache_bytes_per_token"] = outcome.get("cache_bytes_per_token")
    row["logprob_difference"] = None if difference is None else float(f"{difference:.1e}")
    row["outcome"] = SAME if _is_same(outcome, answer) else DIFFERENT
    if row["outcome"] == DIFFERENT:
        parts = [part for part, without in answer.get("without", {}).items() if _is_same(outcome, without)]
        row["notes"] = [*row["notes"], *(f"it leaves out the {part}" for part in parts)]
    return row


def _alike(outcome: dict[str, Any], answer: dict[str, Any]) -> tuple[int, float | None]:
    """(tokens before the first difference; the largest difference of their log-probabilities, None without any)."""
    same = 0
    for engines, expected in zip(outcome["tokens"], answer["tokens"]):
        if engines != expected:
            break
        same += 1
    # Past the first difference the contexts differ.
    differences = [abs(a - b) for a, b in zip(outcome["logprobs"][:same], answer["logprobs"])]
    return same, max(differences, default=None)


def _is_same(outcome: dict[str, Any], answer: dict[str, Any]) -> bool:
    same, difference = _alike(outcome, answer)
    return same == len(answer["tokens"]) and (difference is None or difference <= CLOSE)


def tested(answer: dict[str, Any]) -> list[str]:
    """The parts of attention whose loss would show in an engine's answer, of those that the model has."""
    return [part for part, without in answer.get("without", {}).items() if not _is_same(without, answer)]


def _short(reason: str) -> str:
    """The start of an engine's reason, without the lists of names that some end in."""
    reason = reason.split(": {", 1)[0]
    return reason if len(reason) <= 150 else f"{reason[:150].rsplit(' ', 1)[0]} ..."


def merge(
    results: dict[str, Any], answers: dict[str, dict[str, Any]], rows: Iterable[dict[str, Any]]
) -> dict[str, Any]:
    """Put new rows into recorded results; a row of the same case and engine is replaced.

    What the comparison would show of windows and sinks (``tested``) is put beside every case that has an answer.
    """
    cases = {row["case"]: row for row in results.get("rows", [])}
    for name in cases.keys() & answers.keys():
        cases[name]["tested"] = tested(answers[name])
    for row in rows:
        answer = answers[row["case"]]
        target = cases.setdefault(row["case"], {"case": row["case"], "runs": []})
        target |= {
            "source": CASES[row["case"]].source,
            "model_type": answer["model_type"],
            "facts": answer["facts"],
            "note": CASES[row["case"]].note,
            "transformers_cache_bytes_per_token": answer["cache_bytes_per_token"],
            "tested": tested(answer),
        }
        if CASES[row["case"]].short_text:
            target["short_text"] = True
        run = {key: value for key, value in row.items() if key != "case"}
        target["runs"] = [kept for kept in target["runs"] if kept["engine"] != run["engine"]] + [run]
    titles = [engine.title for engine in environments.ENGINES.values()]
    order = list(CASES)
    rows_sorted = sorted(
        (row for row in cases.values() if row["case"] in order), key=lambda row: order.index(row["case"])
    )
    for row in rows_sorted:
        row["runs"].sort(key=lambda run: titles.index(run["engine"]))
    return {**results, "rows": rows_sorted}
