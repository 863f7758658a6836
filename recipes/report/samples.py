"""What models write, beside each other: the same pieces of text continued by the original and by each model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rehead.console import printable
from rehead.recipes.report.facts import Summary
from rehead.recipes.report.wording import count

#: More continuations of one piece than this are not compared by anybody.
_MOST = 4
NOTE = (
    "The most likely token each time, so the text is the same in every run. Underlined: what the original writes too, "
    "up to the first other token. After that a text can differ and be as good: KL and top-1 compare token by token."
)


@dataclass(frozen=True)
class Line:
    """One continuation: who wrote it, the part at its beginning that the original shares, and the rest."""

    name: str
    same: str
    rest: str
    note: str = ""


@dataclass(frozen=True)
class SampleCard:
    """One piece of text with its continuations; ``where`` says which text and from which token."""

    where: str
    prompt: str
    lines: list[Line]


def sample_cards(finals: Sequence[Summary]) -> list[SampleCard]:
    """The pieces that every shown model continued.

    Args:
        finals: the models to decide on; the nearest to the original at each size of the cache come first.
    """
    shown = [s for s in _picked(finals) if s.entry.evaluation.samples]
    if not shown:
        return []
    cards = []
    for sample in shown[0].entry.evaluation.samples:
        lines = [Line("the text itself", "", _plain(sample.truth).lstrip())]
        original = next((one for one in sample.continuations if one.who == "baseline"), None)
        if original is not None:
            lines.append(Line("original", _plain(original.text).lstrip(), ""))
        for s in shown:
            again = next((one for one in s.entry.evaluation.samples
                          if (one.data, one.position, one.prompt) == (sample.data, sample.position, sample.prompt)),
                         None)  # fmt: skip
            own = next((one for one in again.continuations if one.who == "model"), None) if again else None
            if own is None:
                continue
            same = own.same_text if own.text.startswith(own.same_text) else ""
            note = "" if own.same is None else f"{own.same} of {own.tokens} tokens as the original"
            rest = _plain(own.text[len(same) :])
            lines.append(Line(s.name, _plain(same).lstrip(), rest if same.strip() else rest.lstrip(), note))
        cards.append(
            SampleCard(f"{sample.data}, from token {count(sample.position)}", _plain(sample.prompt).lstrip(), lines)
        )
    return cards


def _picked(finals: Sequence[Summary]) -> list[Summary]:
    """At most :data:`_MOST`, the nearest of each size of the cache before the others; in the order of the report."""
    ranked: list[tuple[int, int]] = []
    for at, s in enumerate(finals):
        rank = sum(other.kv_bytes == s.kv_bytes and other.distance < s.distance for other in finals)
        ranked.append((rank, at))
    return [finals[at] for at in sorted(at for _, at in sorted(ranked)[:_MOST])]


def _plain(text: str) -> str:
    return printable(text, newlines=True)
