"""How much a short uptraining wins back, by start, schedule, loss and what trains; and the control beside it.

python -m rehead.benchmarks.recovery MODEL --data TRAIN... --held-out TEXT --work DIR [--studies starts,8M,...]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rehead.errors import ReheadError, check_names

#: Conversions to start from: name -> options of ``rehead convert``.
STARTS: dict[str, dict[str, Any]] = {
    "mean": {"method": "mean"},
    "svd": {"method": "svd"},
    "svd+refit": {"method": "svd", "refit": True},
    "svd+refit+fit": {"method": "svd", "refit": True, "fit": 300},
}
BEST = "svd+refit+fit"
#: A start that was recovered is near; large steps take it away from there before they lead back.
MILLION = {"tokens": 1_000_000, "learning_rate": 3e-4}
EIGHT = {"tokens": 8_000_000, "learning_rate": 5e-4}
#: What a bad start recovers with.
FAST = {"learning_rate": 1e-3}


@dataclass(frozen=True)
class Cell:
    """One uptraining.

    Attributes:
        name: how the table calls it.
        start: a key of :data:`STARTS`, or ``original`` for the unconverted model (the control).
        options: of ``rehead uptrain``, on top of the common ones.
    """

    name: str
    start: str
    options: Mapping[str, Any] = field(default_factory=dict)


def _at_a_million(changes: Mapping[str, Mapping[str, Any]]) -> list[Cell]:
    return [Cell(f"{name}, 1M", BEST, {**MILLION, **options}) for name, options in changes.items()]


#: What can be asked for with ``--studies``, in the order of the table.
STUDIES: dict[str, list[Cell]] = {
    "8M": [Cell("svd+refit+fit, 8M", BEST, EIGHT)],
    "mean": [
        Cell("mean, 8M", "mean", {**EIGHT, **FAST}),
        Cell("mean, 10M", "mean", {**FAST, "tokens": 10_000_000}),
    ],
    "control": [
        Cell("control (original, ce), 1M", "original", {**MILLION, "loss": "ce"}),
        Cell("control (original, ce), 8M", "original", {**EIGHT, "loss": "ce", "learning_rate": 3e-4}),
    ],
    "starts": [
        Cell(f"{start}, 1M", start, {**MILLION, **(FAST if start in ("mean", "svd") else {})}) for start in STARTS
    ],
    "rates": _at_a_million({f"lr {rate:g}": {"learning_rate": rate} for rate in (5e-5, 1e-4, 2e-4, 6e-4)}),
    "warmups": _at_a_million({f"warm-up {share:g}": {"warmup": share} for share in (0.2, 0.5)}),
    "batches": _at_a_million({f"{size // 1024}k tokens a step": {"batch_tokens": size} for size in (8192, 16384)}),
    "trains": _at_a_million(
        {
            "attention only": {"train": "attention"},
            "attention at 3x the rate": {"learning_rate": 1e-4, "learning_rates": {r"self_attn\.": 3.0}},
            "all but embeddings": {"train": "attention,mlp,norms"},
        }
    ),
    "losses": _at_a_million(
        {loss: {"loss": loss} for loss in ("kd+0.1*ce", "js", "ce")}
    ),
    "joint": _at_a_million({"windows of 3 layers first": {"joint_layers": 3}}),
}  # fmt: skip


def convert_start(model: str, start: str, folder: Path, kv_heads: int, calibration: Sequence[str]) -> float:
    """Convert to ``kv_heads`` KV heads, unless ``folder`` is there already; gives the seconds it took."""
    from rehead.convert import convert

    if folder.exists():
        return 0.0
    began = time.monotonic()
    # The rows that are trained and evaluated on have 512 tokens.
    options = {"calibration_length": 512, **STARTS[start]}
    texts = calibration if options["method"] == "svd" or options.get("refit") else ()
    convert(model, folder, num_key_value_heads=kv_heads, calibration=texts, **options)
    return time.monotonic() - began


def run_cell(
    cell: Cell, model: str, student: Path | str, out: Path, common: Mapping[str, Any]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Uptrain once and read what its log says.

    Returns:
        the figures of the table's row, and every evaluation on the way.
    """
    from rehead.recipes import uptrain

    began = time.monotonic()
    # The control has a teacher, too: it is not trained by it, but its distance to the original is then in the log.
    uptrain(str(student), out, **{**common, "teacher": model, **cell.options})
    events = [json.loads(line) for line in (out / "training-log.jsonl").read_text().splitlines()]
    found = [event for event in events if event["event"] == "evaluation"]
    steps = [event for event in events if event["event"] == "step"]
    speed = sorted(event["tokens_per_second"] for event in steps[len(steps) // 4 :])
    first, last = found[0], found[-1]
    return {
        "name": cell.name,
        "start": cell.start,
        "options": dict(cell.options),
        "kl_before": first.get("kl") if first["tokens"] == 0 else None,
        "kl": last.get("kl"),
        "top1_agreement": last.get("top1_agreement"),
        "perplexity": last.get("perplexity"),
        "tokens": last["tokens"],
        "tokens_per_second": speed[len(speed) // 2] if speed else None,
        "peak_memory_bytes": max((event.get("peak_memory_bytes") or 0 for event in steps), default=0),
        "seconds": round(time.monotonic() - began, 1),
    }, found


def chosen(studies: Sequence[str]) -> list[Cell]:
    """The cells of the studies that were asked for.

    Raises:
        UsageError: an unknown study.
    """
    check_names("study", studies, STUDIES)
    return [cell for name in studies for cell in STUDIES[name]]


def row_line(row: Mapping[str, Any]) -> str:
    """A row of the printed table."""

    def number(value: Any, form: str) -> str:
        return "-" if value is None else format(value, form)

    return (
        f"{row['name']:<34}{number(row['kl_before'], '.3f'):>9}{number(row['kl'], '.4f'):>9}"
        f"{number(row['top1_agreement'], '.3f'):>7}{number(row['perplexity'], '.2f'):>10}"
        f"{number(row['tokens_per_second'], ',.0f'):>12}{row['peak_memory_bytes'] / 2**30:>7.1f}{row['seconds']:>8.1f}"
    )  # fmt: skip


def run(
    model: str,
    data: Sequence[str],
    held_out: Sequence[str],
    work: Path,
    cells: Sequence[Cell],
    *,
    kv_heads: int = 1,
    calibration: Sequence[str] = (),
    common: Mapping[str, Any] | None = None,
    budget: float = float("inf"),
) -> dict[str, Any]:
    """Run cells one after another and print a line for each; a cell that fails is reported and does not stop the rest.

    Args:
        model: the original, a folder or Hub id.
        data: what is trained on.
        held_out: what KL, agreement and perplexity are measured on.
        work: folder for conversions and uptrainings.
        cells: what to run.
        kv_heads: after the conversion.
        calibration: of the conversions; the training data where empty.
        common: options of every uptraining.
        budget: seconds after which no further cell is begun.
    """
    from rehead.benchmarks.machine import headline, machine

    work.mkdir(parents=True, exist_ok=True)
    facts = machine()
    print(headline(facts))
    print(f"{'':34}{'KL from':>9}{'KL':>9}{'top-1':>7}{'ppl':>10}{'tokens/s':>12}{'GiB':>7}{'s':>8}", flush=True)
    results: dict[str, Any] = {"machine": facts, "conversions": {}, "rows": [], "curves": {}}
    common = {"data": list(data), "eval_data": list(held_out), "token_cache": str(work / "tokens"), **(common or {})}
    began = time.monotonic()
    for cell in cells:
        if time.monotonic() - began > budget:
            print(f"{cell.name:<34} not begun: {budget:.0f} s are over", flush=True)
            continue
        student: Path | str = model
        try:
            if cell.start != "original":
                student = work / f"start-{cell.start}"
                seconds = convert_start(model, cell.start, student, kv_heads, calibration or data)
                if seconds:
                    results["conversions"][cell.start] = seconds
                    print(f"{'converted: ' + cell.start:<34}{'':54}{seconds:>8.1f}", flush=True)
            out = work / f"cell-{len(results['rows'])}"
            row, curve = run_cell(cell, model, student, out, common)
        except ReheadError as error:
            print(f"{cell.name:<34} failed: {error}", flush=True)
            continue
        except Exception:
            traceback.print_exc()
            print(f"{cell.name:<34} failed", flush=True)
            continue
        results["rows"].append(row)
        results["curves"][cell.name] = curve
        print(row_line(row), flush=True)
        (work / "recovery.json").write_text(json.dumps(results, indent=1) + "\n")
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m rehead.benchmarks.recovery``."""
    parser = argparse.ArgumentParser(prog="python -m rehead.benchmarks.recovery", description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--held-out", nargs="+", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--studies", default=",".join(STUDIES), help=f"of {', '.join(STUDIES)}")
    parser.add_argument("--kv-heads", type=int, default=1)
    parser.add_argument("--calibration", nargs="*", default=())
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no cell is begun")
    parser.add_argument("--common", type=json.loads, default={}, help="JSON options of every uptraining")
    arguments = parser.parse_args(argv)
    try:
        run(
            arguments.model, arguments.data, arguments.held_out, arguments.work,
            chosen(arguments.studies.split(",")), kv_heads=arguments.kv_heads, calibration=arguments.calibration,
            common=arguments.common, budget=arguments.budget,
        )  # fmt: skip
    except ReheadError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
