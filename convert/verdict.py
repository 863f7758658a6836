"""What a conversion is good for: the result beside its source on a little text, in one word, and what does better."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rehead.checkpoints.source import LocalSource
from rehead.errors import first_line

if TYPE_CHECKING:
    import torch

    from rehead.convert.planning import Plan
    from rehead.models.distance import Judgement

#: Sequences and tokens in each, and the most parameters of a model that is measured where it was not calibrated, which
#: takes far longer than measuring.
_ROWS, _LENGTH = 4, 128
_MOST = 400_000_000


@dataclass(frozen=True)
class Verdict:
    """How far a result is from its source.

    Attributes:
        word: :func:`rehead.models.distance.judged`'s; None where nothing was measured.
        kl: mean divergence from the source, nats per token.
        top1_agreement: share of tokens at which both predict the same next one.
        tokens: how many were compared.
        text: of what they are.
        unmeasured: why nothing was measured.
    """

    word: Judgement | None = None
    kl: float | None = None
    top1_agreement: float | None = None
    tokens: int = 0
    text: str = ""
    unmeasured: str = ""

    def as_json(self) -> dict[str, Any]:
        if self.word is None:
            return {"unmeasured": self.unmeasured}
        facts = {"kl": self.kl, "top1_agreement": self.top1_agreement, "tokens": self.tokens, "text": self.text}
        return {"verdict": self.word, **facts}

    def __str__(self) -> str:
        """One sentence without a full stop."""
        if self.word is None:
            return f"nothing was measured: {self.unmeasured}"
        return (
            f"KL {self.kl:.3g} nats per token, same next word at {self.top1_agreement:.1%}, on {self.tokens} tokens of "
            f"{self.text}"
        )


def reach_verdict(plan: Plan, folder: str | os.PathLike[str], device: torch.device) -> Verdict:
    """Compare the weights in a folder with the plan's source.

    A model that was not calibrated is measured only if it is small: the conversion itself may take seconds.

    Args:
        plan: the plan that they were made by.
        folder: the result, staged or finished.
        device: where both run if the plan is calibrated; the CPU otherwise.
    """
    largest = max(plan.source.parameters(), plan.result.parameters())
    if not plan.calibrated and largest > _MOST:
        return Verdict(unmeasured=f"{largest / 1e9:.1f} billion parameters would take longer than this conversion")
    import torch

    from rehead.convert.comparison import compare
    from rehead.data.sample import sample
    from rehead.models.distance import judged

    positions = getattr(plan.config, "max_position_embeddings", None) or _LENGTH
    text = sample(plan.source.source, int(plan.source.config.vocab_size), _ROWS, min(_LENGTH, int(positions)))
    if not text.is_text:
        return Verdict(unmeasured="the model has no tokenizer that gives it words")
    try:
        with LocalSource(folder) as made:
            apart = compare(plan.source.source, made, text, device if plan.calibrated else torch.device("cpu"))
    except Exception as error:  # the conversion is done and stays, whatever a class does with text
        return Verdict(unmeasured=f"the comparison failed ({first_line(error)})")
    word = judged(apart.mean_kl, apart.top1_agreement)
    return Verdict(word, float(f"{apart.mean_kl:.4g}"), round(apart.top1_agreement, 4), len(apart.kl), text.name)


def better(plan: Plan, verdict: Verdict, out: str) -> str | None:
    """The command that does better than this conversion; None where that is hardly needed or there is none.

    Calibration and the recoveries after it come first, then uptraining.
    """
    if plan.exact or verdict.word == "usable":
        return None
    options, source = plan.options, plan.source.source.id
    if plan.kv == plan.source.num_kv_heads and (options.steps or options.variants or options.is_latent):
        options = options.but(num_key_value_heads=None)
    if not getattr(plan.config, "is_encoder_decoder", False):
        pooled = plan.kv != plan.source.num_kv_heads and not options.is_latent
        more: dict[str, Any] = {}
        if pooled and not (options.method == "svd" and options.refit):
            more = {"method": "svd", "refit": True}
        elif not options.refit and (options.block or options.is_latent):
            more = {"refit": True}
        elif options.refit and not options.fit and (pooled or options.is_latent):
            more = {"fit": 300}
        if more:
            return shlex.join(["rehead", "convert", source, out, "--overwrite", *options.but(**more).as_flags()])
    return shlex.join(["rehead", "uptrain", out, f"{out}-uptrained", "--data", "TEXT"])
