"""The report's tables: headings and cells as text, for HTML and Markdown alike."""

from __future__ import annotations

from dataclasses import dataclass, field

from rehead.recipes.evaluation_schema import Evaluation, Interval, Perplexity
from rehead.recipes.report.facts import Entry, Summary, Training, how
from rehead.recipes.report.speeds import SpeedFactor, headline_speed
from rehead.recipes.report.wording import bytes_of, count, figure, heads, percent, short, times


@dataclass
class Table:
    """A table.

    Attributes:
        name: short, for ids.
        title: what it holds.
        head: column headings; the first column names the row.
        rows: cells; what follows a line's end in one is set smaller, below it.
        note: how to read it.
    """

    name: str
    title: str
    head: list[str]
    rows: list[list[str]] = field(default_factory=list)
    note: str = ""


def overview(summaries: list[Summary]) -> Table:
    """A row for each model: what it saves and what it costs on the text where it costs most."""
    at = f"KV at {count(summaries[0].context)} tokens"
    head = ["model", "verdict", at, "× original", "KL", "top-1", "× control", "perplexity", "decode speed", "KV heads"]
    table = Table("overview", "Overview", head)
    first = next((s for s in summaries if s.baseline_kv_heads), None)
    if first is not None:
        base = next((s.worst for s in summaries if s.worst and s.worst.control is not None), first.worst)
        table.rows.append([
            "original", "–", bytes_of(first.baseline_kv_bytes), times(1.0), "0", percent(1.0), "–",
            figure(base.baseline if base else None), times(1.0), heads(first.baseline_kv_heads),
        ])  # fmt: skip
        if base and base.control is not None:
            table.rows.append([
                "control", "–", bytes_of(first.baseline_kv_bytes),
                times(base.control / base.baseline if base.baseline else None), figure(base.control_kl),
                percent(base.control_top1), times(1.0), figure(base.control), times(1.0),
                heads(first.baseline_kv_heads),
            ])  # fmt: skip
    for s in summaries:
        text, speed = s.worst, headline_speed(s, summaries)
        table.rows.append([
            s.name, s.verdict or "–", bytes_of(s.kv_bytes), times(text.ratio if text else None),
            figure(text.kl if text else None), percent(text.top1_agreement if text else None),
            times(text.against_control if text else None), figure(text.perplexity if text else None),
            _spread(speed), "latent" if "latent" in (s.entry.evaluation.model.conversion or {}) else heads(s.kv_heads),
        ])  # fmt: skip
    texts = {s.worst.name for s in summaries if s.worst}
    speed = next((one for s in summaries if (one := headline_speed(s, summaries)) is not None), None)
    table.note = (
        (f"On {next(iter(texts))}. " if len(texts) == 1 else "Each on the text where it loses most. ")
        + "KL in nats per token; top-1: positions at which both find the same token most likely."
        + (f" Decoding at batch {speed.batch}, {count(speed.context)} tokens of context, × the original's, with the "
           "spread of all measurements of models of that shape." if speed else "")
    )  # fmt: skip
    # Columns that were measured for none would only take room.
    keep = [
        i
        for i in range(len(head))
        if i in (0, 2, len(head) - 1) or any(row[i] not in ("–", "0", "×1.00") for row in table.rows[1:])
    ]
    table.head = [head[i] for i in keep]
    table.rows = [[row[i] for i in keep] for row in table.rows]
    return table


def _spread(speed: SpeedFactor | None) -> str:
    """A factor with its spread below it."""
    if speed is None:
        return "–"
    if speed.low is None or speed.high is None:
        return times(speed.factor)
    return f"{times(speed.factor)}\n{figure(speed.low)} to {figure(speed.high)}"


def details(entry: Entry) -> list[Table]:
    """Every figure of one evaluation."""
    found = entry.evaluation
    made = (_perplexity, _divergence, _damage, _needle, _recall, _tasks, _cache, _speed, _gates)
    return [table for make in made for table in [make(found)] if table.rows]


def _perplexity(found: Evaluation) -> Table:
    head = ["of", "text", "convention", "value", "95% interval", "× original", "bits per byte", "tokens", "window",
            "stride", "dtype"]  # fmt: skip
    rows = [
        [p.who, p.data, named(p), figure(p.value, 4), _range(p.low, p.high),
         times(p.ratio.value if p.ratio else None), figure(p.bits_per_byte, 4), count(p.tokens), count(p.window),
         count(p.stride), p.dtype]
        for p in found.perplexity
    ]  # fmt: skip
    return Table("perplexity", "Perplexity", head, rows,
                 "Intervals by resampling windows; the ratio's windows are resampled in pairs.")  # fmt: skip


