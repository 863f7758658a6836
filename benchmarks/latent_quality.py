"""What latents of several sizes lose beside one shared head of the same cache: record, picture and table in the docs.

python -m rehead.benchmarks.latent_quality MODEL --text NAME FILE [--text NAME FILE] [--sizes 128,192,256] [--draw]

Nothing is trained, and the conversions' defaults are kept. With ``--draw`` the picture is made from the record alone.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from rehead.benchmarks.engines.table import put
from rehead.benchmarks.machine import machine
from rehead.benchmarks.quality import ASSETS, ROOT, picture

RECORD, PICTURE = ASSETS / "latents.json", ASSETS / "latents.svg"
WINDOWS = (512, 2048)
RECOVERED: dict[str, Any] = {"refit": True, "fit": 300}


def measure(model: str, texts: dict[str, str], sizes: list[int], tokens: int) -> dict[str, Any]:
    """Convert a model to latents of each size and to one KV head; KL to it on each text and window.

    Args:
        texts: files by the names that the record gives them.
        sizes: numbers per token and layer that latents cache.
        tokens: of each text.
    """
    from rehead.convert import convert
    from rehead.convert.inspection import inspect
    from rehead.recipes import evaluate

    facts, rows = inspect(model), []
    asked: list[tuple[str, dict[str, Any]]] = [("svd", {"num_key_value_heads": 1, "method": "svd"})]
    asked += [("latent", {"kv_cache": str(size)}) for size in sizes]
    for line, options in asked:
        for recovery in ({}, RECOVERED):
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "out"
                done = convert(model, out, **options, **recovery)
                numbers = int(options.get("kv_cache", 2 * facts["head_dim"]))
                row = {"line": line, "numbers": numbers, "fitted": bool(recovery), "seconds": round(done.seconds, 1)}
                for name, file in texts.items():
                    for window in WINDOWS:
                        report = evaluate(
                            str(out),
                            baseline=model,
                            data=[file],
                            tokens=tokens,
                            window=window,
                            conventions=["disjoint"],
                        )
                        divergence = report.divergence[0]
                        row[f"{name} {window}"] = [round(divergence.mean, 4), round(divergence.top1_agreement, 4)]
            rows.append(row)
            print(json.dumps(row), flush=True)
    return {"model": Path(model).name, "machine": machine(), "rows": rows}


def table(record: dict[str, Any]) -> str:
    """The record as a Markdown table: KL for each text and window, and top-1 agreement on the first."""
    texts = [name for name in record["rows"][0] if " " in name]
    lines = [f"| | cache | {', '.join(texts[:1])} | {' | '.join(texts[1:])} | top-1 | time |"]
    lines.append("| --- " * (len(texts) + 4) + "|")
    for row in record["rows"]:
        kl = " | ".join(f"{row[text][0]:.3g}" if text in row else "" for text in texts)
        agreed = f"{row[texts[0]][1]:.1%}" if row[texts[0]][1] is not None else ""
        took = "" if row["seconds"] is None else f"{row['seconds']:.0f} s"
        lines.append(f"| {_label(row)} | {row['numbers']} | {kl} | {agreed} | {took} |")
    return "\n".join(lines)


def _label(row: dict[str, Any]) -> str:
    return row["line"] + (", refit and fit" if row["fitted"] else ", one shot")


def draw(record: dict[str, Any], out: Path) -> None:
    """KL over the size of the cache, on the first text and window."""
    text = next(name for name in record["rows"][0] if " " in name)
    styles = {"svd": "#e09f3e", "latent": "#5b7fde"}
    with picture(out, "numbers cached for each token and layer") as axes:
        for label in dict.fromkeys(_label(row) for row in record["rows"]):
            rows = sorted((row for row in record["rows"] if _label(row) == label), key=lambda row: row["numbers"])
            shape: dict[str, Any] = {
                "marker": "o" if rows[0]["fitted"] else "s",
                "linestyle": "-" if rows[0]["fitted"] else "--",
            }
            points = [(row["numbers"], row[text][0]) for row in rows]
            axes.plot(*zip(*points), color=styles[rows[0]["line"]], linewidth=2, label=label, **shape)
        axes.set_xticks(sorted({row["numbers"] for row in record["rows"]}))
        axes.set_yticks([0.02, 0.05, 0.1, 0.2, 0.5, 1, 2], ["0.02", "0.05", "0.1", "0.2", "0.5", "1", "2"])
        axes.minorticks_off()


def main() -> None:
    """Measure, record and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--text", nargs=2, action="append", metavar=("NAME", "FILE"), default=[])
    parser.add_argument("--sizes", default="128,192,256", help="numbers per token and layer")
    parser.add_argument("--tokens", type=int, default=32768, help="of each text")
    parser.add_argument("--draw", action="store_true", help="draw from the record alone")
    options = parser.parse_args()
    if not options.draw:
        if options.model is None or not options.text:
            parser.error("give MODEL and at least one --text NAME FILE, or --draw")
        sizes = [int(size) for size in options.sizes.split(",")]
        record = measure(options.model, dict(options.text), sizes, options.tokens)
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
    record = json.loads(RECORD.read_text())
    draw(record, PICTURE)
    put(table(record), ROOT / "docs" / "variants" / "latent.md", "quality")


if __name__ == "__main__":
    main()
