"""The registry of pooling methods: one file, one function, one name each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rehead.registry import Registry

if TYPE_CHECKING:
    from rehead.healing.moments import Moments
    from rehead.models.heads import Heads


@dataclass(frozen=True)
class MethodContext:
    """What a method may know beside the weights.

    Attributes:
        layer: index of the layer.
        seed: of the whole conversion.
        moments: what the layer sees on the calibration text; None for methods that need no data.
        initializer_range: the config's standard deviation for new weights.
    """

    layer: int = 0
    seed: int = 0
    moments: Moments | None = None
    initializer_range: float = 0.02


Pool = Callable[["Heads", int, MethodContext], "Heads"]


@dataclass(frozen=True)
class Method:
    """A registered pooling method.

    Attributes:
        name: as in ``--method``.
        pool: (heads, kv, context) -> heads with ``kv`` KV heads. Groups are contiguous and of equal size; weights come
            and go in float32.
        any_dtype: ``pool`` takes weights as the checkpoint has them and gives float32, so that no float32 copy of a
            whole layer is ever made.
        summary: one line for the help.
        needs_calibration: whether ``context.moments`` must be there.
    """

    name: str
    pool: Pool
    summary: str
    needs_calibration: bool
    any_dtype: bool = False


# The modules that register a method when imported; importing them needs torch, naming them does not.
METHOD_MODULES: dict[str, str] = {
    name: f"rehead.variants.pool.methods.{name}" for name in ("mean", "first", "random", "procrustes", "svd")
}
METHODS: Registry[Method] = Registry("method", METHOD_MODULES)


def register(
    name: str, summary: str, needs_calibration: bool = False, any_dtype: bool = False
) -> Callable[[Pool], Pool]:
    """Register the decorated function as a pooling method.

    Raises:
        ValueError: the name is taken.
    """

    def add(pool: Pool) -> Pool:
        METHODS.add(name, Method(name, pool, summary, needs_calibration, any_dtype))
        return pool

    return add
