"""Convert checkpoints to fewer KV heads: checkpoint in, plain checkpoint out, a layer at a time.

::

    from rehead.convert import convert, inspect, plan, verify

    inspect("meta-llama/Llama-2-7b-hf")["kv_bytes_per_token"]
    convert("meta-llama/Llama-2-7b-hf", "llama-2-7b-gqa8", num_key_value_heads=8, method="svd", refit=True)
    verify("llama-2-7b-gqa8")
"""

from __future__ import annotations

from rehead.lazy import exports

_EXPORTS = {
    "convert": "rehead.convert.execute",
    "convert_many": "rehead.convert.many",
    "plan": "rehead.convert.execute",
    "inspect": "rehead.convert.inspection",
    "verify": "rehead.convert.verification",
    "open_model": "rehead.models.model",
    "open_source": "rehead.checkpoints.opening",
    "verify_files": "rehead.checkpoints.manifest",
    "register": "rehead.variants.pool.methods.registry",
}

__all__ = list(_EXPORTS)
__getattr__ = exports(__name__, _EXPORTS)
