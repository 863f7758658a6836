"""What transformers itself answers: greedy tokens, their log-probabilities and the bytes that its cache holds.

And what it would answer if it left windows, sinks or a stretched RoPE out, as engines do that load a model and say
nothing: an answer that is this one names the fault, and one that is not shows that the engine computes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rehead.attention.attend import attend
from rehead.attention.call import AttentionCall
from rehead.attention.install import installation
from rehead.errors import ReheadError
from rehead.models.modeling.modeling_rehead_cache import cache_argument, returned_cache
from rehead.patches import patch_model

NEW_TOKENS = 24
PROMPT_TOKENS = 64
PARTS: dict[str, dict[str, Any]] = {
    "windows": {"window": None, "sink_tokens": 0},
    "sinks": {"sinks": None},
    "windows and sinks": {"window": None, "sink_tokens": 0, "sinks": None},
}
"""What an engine may leave out -> an attention call without it."""


@dataclass(frozen=True)
class Reference:
    """A greedy continuation by transformers, in float32.

    Attributes:
        prompt, tokens: ids.
        logprobs: of the tokens, nats.
        margin: the smallest lead of a token's log-probability over the next best; equal computations may part below it.
        cache_bytes_per_token: of what the cache holds per token, over all layers that keep every token.
        without: by those names of :data:`PARTS` and of :func:`_plainer_rope` that the model has: ``tokens`` and
            ``logprobs`` where its attention leaves them out.
    """

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    margin: float
    cache_bytes_per_token: float
    without: dict[str, dict[str, list[Any]]]

    def as_json(self) -> dict[str, Any]:
        """For a file."""
        return asdict(self)


def prompt_of(folder: Path, length: int = PROMPT_TOKENS) -> list[int]:
    """The start of the held-out text that ships with Rehead, in the folder's own tokens."""
    import gzip
    from importlib.resources import files

    from transformers import AutoTokenizer

    text = gzip.decompress((files("rehead.recipes.assets") / "heldout.txt.gz").read_bytes()).decode()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    return tokenizer(text[:8000], add_special_tokens=False)["input_ids"][:length]


def continue_greedily(folder: Path, prompt: list[int], count: int = NEW_TOKENS) -> Reference:
    """Load a folder as anybody would, in float32, and continue a prompt through the cache.

    Args:
        prompt: token ids. An encoder-decoder reads them in its encoder and starts its decoder as its config says.
        count: new tokens.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    import rehead  # noqa: F401  (its own classes load by their names)

    config = AutoConfig.from_pretrained(folder)
    auto: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=torch.float32).eval()
    tokens: list[int] = []
    logprobs: list[float] = []
    margin = float("inf")
    cache, given = None, {"input_ids": torch.tensor([prompt])}
    if config.is_encoder_decoder:
        encoded = model.get_encoder()(**given)
        given = {"decoder_input_ids": torch.tensor([[config.decoder_start_token_id]])}
    with torch.no_grad():
        for _ in range(count):
            if config.is_encoder_decoder:
                given["encoder_outputs"] = encoded
            answer = model(**given, use_cache=True, **cache_argument(cache))
            cache = returned_cache(answer)
            best = answer.logits[0, -1].log_softmax(-1).topk(2)
            tokens.append(int(best.indices[0]))
            logprobs.append(float(best.values[0]))
            margin = min(margin, float(best.values[0] - best.values[1]))
            name = "decoder_input_ids" if config.is_encoder_decoder else "input_ids"
            given = {name: torch.tensor([tokens[-1:]])}
    without = {} if config.is_encoder_decoder else _without(model, prompt, count)
    for part, parameters in _plainer_rope(config, len(prompt) + count).items():
        config.rope_parameters = parameters
        without[part] = _continued(auto.from_pretrained(folder, config=config, dtype=torch.float32), prompt, count)
    return Reference(prompt, tokens, logprobs, margin, _bytes_per_token(cache), without)


def _plainer_rope(config: Any, length: int) -> dict[str, dict[str, Any]]:
    """RoPE parameters of an engine that reads less of them, by what it leaves out; none where nothing is stretched.

    Args:
        length: tokens of the whole text.
    """
    given = getattr(config, "rope_parameters", None) or {}
    if given.get("rope_type", "default") == "default":
        return {}
    kept = {key: given[key] for key in ("rope_theta", "partial_rotary_factor") if key in given}
    plainer = {"stretched RoPE": {**kept, "rope_type": "default"}}
    if given["rope_type"] == "longrope" and length <= given["original_max_position_embeddings"]:
        # Its short factors are the plain frequencies.
        plainer = {"frequencies of short texts": {**given, "short_factor": given["long_factor"]}}
    return plainer


def _without(model: Any, prompt: list[int], count: int) -> dict[str, dict[str, list[Any]]]:
    """Greedy continuations without each of :data:`PARTS` that the model has; none where its attention is unknown."""
    try:
        with patch_model(model, "tiled"):
            with _changed(model, {}) as calls:
                _continued(model, prompt, 1)
            has = {"windows": any(call.window is not None for call in calls)}
            has["sinks"] = any(call.sinks is not None for call in calls)
            has["windows and sinks"] = all(has.values())
            answers = {}
            for part in (name for name, there in has.items() if there):
                with _changed(model, PARTS[part]):
                    answers[part] = _continued(model, prompt, count)
            return answers
    except ReheadError:
        return {}


@contextmanager
def _changed(model: Any, changes: dict[str, Any]) -> Iterator[list[AttentionCall]]:
    """Inside the block every layer under the tiled attention computes its calls with some fields changed; gives a list
    that the calls go to."""
    calls: list[AttentionCall] = []

    def changed(call: AttentionCall) -> Tensor:
        calls.append(call)
        return attend(call.with_(**changes))

    installed = installation(model)
    assert installed is not None
    layers: list[Any] = installed.layers
    for layer in layers:
        layer.attend = changed
    try:
        yield calls
    finally:
        for layer in layers:
            del layer.attend


def _continued(model: Any, prompt: list[int], count: int) -> dict[str, list[Any]]:
    """Greedy tokens and their log-probabilities without a cache, which would have dropped what a window hides."""
    ids, logprobs = list(prompt), []
    with torch.no_grad():
        for _ in range(count):
            best = model(torch.tensor([ids]), use_cache=False).logits[0, -1].log_softmax(-1).max(-1)
            ids.append(int(best.indices))
            logprobs.append(float(best.values))
    return {"tokens": ids[len(prompt) :], "logprobs": logprobs}


def _bytes_per_token(cache: Any) -> float:
    """Over all layers; a windowed layer counts with what it holds per token held."""
    layers = getattr(cache, "self_attention_cache", cache).layers
    return sum(
        tensor.numel() * tensor.element_size() / tensor.shape[-2]
        for layer in layers
        for tensor in (layer.keys, layer.values)
        if isinstance(tensor, torch.Tensor) and tensor.numel()
    )
