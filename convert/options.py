"""The options of a conversion: one object behind the API's arguments, the CLI's flags and the manifest."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rehead.convert.methods.registry import get_method
from rehead.convert.shards import parse_size
from rehead.errors import UsageError, unknown_name

GROUPINGS = ("contiguous", "similar")
REINVESTMENTS = ("ffn", "hidden")
_STEPS = ("host", "reinvest")
_OF_STEPS = {"multiple_of": "reinvest"}
DTYPES = {"auto": None, "float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class ConvertOptions:
    """What a conversion is asked to do.

    Attributes:
        num_key_value_heads: KV heads after the conversion; None leaves them as they are, for another step alone.
        method: a registered pooling method.
        grouping: ``"contiguous"``, or ``"similar"`` to choose which heads share a KV head.
        calibration: texts to calibrate on: files or Hub datasets; the text that ships with Rehead when empty.
        calibration_tokens: tokens to calibrate on.
        calibration_length: tokens in one calibration sequence.
        refit: refit queries, keys, values and the output projection by least squares after pooling.
        fit: optimiser steps for each layer after the refit; 0 for none.
        dtype: of the converted floating-point weights; ``"auto"`` keeps them.
        max_shard_size: bytes in one weight file, or text such as ``"5GB"``.
        seed: of everything that is drawn.
        host: model type under which the result is written, ``"auto"`` to choose it; None for the model's own unless its
            class cannot hold the result.
        reinvest: ``"ffn"`` or ``"hidden"``: widen the model by what shared KV heads free.
        multiple_of: what the new width must be a multiple of; 128 when None.
    """

    num_key_value_heads: int | None = None
    method: str = "mean"
    grouping: str = "contiguous"
    calibration: tuple[str, ...] = ()
    calibration_tokens: int = 131072
    calibration_length: int = 512
    refit: bool = False
    fit: int = 0
    dtype: str = "auto"
    max_shard_size: int | str = "5GB"
    seed: int = 0
    host: str | None = None
    reinvest: str | None = None
    multiple_of: int | None = None

    def __post_init__(self) -> None:
        get_method(self.method)
        if self.grouping not in GROUPINGS:
            raise UsageError(unknown_name("grouping", self.grouping, GROUPINGS))
        if self.dtype not in DTYPES:
            raise UsageError(unknown_name("dtype", self.dtype, DTYPES))
        if self.num_key_value_heads is None and not self.steps:
            raise UsageError("nothing to do; say --kv-heads N, or --host for another class with the same heads")
        if self.reinvest is not None and self.reinvest not in REINVESTMENTS:
            raise UsageError(unknown_name("reinvestment", self.reinvest, REINVESTMENTS))
        if self.reinvest is not None and self.num_key_value_heads is None:
            raise UsageError(f"--reinvest {self.reinvest}: nothing is freed while the KV heads stay; give --kv-heads N")
        if self.multiple_of is not None and self.multiple_of < 1:
            raise UsageError(f"--multiple-of {self.multiple_of}: must be 1 or more")
        for option, step in _OF_STEPS.items():
            if getattr(self, option) is not None and getattr(self, step) is None:
                flag = option.replace("_", "-")
                raise UsageError(f"--{flag}: says nothing without --{step}; give both or leave it out")
        if self.num_key_value_heads is not None and self.num_key_value_heads < 1:
            raise UsageError(f"--kv-heads {self.num_key_value_heads}: must be 1 or more")
        if self.fit < 0:
            raise UsageError(f"--fit {self.fit}: must be 0 or more steps")
        if self.calibration_length < 16:
            raise UsageError(f"--calibration-length {self.calibration_length}: must be 16 or more tokens")
        if self.calibration_tokens < self.calibration_length:
            raise UsageError(
                f"--calibration-tokens {self.calibration_tokens}: must be at least one sequence of "
                f"{self.calibration_length}"
            )
        parse_size(self.max_shard_size)

    @property
    def steps(self) -> list[str]:
        """Which steps besides pooling are asked for, by the names of their options."""
        return [name for name in _STEPS if getattr(self, name) is not None]

    @property
    def needs_calibration(self) -> bool:
        """Whether the model has to be run over text."""
        return get_method(self.method).needs_calibration or self.refit or self.fit > 0

    def as_json(self) -> dict[str, Any]:
        """For the manifest and ``--json``; calibration options only where they count."""
        table = asdict(self)
        for name in (*_STEPS, *_OF_STEPS):
            if table[name] is None:
                table.pop(name)
        if not self.needs_calibration:
            for name in ("calibration", "calibration_tokens", "calibration_length"):
                table.pop(name)
        else:
            table["calibration"] = list(self.calibration) or ["built in"]
        return table
