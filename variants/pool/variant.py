"""The variant ``pool``: query heads share KV heads."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rehead.counts import Count, Seed
from rehead.errors import UsageError
from rehead.models.heads import Heads
from rehead.models.layout import LayerLayout
from rehead.models.model import Model
from rehead.models.rewrite import Rewrite
from rehead.variants.contract import ALL, Variant, VariantOptions, register
from rehead.variants.pool.methods.registry import METHODS, MethodContext
from rehead.variants.pool.regroup import POOL_MOMENTS, regroup
from rehead.variants.pool.rewrite import pool


class PoolOptions(VariantOptions):
    """Options of the variant ``pool``."""

    num_key_value_heads: Count | None = Field(
        None, ge=1, description="KV heads afterwards, a divisor of the model's; as they are when None."
    )
    method: str = Field("mean", description="How heads become one: mean, first, random, procrustes or svd.")
    grouping: Literal["contiguous", "similar"] = Field(
        "contiguous", description="Which heads share: neighbours, or those that are most alike."
    )
    seed: Seed = Field(0, description="Of the heads of random.")


def _rewrite(model: Model, options: PoolOptions) -> Rewrite:
    if options.layers != ALL:
        raise UsageError("--variant pool: every layer has as many KV heads as the others; leave layers out")
    kv = options.num_key_value_heads or model.num_kv_heads
    return pool(model, kv, options.method, options.grouping, options.seed)


def _weights(heads: Heads, options: PoolOptions, moments: object) -> Heads:
    kv = options.num_key_value_heads or heads.num_kv_heads
    context = MethodContext(0, options.seed, moments)  # type: ignore[arg-type]
    return regroup(heads, kv, options.method, options.grouping, context).heads


def _layout(layer: LayerLayout, options: PoolOptions) -> LayerLayout:
    return layer.with_heads(options.num_key_value_heads or layer.num_key_value_heads)


def _library(layer: LayerLayout, context: int) -> list[PoolOptions]:
    kv = layer.num_key_value_heads
    counts = [count for count in range(1, kv) if kv % count == 0]
    return [PoolOptions(num_key_value_heads=count, method="svd") for count in counts]


def _needs(options: PoolOptions) -> tuple[str, ...]:
    return POOL_MOMENTS if METHODS.get(options.method).needs_calibration else ()


VARIANT = register(
    Variant(
        name="pool",
        summary="several query heads share a KV head: grouped-query and multi-query attention",
        source="Ainslie et al. 2023, arXiv 2305.13245; Shazeer 2019, arXiv 1911.02150",
        options=PoolOptions,
        exact=lambda options: False,
        off=lambda options: options.but(num_key_value_heads=None),
        layout=_layout,
        library=_library,
        weights=_weights,
        rewrite=_rewrite,
        needs=_needs,
    )
)
