"""Proof that a patch runs and computes the same function, and the measure of one that does not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from rehead.errors import UsageError, VerificationError

if TYPE_CHECKING:
    from rehead.patches.base import Patch

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""Largest allowed difference of logits, as a share of their largest magnitude (at least 1)."""


@dataclass
class Proof:
    """What :func:`prove` found.

    Attributes:
        layers: attention layers that the probe reaches.
        calls: calls of the patched attention in one forward pass.
        difference: largest difference to the unpatched logits on rows that are not padding.
        tolerance: what was allowed.
        leak: largest change of earlier logits when later tokens change, patched.
        unpatched_leak: the same for the unpatched model.
        against: what the logits were compared with: ``"unpatched"``, or ``"eager"`` where the model's own
            implementation differs from its eager attention and the patch does not, or is this attention by name.
        decoding: the same for a continuation from a cache; None where the model has no cache.
        unreached: patched layers that neither model calls on this input (cross-attention without an encoder, say).
    """

    layers: int
    calls: int
    difference: float
    tolerance: float
    leak: float
    unpatched_leak: float
    unreached: list[str]
    against: str = "unpatched"
    decoding: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        note = "" if self.against == "unpatched" else f", against {self.against}"
        cached = "" if self.decoding is None else f", {self.decoding:.1e} from a cache"
        return (
            f"proved: {self.layers} layers, {self.calls} calls, difference {self.difference:.1e}{cached} "
            f"(allowed {self.tolerance:.1e}), leak {self.leak:.1e}{note}"
        )


@dataclass
class Measure:
    """How far an approximate patch is from the original model.

    Attributes:
        kl: mean Kullback-Leibler divergence, original to patched, in nats a token.
        difference: largest difference of logits.
        agreement: share of tokens with the same most likely successor.
        residual: largest difference that is left with the variant switched off: the patch's own error.
    """

    kl: float
    difference: float
    agreement: float
    residual: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"KL {self.kl:.4f} nats a token, same next token {self.agreement:.1%}, logits differ by up to "
            f"{self.difference:.2e}; {self.residual:.1e} with the variant off"
        )


