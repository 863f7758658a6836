"""What an evaluation found, as one JSON document: every figure with the conditions that it was measured under.

``who`` is ``model`` (the one that is judged), ``baseline`` (what it was made from) or ``control`` (the baseline trained
on the same tokens as the model). Sections that were not asked for are empty. All figures are finite: a model whose
logits are not is reported as an error, never as a number.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Who = Literal["model", "baseline", "control"]
Convention = Literal["disjoint", "strided", "rolling"]
Bos = Literal["each window", "the text", "none"]


class Section(BaseModel):
    """Base of the parts: unknown keys are refused, so that a report never reads another version's file wrongly."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class ModelFacts(Section):
    """One of the compared models.

    Attributes:
        name: the folder or Hub id as the user wrote it.
        model_type: as in its config.
        parameters: weights, tied ones counted once.
        dtype: of the checkpoint's weights, which the sizes below are given for, whatever it was evaluated in.
        weight_bytes: of the checkpoint's tensors.
        num_attention_heads: query heads; None where the config has no one number.
        num_key_value_heads: by attention layer; repeats that a class makes before it caches (Falcon) do not count.
        head_dim: width of a key head in the first attention layer; None without attention.
        kv_bytes_per_token: cache bytes that each further token takes, measured.
        patches: variants put on the live model, as ``NAME:key=value``, in their order.
        conversion: what ``rehead.json`` says the conversion did (method, KV heads, refit, ...); None without one.
        uptraining: what it says of the uptraining; None without one.
    """

    name: str
    model_type: str
    dtype: str = "float32"
    parameters: int
    weight_bytes: int
    num_attention_heads: int | None = None
    num_key_value_heads: list[int] = []
    head_dim: int | None = None
    kv_bytes_per_token: float | None = None
    conversion: dict[str, Any] | None = None
    patches: list[str] = []
    uptraining: dict[str, Any] | None = None


class Text(Section):
    """A text that was measured on: its name, tokens taken and the UTF-8 bytes that they stand for."""

    name: str
    tokens: int
    bytes: int


class Conditions(Section):
    """What the figures hold under.

    Attributes:
        device: e.g. ``"cpu"`` or ``"NVIDIA H200"``.
        dtype: of weights and arithmetic; softmax and sums are in float64 whatever it is.
        attention: transformers' attention implementation.
        versions: of python, torch, transformers and rehead.
        seed: of everything that is drawn.
        data: the texts.
        threads: CPU threads.
        date: when, UTC, ISO 8601.
    """

    device: str
    dtype: str
    attention: str
    versions: dict[str, str]
    seed: int
    data: list[Text] = []
    threads: int | None = None
    date: str | None = None


class Interval(Section):
    """An estimate with its 95% bootstrap interval; the bounds are None where there are too few windows for one."""

    value: float
    low: float | None = None
    high: float | None = None


class Perplexity(Section):
    """A perplexity with everything that it depends on.

    Attributes:
        who, data: of which model, on which text.
        convention: ``disjoint``, ``strided`` or ``rolling`` (see ``rehead.recipes.evaluation.windows``).
        value: exp of the mean negative log-likelihood of the counted tokens.
        low, high: 95% interval, by resampling windows (tokens of one window depend on one another).
        ratio: to the baseline's on the same windows, resampled in pairs; None for the baseline itself.
        bits_per_byte: bits for each UTF-8 byte, which models with different tokenizers may be compared by.
        tokens: predictions counted.
        window: tokens that the model sees at once; stride: from one window to the next.
        windows: how many.
        dtype: of the weights.
        bos: which windows begin with the token that the tokenizer puts before every text: ``each window``, ``the text``
            (the first window alone), or ``none``, where it puts none.
    """

    who: Who
    data: str
    convention: Convention
    value: float
    low: float | None = None
    high: float | None = None
    ratio: Interval | None = None
    bits_per_byte: float | None = None
    tokens: int
    window: int
    stride: int
    windows: int
    dtype: str
    bos: Bos = "none"


class DeltaP(Section):
    """Change of the right token's probability, model minus baseline: mean, standard deviation, percentiles."""

    mean: float
    std: float
    p1: float
    p5: float
    p95: float
    p99: float


class Histogram(Section):
    """``counts[i]`` values lie in ``[edges[i], edges[i + 1])``; the last edge is included."""

    edges: list[float]
    counts: list[int]


class Divergence(Section):
    """KL(baseline || who) of the next-token distributions, in nats per token, over disjoint windows.

    Attributes:
        tokens: predictions compared.
        mean, low, high: with its 95% interval by resampling windows.
        median, p99, p999, max: of the single tokens' divergences, exact.
        top1_agreement: share of tokens at which both find the same token most likely.
        delta_p: change of the right token's probability.
        histogram: of the single tokens' divergences, edges a fixed factor apart after the first.
        bos: as for :class:`Perplexity`.
    """

    who: Who
    data: str
    tokens: int
    window: int
    mean: float
    low: float | None = None
    high: float | None = None
    median: float
    p99: float
    p999: float
    max: float
    top1_agreement: float
    delta_p: DeltaP
    histogram: Histogram
    bos: Bos = "none"


