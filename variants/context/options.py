"""The options of the variant ``context``; no torch needed."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from rehead.counts import Length
from rehead.errors import UsageError
from rehead.models.serving import EngineName
from rehead.options import SPLIT
from rehead.variants.contract import VariantOptions

Rope = Literal["linear", "dynamic", "ntk", "yarn", "longrope", "fitted", "drope"]
ROPES: tuple[str, ...] = get_args(Rope)
SHORT_EXACT = ("dynamic", "longrope", "fitted")
"""Kinds under which texts up to the original length are computed as before, bit for bit."""


class ContextOptions(VariantOptions):
    """Options of the variant ``context``."""

    tokens: Length = Field(32768, ge=1, description="Tokens that the model is to read.")
    rope: Rope = Field("yarn", description="How rotary pairs are slowed down.")
    trained: Length | None = Field(
        None, ge=1, description="Tokens that it was trained to read; max_position_embeddings by default."
    )
    factors: Annotated[tuple[float, ...] | None, SPLIT] = Field(
        None, description="Of longrope and fitted: how much slower each rotary pair turns in long texts."
    )
    engine: EngineName | None = Field(
        None, description="Whose config keys are written beside transformers' own: vllm reads others for longrope."
    )
    table: Literal["interpolate", "repeat"] = Field(
        "interpolate",
        description="How a table of learned positions grows: its rows spread out, or said again behind the old ones, "
        "which leaves short texts as they are; uptrain the result.",
    )

    @model_validator(mode="after")
    def _factors_are_read(self) -> ContextOptions:
        if self.factors and self.rope not in ("longrope", "fitted"):
            raise UsageError(f"--rope-factors: --rope {self.rope} has factors of its own; give --rope longrope")
        return self
