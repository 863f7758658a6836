"""What the curve and a budget can be told; stated once, and without importing torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from rehead.counts import Count, Held, Length, Seed
from rehead.models.serving import EngineName
from rehead.options import Flag, Names, Options

Context = Annotated[
    Length | None,
    Flag(metavar="N", default="the model's positions, 8192 at most"),
    Field(ge=1, description="Tokens at which caches are compared; a window saves more the longer they are."),
]
Tokens = Annotated[
    Held | None,
    Flag(metavar="N", default="8192, on a CPU 4096"),
    Field(ge=512, description="Tokens of running text that choices are measured on."),
]
Engine = Annotated[
    EngineName | None,
    Flag("--for", default="any"),
    Field(description="Offer what this engine has been seen to serve."),
]


class SurveyOptions(Options):
    """What a survey of a model's options is told."""

    context: Context = None
    calibration: Annotated[Names, Flag(metavar="TEXT", default="the text that ships with Rehead")] = Field(
        (), description="Text to calibrate and measure on; repeat for more."
    )
    calibration_tokens: Annotated[Held | None, Flag(metavar="N", default="32768, on a CPU 16384")] = Field(
        None, ge=1024, description="Tokens that closed forms are calibrated on."
    )
    tokens: Tokens = None
    seed: Seed = Field(0, description="Of excerpts, probes and what is drawn from the model.")


class CurveOptions(SurveyOptions):
    """What ``rehead curve`` is told."""

    engine: Engine = None
    measure: bool = Field(True, description="Measure three sizes, each beside one form in all layers.")
    decode_batch: Annotated[Count | None, Flag(metavar="N")] = Field(
        None, ge=1, description="Also time attention in one step of decoding N sequences, on this device."
    )


class BudgetOptions(Options):
    """What a budget for the cache is told besides its size."""

    kl: Annotated[float | None, Flag(metavar="NATS")] = Field(
        None, gt=0, description="The smallest cache that loses at most this per token; with --kv-cache, a gate."
    )
    context: Context = None
    tokens: Tokens = None