class LayerDamage(Section):
    """KL(baseline || baseline with this one layer taken from the model), in nats per token."""

    layer: int
    kl: float
    top1_agreement: float
    tokens: int


class NeedleCell(Section):
    """Retrieval at one length and depth.

    Attributes:
        length: tokens of context; depth: where the needle stands, 0 the beginning, 1 right before the question.
        hits: trials in which greedy decoding gives the whole value; trials: all.
    """

    who: Who
    length: int
    depth: float
    hits: int
    trials: int


class RecallRow(Section):
    """Copying a random stretch, or giving values by their keys, from some tokens back; see ``rehead.models.recall``.

    Attributes:
        kind: ``copy`` or ``pairs``.
        distance: tokens back.
        top1: share of the recalled tokens that the model finds most likely; chance is one in the vocabulary.
        nll: their mean negative log-likelihood, nats.
        tokens: how many were asked for.
    """

    who: Who
    kind: Literal["copy", "pairs"]
    distance: int
    top1: float
    nll: float
    tokens: int


class TaskScore(Section):
    """One metric of one lm-evaluation-harness task; ``stderr`` None where the harness gives none."""

    who: Who
    task: str
    metric: str
    value: float
    stderr: float | None = None
    higher_is_better: bool | None = None
    shots: int | None = None
    samples: int | None = None


class CacheSize(Section):
    """Bytes of one sequence's KV cache once ``context`` tokens have been read; see :class:`KVCache`."""

    context: int
    computed_bytes: float | None
    measured_bytes: float | None


class KVCache(Section):
    """The KV cache of one sequence: from the config, and as transformers' own cache objects hold it.

    All in ``dtype``, the checkpoint's, whatever the model was evaluated in. Computed figures are None where the config
    does not say enough. ``_per_token`` is what one more token takes before any window is full; ``sizes`` is the whole
    cache at several contexts, where windows show.
    """

    who: Who
    computed_bytes_per_token: float | None
    measured_bytes_per_token: float | None
    dtype: str
    sizes: list[CacheSize] = []

    def bytes_at(self, context: int) -> float | None:
        """Bytes at a context: measured, else computed; older documents have none but those per token."""
        for size in self.sizes:
            if size.context == context:
                return size.computed_bytes if size.measured_bytes is None else size.measured_bytes
        per_token = self.measured_bytes_per_token or self.computed_bytes_per_token
        return None if per_token is None or self.sizes else per_token * context


class Continuation(Section):
    """How one model continues a text, greedily.

    Attributes:
        text: the continuation, up to the token that ends a text.
        tokens: that it has.
        same: tokens at its beginning that are the baseline's too; None for the baseline and without one.
        same_text: these as text.
    """

    who: Who
    text: str
    tokens: int
    same: int | None = None
    same_text: str = ""


class Sample(Section):
    """A piece of a text and how each model continues it.

    Attributes:
        data: the text; position: the piece's first token in it.
        prompt: the piece; truth: how the text itself goes on.
    """

    data: str
    position: int
    prompt: str
    truth: str
    continuations: list[Continuation]


class Speed(Section):
    """Throughput at one size.

    Attributes:
        phase: ``prefill`` (the context in one pass) or ``decode`` (one token a sequence on a cache of ``context``).
        tokens_per_second: over the batch; the median of the repeats.
        low, high: 95% interval of that median (:mod:`rehead.recipes.evaluation.speed`); older documents have none.
        ratio: to the baseline's, of repeats in which the models took turns; None for the baseline.
        seconds: median time of one pass or one step.
        repeats: how many the median is of; each is one pass, or the median of a few steps.
        peak_memory_bytes: of cache and activations, beyond the weights; None on a CPU.
    """

    who: Who
    phase: Literal["prefill", "decode"]
    batch: int
    context: int
    tokens_per_second: float
    low: float | None = None
    high: float | None = None
    ratio: Interval | None = None
    seconds: float
    repeats: int
    peak_memory_bytes: int | None = None


class Gate(Section):
    """A limit that the user set: ``passed`` says whether ``value`` is on the right side of it."""

    name: str
    limit: float
    value: float
    passed: bool
    direction: Literal["above", "below"] = "above"


class Evaluation(Section):
    """Everything that was found; see the module's text."""

    format: Literal[1] = 1
    model: ModelFacts
    baseline: ModelFacts | None = None
    control: ModelFacts | None = None
    conditions: Conditions
    perplexity: list[Perplexity] = []
    divergence: list[Divergence] = []
    damage: list[LayerDamage] = []
    needle: list[NeedleCell] = []
    recall: list[RecallRow] = []
    tasks: list[TaskScore] = []
    samples: list[Sample] = []
    kv_cache: list[KVCache] = []
    speed: list[Speed] = []
    gates: list[Gate] = []
    notes: list[str] = Field(default=[], description="what was left out, and why; one line each")

    def facts(self) -> dict[Who, ModelFacts]:
        """The compared models by ``who``, those that there are."""
        found: dict[Who, ModelFacts | None] = {
            "model": self.model,
            "baseline": self.baseline,
            "control": self.control,
        }
        return {who: facts for who, facts in found.items() if facts is not None}

    def as_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return self.model_dump(mode="json")
