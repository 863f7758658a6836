"""GPU attention kernels: exact tiled attention, forward, backward and decode, in Triton and Gluon.

Importing this package needs no Triton and no GPU; :func:`supported` says why a call could not run here.
"""

from rehead.patches.kernels.api import attention, supported, unavailable
from rehead.patches.kernels.decode import decode

__all__ = ["attention", "decode", "supported", "unavailable"]
