"""Quality against cache: a small model with ever less of it, by method; the record, picture and table in the docs.

python -m rehead.benchmarks.quality [--model FOLDER] [--record FILE] [--picture FILE]

Nothing is trained. With ``--draw`` the picture is made from the record alone.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rehead.benchmarks.engines.table import put
from rehead.benchmarks.machine import machine

ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "docs" / "assets"

#: What each line of the picture stands for: options of ``rehead convert``.
LINES: dict[str, dict[str, Any]] = {
    "averaged heads (mean)": {"method": "mean"},
    "best shared heads (svd)": {"method": "svd"},
    "svd, refit and fit": {"method": "svd", "refit": True, "fit": 20},
    "latent, refit and fit": {"latent": True, "refit": True, "fit": 20},
}
#: Text that the layers are calibrated on.
TEXT: dict[str, Any] = {
    "calibration": ["built-in:speeches#lines"],
    "calibration_tokens": 8192,
    "calibration_length": 256,
}
#: The same for each model that is measured.
MEASURED: dict[str, Any] = {"tokens": 8192, "window": 256, "conventions": ["disjoint"]}
HEADS = (4, 2, 1)
#: Size of a latent and of its rotated key: the caches of four, two and one of the embedded model's eight KV heads.
LATENTS = ((224, 32), (96, 32), (48, 16))


def measure(model: str) -> dict[str, Any]:
    """Convert a model to less and less cache and compare each result with it, on text that was kept aside."""
    from rehead.convert import convert
    from rehead.convert.inspection import inspect
    from rehead.recipes import evaluate

    rows = []
    for line, options in LINES.items():
        for heads, latent in zip(HEADS, LATENTS):
            size = {"num_key_value_heads": heads}
            if "latent" in options:
                size = {"latent": latent[0], "rope_dims": latent[1]}
            text = {} if options.get("method") == "mean" else TEXT
            with tempfile.TemporaryDirectory() as folder:
                done = convert(model, Path(folder) / "out", **{**options, **size, **text})
                report = evaluate(str(Path(folder) / "out"), baseline=model, data=["built-in:heldout"], **MEASURED)
            divergence = report.divergence[0]
            rows.append(
                {
                    "line": line,
                    "bytes_per_token": done.plan.as_json()["kv_bytes_per_token"]["after"],
                    "kl": round(divergence.mean, 4),
                    "top1": round(divergence.top1_agreement, 4),
                    "perplexity_ratio": next(round(row.ratio.value, 4) for row in report.perplexity if row.ratio),
                    "seconds": round(done.seconds, 1),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return {"model": "embedded", "original": inspect(model)["kv_bytes_per_token"], "machine": machine(), "rows": rows}


def table(record: dict[str, Any]) -> str:
    """The record as a Markdown table: for each way and size of cache, KL, top-1 agreement and perplexity."""
    lines = ["| | cache | KL, nats | top-1 agreement | perplexity |", "| --- | --- | --- | --- | --- |"]
    for row in record["rows"]:
        share = f"{100 * row['bytes_per_token'] / record['original']:g}%"
        kind = f"{row['kl']:.3g} | {row['top1']:.1%} | x{row['perplexity_ratio']:.3g}"
        lines.append(f"| {row['line']} | {share} | {kind} |")
    return "\n".join(lines)


@contextmanager
def picture(out: Path, sizes: str) -> Iterator[Any]:
    """Axes for KL over size, to draw lines on; saved afterwards, to be read on a light and on a dark page.

    Args:
        out: the SVG file.
        sizes: what the horizontal axis says.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    grey = "#808890"
    plt.rcParams.update(
        {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 11, "svg.hashsalt": "rehead"}
    )
    figure, axes = plt.subplots(figsize=(7.2, 3.8))
    axes.set_yscale("log")
    yield axes
    axes.set_xlabel(sizes, color=grey)
    axes.set_ylabel("distance from the original (KL, nats)", color=grey)
    axes.tick_params(colors=grey, which="both")
    axes.grid(color=grey, alpha=0.25)
    for side in axes.spines.values():
        side.set_color(grey)
    axes.legend(frameon=False, labelcolor=grey, ncol=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.tight_layout()
    figure.savefig(out, transparent=True, metadata={"Date": None})


def draw(record: dict[str, Any], out: Path) -> None:
    """The record as a picture: a line for each method."""
    colours = ("#d1495b", "#e09f3e", "#2a9d8f", "#5b7fde")
    with picture(out, "size of the KV cache, as a share of the original's") as axes:
        for colour, line in zip(colours, LINES):
            points = sorted(
                (100 * row["bytes_per_token"] / record["original"], row["kl"])
                for row in record["rows"]
                if row["line"] == line
            )
            axes.plot(*zip(*points), marker="o", color=colour, linewidth=2, label=line)
        axes.set_xscale("log")
        axes.set_xticks([12.5, 25, 50], ["12.5%", "25%", "50%"])
        axes.set_yticks([0.1, 0.2, 0.5, 1, 2, 5], ["0.1", "0.2", "0.5", "1", "2", "5"])
        axes.set_ylim(0.09, 7)
        axes.minorticks_off()


def main() -> None:
    """Measure, record and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint in place of the model that ships with Rehead")
    parser.add_argument("--record", type=Path, default=ASSETS / "quality.json")
    parser.add_argument("--picture", type=Path, default=ASSETS / "quality.svg")
    parser.add_argument("--draw", action="store_true", help="draw from the record alone")
    options = parser.parse_args()
    if not options.draw:
        from rehead.checkpoints.opening import embedded_model

        options.record.parent.mkdir(parents=True, exist_ok=True)
        record = measure(options.model or str(embedded_model()))
        options.record.write_text(json.dumps(record, indent=1) + "\n")
    record = json.loads(options.record.read_text())
    draw(record, options.picture)
    if options.record == ASSETS / "quality.json":
        put(table(record), ROOT / "docs" / "choosing.md", "quality")


if __name__ == "__main__":
    main()
