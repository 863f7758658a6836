"""What latent attention can be told."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, model_validator

from rehead.counts import Count
from rehead.errors import UsageError
from rehead.variants.contract import ALL, AUTO, VariantOptions

#: Engines that ask for more than the class does.
ENGINES = ("llama.cpp", "vllm")


class LatentOptions(VariantOptions):
    """The sizes of the latent and the class that holds it."""

    rank: Count | None = Field(None, ge=1, description="Numbers of the latent per token and layer.")
    rope_dims: Count | None = Field(
        None, ge=2, description="Numbers of the rotated key that all heads share; even. The text decides by default."
    )
    kv_cache: str | None = Field(
        None, description="Size of the cache instead of the rank: 33% of the model's, or numbers per token and layer."
    )
    fold_biases: bool = Field(
        False, description="Put biases of queries, keys and values into the weights, nearly the same: for engines."
    )
    half_scale: bool = Field(
        False, description="With float16: store latents at a scale that it holds, which is off by about a hundredth."
    )
    host: Literal["deepseek_v3", "youtu"] = Field("deepseek_v3", description="Class that the result is written as.")
    engine: Literal["llama.cpp", "vllm"] | None = Field(
        None, description="Engine that has to serve the result: llama.cpp wants queries in two factors, vllm the head."
    )

    @model_validator(mode="after")
    def _consistent(self) -> LatentOptions:
        if self.rank is not None and self.kv_cache is not None:
            raise UsageError("--latent: its size is also given by --kv-cache; give one of them")
        if self.rank is not None and self.rank % 2:
            raise UsageError(f"--latent {self.rank}: engines take even ranks only; give an even number")
        if self.rope_dims is not None and self.rope_dims % 2:
            raise UsageError(f"--rope-dims {self.rope_dims}: rotary dimensions come in pairs; give an even number")
        if self.kv_cache is not None:
            cache_numbers(self.kv_cache, 100)
        if self.layers == AUTO:
            raise UsageError("latent: layers=auto is for live models; name the layers, or leave them to --kv-cache")
        if self.layers != ALL and (self.rank is None or self.rope_dims is None):
            raise UsageError("latent: beside other layers its sizes must be said; give rank=R,rope_dims=D")
        return self


def cache_numbers(size: str, numbers: int) -> int:
    """Numbers per token and layer of a cache given as ``"33%"`` of ``numbers``, rounded down to even, or as such.

    Raises:
        UsageError: it is neither, or no smaller cache.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%?)\s*", size)
    if match is None:
        raise UsageError(f"--kv-cache {size}: write a share such as 33%, or numbers per token and layer such as 128")
    if match[2]:
        share = float(match[1])
        if not 0 < share < 100:
            raise UsageError(f"--kv-cache {size}: must be above 0% and below 100%")
        return int(numbers * share / 100) // 2 * 2
    return int(float(match[1]))
