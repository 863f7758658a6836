"""The variant ``context``: a longer context by slower rotary pairs, or by none (DroPE)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rehead.variants.context.options import SHORT_EXACT, ContextOptions
from rehead.variants.contract import Variant, register

if TYPE_CHECKING:
    from torch import nn

    from rehead.models.live import LayerState
    from rehead.models.model import Model
    from rehead.models.rewrite import Rewrite
    from rehead.models.undo import UndoLog


def _rewrite(model: Model, options: ContextOptions) -> Rewrite:
    from rehead.variants.context.rewrite import context_rewrite

    return context_rewrite(model, options)


def _host(model: Model, options: ContextOptions, hosts: Sequence[str]) -> str | None:
    from rehead.variants.context.classes import host_of

    return host_of(model, options, hosts)


def _redirect(
    model: nn.Module, options: ContextOptions, asked: set[int] | None, undo: UndoLog, memory: dict[str, Any]
) -> list[LayerState]:
    from rehead.variants.context.live import redirect

    return redirect(model, options, asked, undo, memory)


VARIANT = register(
    Variant(
        name="context",
        summary="reads tokens= tokens by other rotary frequencies, or none (approximate)",
        source="Peng et al. 2023, arXiv 2309.00071 (YaRN); arXiv 2402.13753 (LongRoPE); arXiv 2512.12167 (DroPE)",
        options=ContextOptions,
        exact=lambda options: False,
        off=lambda options: options,
        redirect=_redirect,
        rewrite=_rewrite,
        host=_host,
        reach=lambda options: (options.trained or 0) if options.rope in SHORT_EXACT else 0,
        longer=True,
    )
)
