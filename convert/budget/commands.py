"""What ``rehead convert`` prints of a budget: the form of each layer, why, and what the result is good for."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from rehead.console import print_facts

if TYPE_CHECKING:
    from rehead.convert.budget.meet import Met


def print_met(met: Met, out: str) -> None:
    """Print what a budget made of a model: the form of each layer, why, and the verdict."""
    from rehead.convert.budget.meet import verdict

    facts, selection = met.facts, met.selection
    before, after = facts["bytes"]["before"], facts["bytes"]["after"]
    by_option: dict[str, list[int]] = {}
    for layer, option in selection.choice.items():
        by_option.setdefault(option.name, []).append(layer)
    kept = [layer for layer in met.conversion.plan.source.layers if layer not in selection.choice]
    rows = [("KV cache", f"{before:,} -> {after:,} bytes at {facts['context']:,} tokens ({met.share:.1%})")]
    rows += [(name, f"layers {spans(layers)}") for name, layers in by_option.items()]
    rows += [("as they were", f"layers {spans(kept)}")] if kept else []
    rows.append(("chosen by", selection.origin))
    losses = selection.measured
    rows.append(("closed form", f"KL {losses.kl:.4f}, and {losses.recall_kl:.4f} where it copies from afar"))
    for rival in selection.rivals[:3]:
        rows.append(("instead of", f"{rival.name}: {rival.measured.kl:.4f} and {rival.measured.recall_kl:.4f}"))
    for kind, count in Counter(facts["not_offered"].values()).most_common(2):
        rows.append(("not offered", f"{count} options: {kind}"))
    rows += [("time", f"{met.conversion.seconds:.1f} s"), ("verdict", verdict(met.measured))]
    print_facts(f"wrote {out}", rows)


def spans(layers: list[int]) -> str:
    """Layer indices as ``--layers`` takes them: ``0,2-5``."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and parts[-1][-1] == layer - 1:
            parts[-1] = [parts[-1][0], layer]
        else:
            parts.append([layer])
    return ",".join("-".join(map(str, part)) for part in parts)
