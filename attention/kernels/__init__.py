"""GPU attention kernels: exact tiled attention, forward, backward and decode, in Triton and Gluon.

Importing this package needs no Triton and no GPU; :func:`supported` says why a call could not run here,
and :func:`slow_path` why one does not get the Hopper kernels.
"""

from rehead.attention.kernels.api import (
    attention,
    decode,
    decode_call,
    run,
    slow_path,
    supported,
    unavailable,
    unsupported,
)

__all__ = ["attention", "decode", "decode_call", "run", "slow_path", "supported", "unavailable", "unsupported"]
