"""The options of a conversion, stated once: keyword arguments, flags, a recipe's section and the manifest's JSON."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from rehead.checkpoints.shards import parse_size
from rehead.counts import Count, Held, Length, Seed, longest, parse_count
from rehead.errors import UsageError
from rehead.models.serving import EngineName
from rehead.options import SPLIT, Flag, Names, Options
from rehead.variants.context.options import Rope
from rehead.variants.contract import ALL, VARIANTS, Variant, VariantOptions, saved_variant
from rehead.variants.latent.options import LatentOptions
from rehead.variants.layer_choice import AUTO, is_auto
from rehead.variants.pool.methods.registry import METHODS

_BLOCKS = ("parallel", "serial")
_STEPS = ("host", "reinvest", "block")
_OF_STEPS = {
    "multiple_of": ("reinvest",),
    "layers": ("block", "window", "context"),
    "kl_budget": ("block", "window"),
    "plain": ("block",),
    "sinks": ("window",),
    "sink_logit": ("window",),
    "rope": ("context",),
    "rope_factors": ("context",),
}
#: Variants after which a layer has no heads of one size, the least of them first.
_LAST = {"uneven": 1, "latent": 2}
#: Tokens to fit latents on: with twice the usual ones and two lengths, KL was 5 to 17% lower (SmolLM2-135M).
_LATENT_FIT_TOKENS = 262144
DTYPES = {"auto": None, "float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def usual_length(tokens: int) -> int:
    """Tokens in a calibration sequence by default: 2048, halved down to 512 until ``tokens`` make 16 of them.

    Long sequences calibrate for long contexts, but a refit on a handful of excerpts learns the excerpts.
    """
    length = 2048
    while length > 512 and tokens // length < 16:
        length //= 2
    return length


def _lengths(value: Any) -> Any:
    """``"512,2048"`` as numbers, and one alone as itself."""
    if not isinstance(value, str):
        return value
    try:
        lengths = tuple(parse_count(part) for part in value.split(","))
    except ValueError:
        raise ValueError("is no number of tokens; write 2048 or 512,2048") from None
    return lengths[0] if len(lengths) == 1 else lengths


def _in_reach(value: int | tuple[int, ...] | None) -> int | tuple[int, ...] | None:
    for length in value if isinstance(value, tuple) else (value or 0,):
        longest(length)
    return value


class ConvertOptions(Options):
    """What a conversion is asked to do."""

    num_key_value_heads: Annotated[Count | None, Flag("--kv-heads", default="as they are")] = Field(
        None, ge=1, description="KV heads afterwards, a divisor of the model's; not needed for another step alone."
    )
    method: str = Field("mean", description="How KV heads are pooled: mean, first, random, procrustes or svd.")
    grouping: Literal["contiguous", "similar"] = Field(
        "contiguous", description="Which heads share: neighbours, or those that are most alike."
    )
    calibration: Annotated[Names, Flag(metavar="TEXT", default="the text that ships with Rehead")] = Field(
        (),
        description="Text to calibrate on: a file (.txt, .txt.gz, .jsonl, .parquet) or Hub dataset; repeat for more.",
    )
    calibration_tokens: Annotated[Held, Flag(default="131072, and 262144 where latents are fitted")] = Field(
        131072, ge=16, description="Tokens to calibrate on, e.g. 128k."
    )
    calibration_length: Annotated[
        int | tuple[int, ...] | None,
        BeforeValidator(_lengths),
        AfterValidator(_in_reach),
        Flag(
            metavar="N[,N]",
            default="2048, for latents 512,2048, or down to 512 where the tokens would not make 16 sequences",
        ),
    ] = Field(None, description="Tokens in a calibration sequence; several lengths share the tokens equally.")
    own_text: Annotated[Held, Flag(metavar="N")] = Field(
        0,
        ge=0,
        description="Tokens that the model writes itself to calibrate on beside the text; it is loaded whole for that.",
    )
    refit: bool = Field(False, description="Refit each layer's attention by least squares on the calibration text.")
    fit: Annotated[Count, Flag(metavar="STEPS")] = Field(
        0, ge=0, description="Then fit each layer for so many optimiser steps."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Of the weights that are written; auto keeps the source's."
    )
    max_shard_size: Annotated[int | str, Flag(metavar="SIZE")] = Field(
        "5GB", description="Largest file of weights, where the source's own split has larger ones."
    )
    seed: Seed = Field(0, description="Of what is drawn: calibration excerpts, the heads of random, new weights.")
    host: Annotated[str | None, Flag(metavar="TYPE", default="only where needed")] = Field(
        None,
        description="Write the model under another class that computes the same: phi, starcoder2, nemotron, "
        "gpt_bigcode, ministral, qwen2, smollm3, cwm, granite_swa, rehead_window or auto. With auto, a checkpoint of "
        "remote code becomes plain.",
    )
    reinvest: Literal["ffn", "hidden"] | None = Field(
        None, description="Widen the model by what sharing KV heads frees, keeping its function."
    )
    multiple_of: Annotated[Count | None, Flag(default="128")] = Field(
        None, ge=1, description="Of --reinvest: what the new width is a multiple of."
    )
    block: Literal["parallel", "serial"] | None = Field(
        None, description="Give blocks another form, which is not the same function."
    )
    layers: Annotated[str | tuple[int, ...] | None, Flag(metavar="LIST", default="all")] = Field(
        None,
        description="Of --block, --window and --context: all, a list like 0,4-7, or (of the first two) those that lose "
        "least: auto up to --kl-budget, auto:6 or auto:50%.",
    )
    kl_budget: Annotated[float | None, Flag(metavar="NATS")] = Field(
        None, gt=0, description="What --layers auto may cost per token; the whole model is loaded to measure it."
    )
    plain: bool = Field(False, description="Refuse blocks for which the result needs a modelling file of Rehead's.")
    drop_drafts: bool = Field(
        False, description="Leave out layers that draft tokens (MTP), which keep the source's heads otherwise."
    )
    latent: Annotated[Count | None, Flag(metavar="R")] = Field(
        None, ge=1, description="Latent attention (MLA): one latent of R numbers per token and layer for all heads."
    )
    rope_dims: Annotated[Count | None, Flag(metavar="D", default="what the text shows")] = Field(
        None, ge=2, description="Of latent attention: numbers of the rotated key that all heads share; even."
    )
    kv_cache: Annotated[str | None, Flag(metavar="SIZE")] = Field(
        None,
        description="Size of the cache: a share such as 33%, or numbers per token and layer. The form of each layer is "
        "chosen for it; with --rope-dims or --host, latent attention in every layer.",
    )
    fold_biases: bool = Field(
        False,
        description="Of latent attention: put biases of queries, keys and values into the weights, nearly the same, so "
        "that engines can serve it.",
    )
    half_scale: bool = Field(
        False,
        description="Of latent attention in float16: store it at a scale that float16 holds, which changes outputs by "
        "about a hundredth.",
    )
    engine: Annotated[EngineName | None, Flag("--for", default="any that takes the class")] = Field(
        None,
        description="Of --kv-cache, --latent and --context: write what this engine has been seen to serve, and what it "
        "asks for beyond its class.",
    )

    window: Annotated[Length | None, Flag(metavar="W")] = Field(
        None, ge=1, description="Let layers see the last W keys alone."
    )
    sinks: Annotated[Length, Flag(metavar="N")] = Field(
        0, ge=0, description="Of --window: first tokens of a text that stay visible; needs Rehead's modelling file."
    )
    sink_logit: bool = Field(
        False, description="Of --window: a logit for each head, fitted to calibration text, for what is not seen."
    )
    context: Annotated[Length | None, Flag(metavar="N", default="as it is")] = Field(
        None, ge=1, description="Let the model read texts of N tokens (with --kv-cache: where caches are compared)."
    )
    rope: Annotated[Rope | None, Flag(default="yarn")] = Field(
        None, description="Of --context: how rotary positions are stretched; drope leaves them out, to be uptrained."
    )
    rope_factors: Annotated[tuple[float, ...] | None, SPLIT, Flag(metavar="X,X,...", default="YaRN's, or fitted")] = (
        Field(None, description="Of --rope longrope: how much slower each rotary pair turns in long texts.")
    )
    variants: Annotated[Names, Flag("--variant", metavar="NAME:KEY=VALUE", default="none")] = Field(
        (), description="Give the model a variant of attention or blocks, with its options; repeat for more."
    )

    @model_validator(mode="before")
    @classmethod
    def _tokens_of_a_fit(cls, values: Any) -> Any:
        """A fitted latent fits the text itself where there is little of it."""
        if not isinstance(values, dict) or values.get("calibration_tokens") is not None:
            return values
        latent = any(values.get(name) is not None for name in ("latent", "kv_cache"))
        fits = latent and str(values.get("fit") or 0) != "0"
        return values | {"calibration_tokens": _LATENT_FIT_TOKENS} if fits else values

    @model_validator(mode="before")
    @classmethod
    def _flags_of_variants(cls, values: Any) -> Any:
        """``pool`` and the forms of blocks have flags of their own: what they are told is put there."""
        texts = values.get("variants") or () if isinstance(values, dict) else ()
        texts = (texts,) if isinstance(texts, str) else texts
        flagged = ("pool", "latent", "window", "context", *_BLOCKS)
        names = {text: text.partition(":")[0] for text in texts if isinstance(text, str)}
        seen = [names[text] for text in texts if isinstance(text, str) and names[text] not in flagged]
        named = {text: saved_variant(text)[1].layers for text in names}
        for name in seen:
            if seen.count(name) > 1 and any(named[text] == ALL for text in names if names[text] == name):
                raise UsageError(f"--variant {name}: is given twice; give it once, or name the layers of each")
        # What differs from layer to layer has no flag.
        several = {name for name in names.values() if list(names.values()).count(name) > 1}
        alone = {t for t, name in names.items() if named[t] != ALL and (name == "latent" or name in several)}
        own = [text for text, name in names.items() if name in flagged and text not in alone]
        if not own:
            return values
        values = values | {"variants": tuple(text for text in texts if text not in own)}
        for text in own:
            variant, options = saved_variant(text)
            said = options.model_dump(exclude_unset=True)
            if variant.name in _BLOCKS:
                said |= {"block": variant.name}
            if variant.name == "latent":
                said = {{"rank": "latent"}.get(name, name): value for name, value in said.items()}
                if not said.keys() & {"latent", "kv_cache"}:
                    raise UsageError("--variant latent: needs a size; give latent:rank=R or latent:kv_cache=33%")
            if variant.name == "window":
                said = {"window": options.model_dump()["size"]} | {
                    name: value for name, value in said.items() if name != "size"
                }
            if variant.name == "context":
                told = {"tokens": "context", "factors": "rope_factors"}
                said = {"tokens": options.model_dump()["tokens"], **said}
                if said.keys() & {"trained", "table"}:  # which have no flag
                    values |= {"variants": (*values["variants"], text)}
                    continue
                said = {told.get(name, name): value for name, value in said.items()}
            for name, value in said.items():
                if name not in cls.model_fields:
                    raise UsageError(f"--variant {variant.name}: {name} is for live models; leave it out")
                if values.get(name) not in (None, cls.model_fields[name].default, value):
                    raise UsageError(f"--variant {variant.name}: {name} is given twice; give it once")
                values[name] = value
        return values

    @model_validator(mode="after")
    def _consistent(self) -> ConvertOptions:
        METHODS.get(self.method)
        self._check_latent()
        if self.num_key_value_heads is None:
            if self.reinvest is not None:
                raise UsageError(
                    f"--reinvest {self.reinvest}: nothing is freed while the KV heads stay; give --kv-heads"
                )
            if not (self.steps or self.variants or self.is_latent or self.window or self.context):
                raise UsageError(
                    "nothing to do; say --kv-heads N, --block FORM, --variant NAME, or --host for another class with "
                    "the same heads"
                )
            others = (self.block, self.variants, self.is_latent, self.window, self.context)
            if (self.refit or self.fit) and not any(others):
                raise UsageError("--refit: recovers from shared KV heads or changed blocks; give --kv-heads or --block")
        for option, steps in _OF_STEPS.items():
            if getattr(self, option) and all(getattr(self, step) is None for step in steps):
                flag = option.replace("_", "-")
                raise UsageError(f"--{flag}: says nothing without --{steps[0]}; give both or leave it out")
        if self.layers is not None and sum(each is not None for each in (self.block, self.window, self.context)) > 1:
            raise UsageError("--layers: names layers of --block, --window or --context; give one of them in a run")
        if self.context is not None and is_auto(self.layers):
            raise UsageError("--layers auto: is not measured for --context; name the layers, or leave it out")
        if self.kl_budget is not None and not is_auto(self.layers):
            raise UsageError("--kl-budget NATS: limits --layers auto; give both, or name the layers")
        if self.layers == AUTO and self.kl_budget is None:
            raise UsageError(
                "--layers auto: needs a limit; give --kl-budget NATS, or a number as in auto:6 or auto:50%"
            )
        if self.own_text and not self.needs_calibration:
            raise UsageError("--own-text: says nothing where no text is read; give --fit, or leave it out")
        if not self.calibration_lengths:
            raise UsageError("--calibration-length: is empty; give tokens in a sequence, such as 2048 or 512,2048")
        for length in self.calibration_lengths:
            if length < 16:
                raise UsageError(f"--calibration-length {length}: must be 16 or more tokens")
        _ = self.asked_variants
        parse_size(self.max_shard_size)
        return self

    def _check_latent(self) -> None:
        if not self.is_latent:
            own = {"--rope-dims": self.rope_dims, "--for": self.engine, "--fold-biases": self.fold_biases or None}
            own |= {"--half-scale": self.half_scale or None}
            for flag, value in own.items():
                if value is not None and (flag != "--for" or self.context is None):
                    raise UsageError(f"{flag}: says nothing without --latent or --kv-cache; give one or leave it out")
            return
        others = {
            "--kv-heads": self.num_key_value_heads, "--block": self.block, "--reinvest": self.reinvest,
            "--window": self.window, "--context": self.context,
        }  # fmt: skip
        if both := [flag for flag, value in others.items() if value is not None]:
            raise UsageError(f"{both[0]}: does not go together with latent attention; give one of them")
        for name in ("method", "grouping"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise UsageError(f"--{name} {getattr(self, name)}: says nothing with latent attention; leave it out")
        LatentOptions.parse({"rank": self.latent, "rope_dims": self.rope_dims, "kv_cache": self.kv_cache})

    @property
    def asked_variants(self) -> list[tuple[Variant, VariantOptions]]:
        """The variants that have no step of their own, with their options."""
        asked = [saved_variant(text) for text in self.variants]
        if self.window is not None:
            variant = VARIANTS.get("window")
            layers = self.layers if self.layers is not None and self.block is None else "all"
            told = {"size": self.window, "sinks": self.sinks, "sink_logit": self.sink_logit}
            asked.append((variant, variant.options.parse({**told, "layers": "all" if is_auto(layers) else layers})))
        if self.context is not None:
            variant = VARIANTS.get("context")
            rope, layers = self.rope or "yarn", self.layers or "all"
            said = {"tokens": self.context, "rope": rope, "factors": self.rope_factors, "layers": layers}
            said["engine"] = self.engine
            asked.append((variant, variant.options.parse(said)))
        return sorted(asked, key=lambda pair: _LAST.get(pair[0].name, 0))

    @property
    def is_latent(self) -> bool:
        """Whether latent attention is asked for."""
        return self.latent is not None or self.kv_cache is not None

    @property
    def steps(self) -> list[str]:
        """Which steps besides pooling are asked for, by the names of their options."""
        return [name for name in _STEPS if getattr(self, name) is not None]

    @property
    def calibration_lengths(self) -> tuple[int, ...]:
        """Tokens in a calibration sequence, one entry for each length, none above ``calibration_tokens``."""
        asked = self.calibration_length
        length = max(usual_length(self.calibration_tokens), 4 * (self.window or 0)) if asked is None else asked
        lengths = (length,) if isinstance(length, int) else length
        if asked is None and self.is_latent:  # measured: better at both lengths than 2048 alone
            lengths = (512, *lengths)
        return tuple(dict.fromkeys(min(length, self.calibration_tokens) for length in lengths))

    @property
    def needs_calibration(self) -> bool:
        """Whether the model has to be run over text."""
        reads = any(variant.needs(options) for variant, options in self.asked_variants)
        reads = reads or self.fits_context
        return self.is_latent or METHODS.get(self.method).needs_calibration or reads or self.refit or self.fit > 0

    @property
    def fits_context(self) -> bool:
        """Whether the factors of rotary pairs are still to be fitted to text."""
        return any(getattr(options, "rope", None) == "fitted" and options.factors is None  # type: ignore[attr-defined]
                   for _, options in self.asked_variants)  # fmt: skip

    def lengths_within(self, positions: int | None) -> tuple[int, ...]:
        """The calibration lengths of a model that has so many positions; None for any number."""
        return tuple(dict.fromkeys(min(length, positions or length) for length in self.calibration_lengths))

    def as_json(self, calibrated: bool = True, positions: int | None = None) -> dict[str, Any]:
        """For the manifest and ``--json``.

        Calibration options only where they count, never unless ``calibrated``; lengths as the model's ``positions``
        allow them.
        """
        table = super().as_json()
        latents = ("latent", "rope_dims", "kv_cache", "fold_biases", "half_scale", "engine")
        for name in (*_STEPS, *_OF_STEPS, *latents, "variants", "window", "context", "drop_drafts", "own_text"):
            if table[name] in (None, False, [], 0):
                table.pop(name)
        if not (calibrated and self.needs_calibration):
            for name in ("calibration", "calibration_tokens", "calibration_length"):
                table.pop(name)
        else:
            table["calibration"] = table["calibration"] or ["built in"]
            lengths = self.lengths_within(positions)
            table["calibration_length"] = lengths[0] if len(lengths) == 1 else list(lengths)
        return table
