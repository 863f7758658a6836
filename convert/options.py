"""The options of a conversion: one object behind the API's arguments, the CLI's flags and the manifest."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rehead.checkpoints.shards import parse_size
from rehead.errors import UsageError, unknown_name
from rehead.variants.blocks.layer_choice import AUTO, is_auto
from rehead.variants.pool.methods.registry import get_method

GROUPINGS = ("contiguous", "similar")
REINVESTMENTS = ("ffn", "hidden")
BLOCKS = ("parallel", "serial")
_STEPS = ("host", "reinvest", "block")
_OF_STEPS = {"multiple_of": "reinvest", "layers": "block", "kl_budget": "block", "plain": "block"}
DTYPES = {"auto": None, "float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def usual_length(tokens: int) -> int:
    """Tokens in a calibration sequence by default: 2048, halved down to 512 until ``tokens`` make 16 of them.

    Long sequences heal long contexts, but a refit on a handful of excerpts learns the excerpts.
    """
    length = 2048
    while length > 512 and tokens // length < 16:
        length //= 2
    return length


@dataclass(frozen=True)
class ConvertOptions:
    """What a conversion is asked to do.

    Attributes:
        num_key_value_heads: KV heads after the conversion; None leaves them as they are, for another step alone.
        method: a registered pooling method.
        grouping: ``"contiguous"``, or ``"similar"`` to choose which heads share a KV head.
        calibration: texts to calibrate on: files or Hub datasets; the text that ships with Rehead when empty.
        calibration_tokens: tokens to calibrate on.
        calibration_length: tokens in one calibration sequence; None for :func:`usual_length`. Several lengths share the
            tokens equally, so that both short and long contexts are calibrated on. One beyond the model's positions or
            ``calibration_tokens`` is cut to them; of several, one that its share does not fill once is left out.
        refit: refit queries, keys, values and the output projection by least squares after pooling.
        fit: optimiser steps for each layer after the refit; 0 for none.
        dtype: of the converted floating-point weights; ``"auto"`` keeps them.
        max_shard_size: bytes in one weight file, or text such as ``"5GB"``.
        seed: of everything that is drawn.
        host: model type under which the result is written, ``"auto"`` to choose it; None for the model's own unless its
            class cannot hold the result.
        reinvest: ``"ffn"`` or ``"hidden"``: widen the model by what shared KV heads free.
        multiple_of: what the new width must be a multiple of; 128 when None.
        block: ``"parallel"`` or ``"serial"``: the form that blocks are given.
        layers: of ``block``: ``"all"`` (also None), a list such as ``"0,4-7"``, indices, or those that lose least:
            ``"auto"`` up to ``kl_budget``, ``"auto:6"`` or ``"auto:50%"`` up to a number.
        kl_budget: of ``layers="auto"``: nats a token that the changed blocks may cost.
        plain: refuse a block form that transformers' own class cannot express.
    """

    num_key_value_heads: int | None = None
    method: str = "mean"
    grouping: str = "contiguous"
    calibration: tuple[str, ...] = ()
    calibration_tokens: int = 131072
    calibration_length: int | tuple[int, ...] | None = None
    refit: bool = False
    fit: int = 0
    dtype: str = "auto"
    max_shard_size: int | str = "5GB"
    seed: int = 0
    host: str | None = None
    reinvest: str | None = None
    multiple_of: int | None = None
    block: str | None = None
    layers: str | tuple[int, ...] | None = None
    kl_budget: float | None = None
    plain: bool = False

    def __post_init__(self) -> None:
        get_method(self.method)
        for kind, name, known in (
            ("grouping", self.grouping, GROUPINGS),
            ("dtype", self.dtype, DTYPES),
            ("reinvestment", self.reinvest, REINVESTMENTS),
            ("block form", self.block, BLOCKS),
        ):
            if name is not None and name not in known:
                raise UsageError(unknown_name(kind, name, known))
        self._check_steps()
        if self.num_key_value_heads is not None and self.num_key_value_heads < 1:
            raise UsageError(f"--kv-heads {self.num_key_value_heads}: must be 1 or more")
        if self.fit < 0:
            raise UsageError(f"--fit {self.fit}: must be 0 or more steps")
        if self.calibration_tokens < 16:
            raise UsageError(f"--calibration-tokens {self.calibration_tokens}: must be 16 or more")
        if not self.calibration_lengths:
            raise UsageError("--calibration-length: is empty; give tokens in a sequence, such as 2048 or 512,2048")
        for length in self.calibration_lengths:
            if length < 16:
                raise UsageError(f"--calibration-length {length}: must be 16 or more tokens")
        parse_size(self.max_shard_size)

    def _check_steps(self) -> None:
        """Options that only mean something together."""
        if self.num_key_value_heads is None:
            if self.reinvest is not None:
                raise UsageError(
                    f"--reinvest {self.reinvest}: nothing is freed while the KV heads stay; give --kv-heads"
                )
            if not self.steps:
                raise UsageError(
                    "nothing to do; say --kv-heads N, --block FORM, or --host for another class with the same heads"
                )
            if (self.refit or self.fit) and self.block is None:
                raise UsageError("--refit: heals shared KV heads or changed blocks; give --kv-heads or --block")
        for option, step in _OF_STEPS.items():
            if getattr(self, option) not in (None, False) and getattr(self, step) is None:
                flag = option.replace("_", "-")
                raise UsageError(f"--{flag}: says nothing without --{step}; give both or leave it out")
        if self.multiple_of is not None and self.multiple_of < 1:
            raise UsageError(f"--multiple-of {self.multiple_of}: must be 1 or more")
        if self.kl_budget is not None and not is_auto(self.layers):
            raise UsageError("--kl-budget NATS: limits --layers auto; give both, or name the layers")
        if self.layers == AUTO and self.kl_budget is None:
            raise UsageError(
                "--layers auto: needs a limit; give --kl-budget NATS, or a number as in auto:6 or auto:50%"
            )
        if self.kl_budget is not None and not self.kl_budget > 0:
            raise UsageError(f"--kl-budget {self.kl_budget:g}: must be more than 0 nats")

    @property
    def steps(self) -> list[str]:
        """Which steps besides pooling are asked for, by the names of their options."""
        return [name for name in _STEPS if getattr(self, name) is not None]

    @property
    def calibration_lengths(self) -> tuple[int, ...]:
        """Tokens in a calibration sequence, one entry for each length, none above ``calibration_tokens``."""
        given = self.calibration_length
        length = usual_length(self.calibration_tokens) if given is None else given
        lengths = (length,) if isinstance(length, int) else tuple(length)
        return tuple(dict.fromkeys(min(length, self.calibration_tokens) for length in lengths))

    @property
    def needs_calibration(self) -> bool:
        """Whether the model has to be run over text."""
        return get_method(self.method).needs_calibration or self.refit or self.fit > 0

    def lengths_within(self, positions: int | None) -> tuple[int, ...]:
        """The calibration lengths of a model that has so many positions; None for any number."""
        return tuple(dict.fromkeys(min(length, positions or length) for length in self.calibration_lengths))

    def as_json(self, calibrated: bool = True, positions: int | None = None) -> dict[str, Any]:
        """For the manifest and ``--json``.

        Calibration options only where they count, never unless ``calibrated``; lengths as the model's ``positions``
        allow them.
        """
        table = asdict(self)
        for name in (*_STEPS, *_OF_STEPS):
            if table[name] in (None, False):
                table.pop(name)
        if not (calibrated and self.needs_calibration):
            for name in ("calibration", "calibration_tokens", "calibration_length"):
                table.pop(name)
        else:
            table["calibration"] = list(self.calibration) or ["built in"]
            lengths = self.lengths_within(positions)
            table["calibration_length"] = lengths[0] if len(lengths) == 1 else list(lengths)
        return table