@contextmanager
def unpatched(patch: Patch) -> Iterator[nn.Module]:
    """Take a patch off for a moment, keeping its counters, and put it back whatever happens."""
    calls = {record.name: record.calls for record in patch._records}
    patch.revert()
    try:
        yield patch.model
    finally:
        patch.apply()
        for record in patch._records:
            record.calls = calls.get(record.name, 0)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients and without disturbing the random state."""
    modes = {name: module.training for name, module in model.named_modules()}
    model.eval()
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            yield
    finally:
        for name, module in model.named_modules():
            module.training = modes[name]


def probe_tokens(model: nn.Module, length: int, batch: int, seed: int) -> Tensor:
    """Random token ids ``[batch, length]`` on the model's device, away from the lowest ids (padding, end of text)."""
    config = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    vocabulary = int(getattr(config, "vocab_size", 0) or 0)
    if vocabulary < 4:
        raise UsageError("the model's config has no vocab_size to draw probe tokens from; pass input_ids= to prove()")
    # Of a model that is offloaded as a whole, accelerate moves the inputs.
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    gen = torch.Generator().manual_seed(seed)
    return torch.randint(min(8, vocabulary // 2), vocabulary, (batch, length), generator=gen).to(device)


def default_length(model: nn.Module) -> int:
    """Long enough to pass a short window or chunk, short enough to be quick, and within the model's positions."""
    config = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    # On a GPU several tiles of the kernels (up to 192 rows, 128 keys), the last of them ragged.
    length = 300 if any(p.is_cuda for p in model.parameters()) else 48
    for name in ("sliding_window", "attention_chunk_size", "window_size"):
        extent = getattr(config, name, None)
        if isinstance(extent, int) and 1 < extent <= 1024:
            length = max(length, 2 * extent + 3)
    limits = [getattr(config, n, None) for n in ("max_position_embeddings", "n_positions", "max_seq_len")]
    return min([length, *(limit for limit in limits if isinstance(limit, int) and limit > 1)])


def _logits(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    if getattr(model.config, "is_encoder_decoder", False):
        inputs = {**inputs, "decoder_input_ids": inputs["input_ids"]}
    out = model(**inputs, use_cache=False)
    found = getattr(out, "logits", None)
    if found is None:
        found = getattr(out, "last_hidden_state", None)
    if not isinstance(found, Tensor) or found.ndim < 3:
        # A head that says one thing of a whole sequence hides what a proof is about: one row a token.
        hidden = getattr(model(**inputs, use_cache=False, output_hidden_states=True), "hidden_states", None)
        if not hidden:
            raise UsageError(f"{type(model).__name__} returns no logits or hidden states of tokens; prove a causal LM")
        found = hidden[-1]
    # Virtual tokens (prompt tuning) come before those of the probe.
    return found[:, -inputs["input_ids"].shape[1] :]


def _called(model: nn.Module, names: list[str], run: Any) -> tuple[Any, set[str]]:
    """Run, and say which of the named modules took part."""
    seen: set[str] = set()
    modules = dict(model.named_modules())
    hooks = [modules[name].register_forward_pre_hook(lambda module, args, name=name: seen.add(name)) for name in names]
    try:
        return run(), seen
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class _Probe:
    plain: dict[str, Any]
    changed: dict[str, Any]
    padded: dict[str, Any] | None
    cut: int


def _probe(model: nn.Module, input_ids: Tensor | None, length: int | None, padding: bool) -> _Probe:
    """Tokens, the same with a changed second half, and the same with the first row padded on the left."""
    if input_ids is None:
        input_ids = probe_tokens(model, length or default_length(model), 2, seed=0)
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or input_ids.is_floating_point():
        raise UsageError("input_ids must be an integer tensor [batch, length]; tokenise with return_tensors='pt'")
    length = input_ids.shape[1]
    if length < 2:
        raise UsageError("a proof needs at least two tokens; pass longer input_ids")
    cut = max(1, length // 2)
    others = input_ids.clone()
    # Shifting the later tokens among themselves changes each without inventing ids the model may not have.
    others[:, cut:] = input_ids[:, cut:].roll(1, dims=1).flip(0)
    if torch.equal(others, input_ids):
        others[:, cut:] = input_ids[:, :1]
    mask = torch.ones_like(input_ids)
    mask[0, : max(1, length // 5)] = 0
    return _Probe(
        {"input_ids": input_ids},
        {"input_ids": others},
        {"input_ids": input_ids, "attention_mask": mask} if padding else None,
        cut,
    )


@dataclass
class _Outputs:
    plain: Tensor
    changed: Tensor
    padded: Tensor | None
    cached: Tensor | None = None


def _continued(model: nn.Module, probe: _Probe) -> Tensor | None:
    """Logits ``[rows, vocabulary]`` of a prefill, one token and the rest through a cache; None without a cache."""
    if getattr(model.config, "is_encoder_decoder", False):
        return None
    tokens = probe.plain["input_ids"]
    mask = torch.ones_like(tokens) if probe.padded is None else probe.padded["attention_mask"]
    cache, rows = None, []
    for start, stop in ((0, probe.cut), (probe.cut, probe.cut + 1), (probe.cut + 1, tokens.shape[1])):
        if start == stop:
            continue
        step: dict[str, Any] = {} if cache is None else {"past_key_values": cache}
        out = model(input_ids=tokens[:, start:stop], attention_mask=mask[:, :stop], use_cache=True, **step)
        cache, found = getattr(out, "past_key_values", None), getattr(out, "logits", None)
        if cache is None or not isinstance(found, Tensor) or found.ndim < 3:
            return None
        rows.append(found[:, start - stop :][mask[:, start:stop].bool()])
    return torch.cat(rows)


def _continued_if_it_can(model: nn.Module, probe: _Probe) -> Tensor | None:
    """:func:`_continued` of an unpatched model, which may not be able to: that is nothing to hold the patch to."""
    try:
        return _continued(model, probe)
    except Exception:
        return None


def _run(model: nn.Module, probe: _Probe, plain: Tensor | None = None) -> _Outputs:
    """Logits of every part of the probe; ``plain`` if they are there already."""
    return _Outputs(
        _logits(model, probe.plain) if plain is None else plain,
        _logits(model, probe.changed),
        None if probe.padded is None else _logits(model, probe.padded),
    )


def _gap(a: _Outputs, b: _Outputs, probe: _Probe) -> float:
    """Largest difference on rows that are not padding."""
    gap = max(_difference(a.plain, b.plain), _cached_gap(a, b) or 0.0)
    if a.padded is not None and b.padded is not None and probe.padded is not None:
        keep = probe.padded["attention_mask"].bool()
        gap = max(gap, _difference(a.padded[keep], b.padded[keep]))
    return gap


def _cached_gap(a: _Outputs, b: _Outputs) -> float | None:
    return None if a.cached is None or b.cached is None else _difference(a.cached, b.cached)


@contextmanager
def _eager(model: nn.Module) -> Iterator[None]:
    """Run an unpatched model with eager attention for a moment."""
    configs = {id(c): c for m in model.modules() for c in m.__dict__.values() if isinstance(c, PreTrainedConfig)}
    before = {key: config._attn_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation_internal = "eager"
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]


def _difference(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    # Models with capped vocabularies give -inf on both sides.
    same = a == b
    gap = torch.where(same, 0.0, (a - b).abs())
    return float(gap.max()) if gap.numel() else 0.0


def prove(
    patch: Patch,
    *,
    input_ids: Tensor | None = None,
    length: int | None = None,
    tolerance: float | None = None,
    padding: bool = True,
) -> Proof:
    """Compare a patched model with itself unpatched, on the same tokens.

    Three things are required: every attention layer that the unpatched model runs calls the patched attention; the
    logits agree on rows that are not padding, without and with left padding, and from a cache where the model has one
    (with the unpatched model's, or with eager attention's where its own implementation differs from that); and logits
    before a changed token do not move (by no more than they do in the unpatched model, where routing of experts can
    shift rounding).

    Args:
        patch: an applied patch.
        input_ids: int ``[B, S]``; random tokens by default.
        length: tokens a row for the random probe; by default enough to pass a short window.
        tolerance: largest difference as a share of the largest logit; by the model's dtype if None.
        padding: also compare with the first row padded on the left.

    Raises:
        VerificationError: with the one thing that failed.
        UsageError: the patch is not applied, or the model cannot be probed with token ids.
    """
    if not patch.applied:
        raise UsageError(f"patch {patch.name!r} is not applied; prove it inside `with patch_model(...)`")
    model = patch.model
    names = [record.name for record in patch._records]
    with _frozen(model):
        probe = _probe(model, input_ids, length, padding)
        # First as the model is: taking the patch off and putting it back would mend what somebody changed since.
        before = {record.name: record.calls for record in patch._records}
        try:
            plain = _logits(model, probe.plain)
        except IndexError as error:
            shape = " x ".join(map(str, probe.plain["input_ids"].shape))
            raise UsageError(
                f"{type(model).__name__} cannot look up tokens or positions of a probe of {shape} tokens ({error}); "
                "pass a smaller length=, or input_ids= it knows"
            ) from error
        calls = {record.name: record.calls - before[record.name] for record in patch._records}
        mine = _run(model, probe, plain)
        # A model that was loaded under this attention's name would be held to itself.
        named = any(record.how == "interface" and record.was == record.now for record in patch._records)
        with unpatched(patch), _eager(model) if named else nullcontext():
            theirs, reached = _called(model, names, lambda: _run(model, probe))
            theirs.cached = _continued_if_it_can(model, probe)
        if theirs.cached is not None:
            mine.cached = _continued(model, probe)
        silent = [name for name in names if name in reached and not calls[name]]
        if silent:
            raise VerificationError(
                f"{silent[0]}{f' and {len(silent) - 1} more layers' if len(silent) > 1 else ''} ran without calling "
                "the patched attention: the model ignores it, or its attn_implementation was set anew; revert the patch"
            )
        if not reached:
            raise VerificationError(
                "no patched layer ran on the probe, so nothing is proved; pass input_ids that reach them"
            )
        share = TOLERANCE.get(theirs.plain.dtype, 1e-5) if tolerance is None else tolerance
        limit = share * max(1.0, float(theirs.plain.abs().nan_to_num(0, 0, 0).max()))
        gap, against = _gap(mine, theirs, probe), "eager" if named else "unpatched"
        if not gap <= limit and not named:
            # Some attention implementations drop what they cannot do (a soft cap, under SDPA in older transformers).
            # Eager attention is the definition, so agreement with it is what counts.
            with unpatched(patch), _eager(model):
                eager = _run(model, probe)
                eager.cached = _continued_if_it_can(model, probe)
            if _gap(mine, eager, probe) <= limit:
                gap, against, theirs = _gap(mine, eager, probe), "eager", eager
    if not gap <= limit:
        raise VerificationError(
            f"the patched logits differ from the unpatched ones by {gap:.2e}, over the {limit:.2e} allowed; "
            "revert the patch and report the model type"
        )
    leak, unpatched_leak = (_difference(x.plain[:, : probe.cut], x.changed[:, : probe.cut]) for x in (mine, theirs))
    if leak > 4 * unpatched_leak:
        raise VerificationError(
            f"later tokens change earlier logits by {leak:.2e} (unpatched {unpatched_leak:.2e}): causality is lost; "
            "revert the patch and report the model type"
        )
    return Proof(
        layers=len(reached),
        calls=sum(calls.values()),
        difference=gap,
        tolerance=limit,
        leak=leak,
        unpatched_leak=unpatched_leak,
        unreached=[name for name in names if name not in reached],
        against=against,
        decoding=_cached_gap(mine, theirs),
    )


def measure(patch: Any, *, input_ids: Tensor | None = None, length: int | None = None) -> Measure:
    """Compare an approximate patch with the original model, and again with the variant switched off.

    Args:
        patch: an applied patch with a ``switched_off()`` that lists (record, field, exact value).
        input_ids: int ``[B, S]``; random tokens by default, which say little about text.
        length: tokens a row for the random probe.

    Raises:
        UsageError: the patch is not applied.
    """
    if not patch.applied:
        raise UsageError(f"patch {patch.name!r} is not applied; measure it inside `with patch_model(...)`")
    model = patch.model
    with _frozen(model):
        if input_ids is None:
            input_ids = probe_tokens(model, length or default_length(model), 2, seed=0)
        inputs = {"input_ids": input_ids}
        with unpatched(patch):
            reference = _logits(model, inputs).double()
        variant = _logits(model, inputs).double()
        switches = patch.switched_off()
        kept = [(record, name, getattr(record, name)) for record, name, _ in switches]
        try:
            for record, name, exact in switches:
                setattr(record, name, exact)
            off = _logits(model, inputs).double()
        finally:
            for record, name, value in kept:
                setattr(record, name, value)
    log_p, log_q = (torch.log_softmax(x, -1) for x in (reference, variant))
    divergence = torch.where(log_p == float("-inf"), 0.0, log_p.exp() * (log_p - log_q)).sum(-1)
    return Measure(
        kl=float(divergence.mean()),
        difference=_difference(reference, variant),
        agreement=float((reference.argmax(-1) == variant.argmax(-1)).double().mean()),
        residual=_difference(reference, off),
    )