def named(row: Perplexity) -> str:
    """A convention, and which windows begin with BOS where some do: figures of the two kinds are not comparable."""
    return row.convention if row.bos == "none" else f"{row.convention}, bos: {row.bos}"


def _divergence(found: Evaluation) -> Table:
    head = ["of", "text", "mean", "95% interval", "median", "99%", "99.9%", "max", "top-1", "Δp mean", "Δp 1% to 99%",
            "tokens"]  # fmt: skip
    rows = [
        [d.who, d.data, figure(d.mean), _range(d.low, d.high), figure(d.median), figure(d.p99), figure(d.p999),
         figure(d.max), percent(d.top1_agreement), figure(d.delta_p.mean),
         f"{figure(d.delta_p.p1)} to {figure(d.delta_p.p99)}", count(d.tokens)]
        for d in found.divergence
    ]  # fmt: skip
    return Table("divergence", "Divergence from the original", head, rows,
                 "KL in nats per token; Δp: change of the right token's probability.")  # fmt: skip


def _damage(found: Evaluation) -> Table:
    rows = [[str(d.layer), figure(d.kl), percent(d.top1_agreement), count(d.tokens)] for d in found.damage]
    return Table("damage", "Damage by layer", ["layer", "KL", "top-1", "tokens"], rows,
                 "Each converted layer alone in the original.")  # fmt: skip


def _needle(found: Evaluation) -> Table:
    depths = sorted({cell.depth for cell in found.needle})
    table = Table("needle", "Needle retrieval", ["of", "context", *(f"depth {percent(d, 0)}" for d in depths)])
    cells = {(c.who, c.length, c.depth): f"{c.hits}/{c.trials}" for c in found.needle}
    for who, length in dict.fromkeys((c.who, c.length) for c in found.needle):
        table.rows.append([who, count(length), *(cells.get((who, length, d), "–") for d in depths)])
    table.note = "Times that greedy decoding gave the whole hidden value."
    return table


def _recall(found: Evaluation) -> Table:
    distances = sorted({row.distance for row in found.recall})
    table = Table("recall", "Recall by distance", ["of", "probe", *(f"{count(d)} back" for d in distances)])
    rows = {(r.who, r.kind, r.distance): f"{percent(r.top1)} ({figure(r.nll)} nats)" for r in found.recall}
    for who, kind in dict.fromkeys((r.who, r.kind) for r in found.recall):
        table.rows.append([who, kind, *(rows.get((who, kind, d), "–") for d in distances)])
    table.note = "Most likely tokens that are right: of a random stretch repeated, and of values asked for by key."
    return table


def _tasks(found: Evaluation) -> Table:
    rows = [[t.task, t.metric, t.who, figure(t.value, 4), f"± {figure(t.stderr, 2)}" if t.stderr else "–",
             count(t.samples)] for t in found.tasks]  # fmt: skip
    return Table("tasks", "Tasks", ["task", "metric", "of", "value", "standard error", "samples"], rows)


def _cache(found: Evaluation) -> Table:
    rows = []
    for c in found.kv_cache:
        rows.append([c.who, "per token", count(c.computed_bytes_per_token), count(c.measured_bytes_per_token), c.dtype])
        rows += [[c.who, count(size.context), count(size.computed_bytes), count(size.measured_bytes), c.dtype]
                 for size in c.sizes]  # fmt: skip
    return Table("cache", "KV cache, bytes of one sequence", ["of", "tokens", "computed", "measured", "dtype"], rows,
                 "Computed from the config; measured on transformers' cache. Per token: no full window.")  # fmt: skip


def _speed(found: Evaluation) -> Table:
    head = ["of", "phase", "batch", "context", "tokens per second", "interval", "× original", "interval", "repeats",
            "peak memory"]  # fmt: skip
    rows = [[s.who, s.phase, count(s.batch), count(s.context), figure(s.tokens_per_second), _range(s.low, s.high),
             times(s.ratio.value if s.ratio else None), _range(*_ends(s.ratio)), count(s.repeats),
             bytes_of(s.peak_memory_bytes)] for s in found.speed]  # fmt: skip
    fewest = min((s.repeats for s in found.speed), default=0)
    kind = "95% intervals" if fewest >= 6 else "intervals from the lowest to the highest (too few repeats for 95%)"
    if all(s.low is None for s in found.speed):
        kind = "measured by a version that kept no intervals"
    return Table("speed", "Speed", head, rows, f"Medians; {kind}. × original: of repeats in turns.")


