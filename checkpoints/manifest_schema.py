"""The schema of ``rehead.json``, for the current version and all earlier ones.

Fields have been added over time, so most may be missing; unknown fields are kept.
"""

from __future__ import annotations

from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

T = TypeVar("T")

FORMAT = 1


class _Section(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, frozen=True)


class BeforeAfter(_Section, Generic[T]):
    """A value in the source and in the result."""

    before: T
    after: T


class Tool(_Section):
    """The program that wrote the manifest."""

    name: str
    version: str


class FileEntry(_Section):
    """One file of the folder."""

    size: int = Field(ge=0, description="Bytes.")
    sha256: str


class Manifest(_Section):
    """What a conversion or an uptraining did, and the size and SHA-256 of every file that it wrote.

    Attributes:
        command: the command line or Python call.
        source: the folder or Hub id that was converted, at ``revision``.
        model_type: the source's type.
        layout, host, block, reinvest, variants, latent: steps besides pooling, where there were any.
        kv_bytes_per_token: KV-cache bytes that each token adds over all layers while no window is full.
        cache_bytes: bytes of the whole cache by context, since version 0.2.
        exact: the result computes the same function as the source; ``rounded``: up to rounding in 16 bits.
        calibration: the calibration text, or nothing.
        layers: groups and errors by layer.
        changed_tensors: tensors whose values differ from the source's.
        conversion, uptraining, uptraining_before: only for an uptrained checkpoint.
        fingerprint: hash of everything that determines the output; ``fingerprint_parts``: of each named part of it.
    """

    format: Literal[1]
    tool: Tool | None = None
    versions: dict[str, str] = {}
    command: str | None = None
    source: str | None = None
    revision: str | None = None
    model_type: str | None = None
    layout: BeforeAfter[str] | None = None
    host: BeforeAfter[str] | None = None
    block: dict[str, Any] | None = None
    reinvest: dict[str, Any] | None = None
    variants: dict[str, dict[str, Any]] | None = None
    latent: dict[str, Any] | None = None
    num_attention_heads: int | None = None
    head_dim: int | None = None
    num_key_value_heads: BeforeAfter[int] | None = None
    kv_bytes_per_token: BeforeAfter[int] | None = None
    cache_bytes: BeforeAfter[dict[str, int]] | None = None
    parameters: BeforeAfter[int] | None = None
    exact: bool | None = None
    rounded: bool | None = None
    engines: dict[str, list[str]] | None = None
    quality: dict[str, Any] | None = None
    options: dict[str, Any] | None = None
    config_changes: dict[str, BeforeAfter[Any]] = {}
    calibration: dict[str, Any] | None = None
    layers: dict[str, dict[str, Any]] = {}
    changed_tensors: list[str] = []
    conversion: dict[str, Any] | None = None
    uptraining: dict[str, Any] | None = None
    uptraining_before: dict[str, Any] | None = None
    fingerprint: str | None = None
    fingerprint_parts: dict[str, str] = {}
    files: dict[str, FileEntry]


def broken_field(table: Any) -> str | None:
    """The first invalid field of a manifest and the reason, as one line; None if all are valid."""
    try:
        Manifest.model_validate(table)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return None
