"""Steps of a plan whose layers are computed over calibration text: what can be, and which tensors that takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rehead.errors import UnsupportedError
from rehead.models.model import Model
from rehead.models.rewrite import Rewrite

#: Where classes whose blocks can change keep the FFN's output matrix.
_FFN_WRITERS = ("mlp.down_proj", "mlp.dense_4h_to_h", "mlp.c_proj", "mlp.fc2")


def check_calibrated(model: Model, rewrites: Sequence[Rewrite]) -> None:
    """Refuse layers that cannot be compared with the original's."""
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedError(
            f"{model.config.model_type}: an encoder-decoder cannot be calibrated layer by layer; use --method mean, "
            "first, random or procrustes without --refit and --fit"
        )
    if any(not before.exact for before in model.rewrites) and any(before.by_layer for before in model.rewrites):
        raise UnsupportedError(
            f"{model.source.id}: changing its blocks rewrites its attention too, which cannot be calibrated against "
            "the original in the same run; convert the result in a second run"
        )
    for at, rewrite in enumerate(rewrites):
        calibrated = rewrite.calibrated or rewrite.form is None
        check_once(model, rewrites[:at], rewrite.name, set(rewrite.layers), calibrated)


def check_once(model: Model, before: Sequence[Rewrite], name: str, layers: set[int], calibrated: bool) -> None:
    """Refuse a step that is calibrated in a layer that another step changes too."""
    again = [rewrite.name for rewrite in before if not layers.isdisjoint(rewrite.layers)]
    if again and calibrated:
        raise UnsupportedError(
            f"{model.source.id}: {name} cannot be calibrated after {again[0]} in the same run; convert the result in a "
            "second run"
        )


def computed_over_text(model: Model, rewrite: Rewrite, recovers: bool, refits: bool) -> Rewrite:
    """A Rewrite whose layers are computed over calibration text; every projection of them where they recover there, and
    the writers of its form where they are refitted."""
    tensors = dict(rewrite.tensors)
    writers = rewrite.form.writers if rewrite.form is not None and refits else ()
    for layer in rewrite.layers if recovers else ():
        stem = model.family.layer.format(i=layer)
        written = [f"{stem}{writer}.{part}" for writer in writers for part in ("weight", "bias")]
        for tensor in (*model.layer_tensors(layer), *written):
            if tensor in tensors:
                tensors[tensor] = replace(tensors[tensor], layer=layer)
    return replace(rewrite, tensors=tensors, step=None)


def with_refit(model: Model, rewrite: Rewrite, layers: set[int]) -> Rewrite:
    """A Rewrite that also refits what writes to the residual stream in layers whose blocks changed before."""
    tensors = dict(rewrite.tensors)
    for layer in sorted(layers):
        writer = ffn_writer(model, layer)
        if writer is None:
            raise UnsupportedError(
                f"{model.source.id}: layer {layer} has no single FFN output matrix (a mixture of experts, say), which "
                "--refit would fit; leave --refit out"
            )
        output = model.family.prefix(layer) + model.family.names.output
        for stem in (output, model.family.layer.format(i=layer) + writer):
            for tensor in (f"{stem}.weight", f"{stem}.bias"):
                if tensor in tensors:
                    tensors[tensor] = replace(tensors[tensor], layer=layer)
    return replace(rewrite, tensors=tensors)


def ffn_writer(model: Model, layer: int) -> str | None:
    """The FFN's output matrix below a layer's prefix, without ``.weight``; None where there is no single one."""
    prefix = model.family.layer.format(i=layer)
    return next((stem for stem in _FFN_WRITERS if f"{prefix}{stem}.weight" in model.source.tensors), None)