def _ends(ratio: Interval | None) -> tuple[float | None, float | None]:
    return (ratio.low, ratio.high) if ratio else (None, None)


def _gates(found: Evaluation) -> Table:
    rows = [[g.name, figure(g.value), f"{'at most' if g.direction == 'above' else 'at least'} {figure(g.limit)}",
             "passed" if g.passed else "FAILED"] for g in found.gates]  # fmt: skip
    return Table("gates", "Gates", ["gate", "value", "limit", ""], rows)


def _range(low: float | None, high: float | None) -> str:
    return "–" if low is None or high is None else f"{figure(low)} to {figure(high)}"


def conditions(summaries: list[Summary], trainings: list[Training]) -> Table:
    """What the figures hold under, and how each model came about."""
    table = Table("conditions", "Conditions", ["", ""])
    for s in summaries:
        table.rows.append([s.name, f"{how(s) or 'as given'}; {s.entry.evaluation.model.name}"])
    first = summaries[0].entry.evaluation
    if first.baseline is not None:
        facts = first.baseline
        table.rows.append(["original", f"{facts.name}, {facts.model_type}, {count(facts.parameters)} parameters"])
    if first.control is not None:
        table.rows.append(["control", first.control.name])
    shared = {
        "device": [
            f"{c.device}" + (f", {c.threads} thread{'s' * (c.threads > 1)}" if c.threads else "")
            for c in _all(summaries)
        ],
        "dtype, attention": [f"{c.dtype}, {c.attention}" for c in _all(summaries)],
        "texts": ["; ".join(f"{t.name} ({count(t.tokens)} tokens)" for t in c.data) for c in _all(summaries)],
        "seed": [str(c.seed) for c in _all(summaries)],
        "versions": [", ".join(f"{k} {v}" for k, v in c.versions.items()) for c in _all(summaries)],
        "measured": [c.date or "–" for c in _all(summaries)],
    }
    for name, values in shared.items():
        different = list(dict.fromkeys(values))
        if name == "measured" and len(different) > 1:
            different = [f"{min(different)} to {max(different)}"]
        table.rows.append([name, "; or ".join(different)])
    for run in trainings:
        table.rows.append(
            [f"uptraining: {run.label}", f"{short(run.tokens[-1]) if run.tokens else 'no'} tokens logged"]
        )
    return table


def _all(summaries: list[Summary]) -> list:  # type: ignore[type-arg]
    return [s.entry.evaluation.conditions for s in summaries]


def caveats(summaries: list[Summary]) -> list[str]:
    """What a reader must not conclude from the figures."""
    found = []
    trained = [s for s in summaries if s.trained_tokens]
    if trained and any(s.worst and s.worst.control is None for s in trained):
        found.append("There is no control: perplexity after uptraining mixes what the conversion cost with what the "
                     "text taught. KL to the original does not have this fault.")  # fmt: skip
    elif trained:
        found.append("The control is trained by cross-entropy on the text, a distilled model by the original's "
                     "predictions: the control may adapt to the text more than a distilled model can.")  # fmt: skip
    tokens = [t.tokens for s in summaries for t in s.entry.evaluation.conditions.data]
    if tokens and min(tokens) < 20_000:
        found.append(f"The smallest text has {count(min(tokens))} tokens; mind the intervals.")
    if any(s.speed and s.entry.evaluation.conditions.device == "cpu" for s in summaries):
        found.append("Speed was measured on a CPU, where whatever else runs shows in it; a smaller cache pays on GPUs, "
                     "at large batches and long contexts.")  # fmt: skip
    if not any(s.entry.evaluation.tasks for s in summaries):
        found.append("No downstream task was run: perplexity and KL can miss the loss of an ability.")
    if not any(s.entry.evaluation.needle or s.entry.evaluation.recall for s in summaries):
        found.append("Retrieval over long contexts was not tested, where a smaller cache tends to cost most.")
    notes = dict.fromkeys(note for s in summaries for note in s.entry.evaluation.notes)
    return found + list(notes)
