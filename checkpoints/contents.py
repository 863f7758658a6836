"""What a checkpoint's own files say: its config, which weight files count, and which tensors they hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from rehead.checkpoints.safetensors_io import Header, TensorInfo, loads_strict, parse_index, shown
from rehead.errors import UnsupportedError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILE = "adapter_config.json"
MAX_CONFIG_BYTES = 32_000_000

#: What to do about checkpoints in other formats, by a file name's ending.
_OTHER_FORMATS = (
    (".gguf", "GGUF", "convert from the original safetensors repository instead"),
    (".h5", "TensorFlow", "save it from transformers as safetensors first"),
    (".msgpack", "Flax", "save it from transformers as safetensors first"),
)
#: Keys of a config that record which kernels somebody ran the model with; they say nothing about the model.
_PREFERENCES = frozenset(
    f"{prefix}{part}_implementation{suffix}"
    for part in ("attn", "experts")
    for prefix in ("", "_")
    for suffix in ("", "_internal", "_autoset")
)
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


def parse_config(raw: bytes, file: str) -> dict[str, Any]:
    """Parse a ``config.json``.

    Raises:
        UnsupportedError: it is not a JSON object, or unreasonably large.
    """
    if len(raw) > MAX_CONFIG_BYTES:
        raise UnsupportedError(f"{file}: larger than {MAX_CONFIG_BYTES} bytes; that is not a model configuration")
    try:
        config = loads_strict(raw, file)
    except UnsupportedError as error:
        try:
            config = json.loads(raw.decode("utf-8"))  # transformers writes Infinity, and older tools wrote keys twice
        except (ValueError, RecursionError):
            raise error from None
    if not isinstance(config, dict):
        raise UnsupportedError(f"{file}: no JSON object; give a transformers checkpoint")
    return _without_preferences(config)


def _without_preferences(config: dict[str, Any]) -> dict[str, Any]:
    """A config without its kernel choices (:data:`_PREFERENCES`), nested configs included."""
    return {
        key: _without_preferences(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _PREFERENCES
    }


def pick_layout(names: set[str], id: str) -> str:
    """The weight file that transformers would load: ``model.safetensors`` or its index.

    Raises:
        UnsupportedError: there are no safetensors weights; the message says what to do with other formats.
    """
    for known in (SINGLE_FILE, INDEX_FILE):
        if known in names:
            if ADAPTER_FILE in names:
                raise UnsupportedError(
                    f"{id}: has {ADAPTER_FILE} beside {known}, and transformers would apply that adapter to what it "
                    f"loads; where it is merged already, delete {ADAPTER_FILE}, else save the merged model elsewhere"
                )
            return known
    if "adapter_model.safetensors" in names or ADAPTER_FILE in names:
        raise UnsupportedError(
            f"{id}: is an adapter, not a model; merge it into its base model first (merge_and_unload)"
        )
    others = sorted(n for n in names if n.endswith(".safetensors"))
    if others:
        raise UnsupportedError(
            f"{id}: has {others[0]} but neither {SINGLE_FILE} nor {INDEX_FILE}; save it with save_pretrained first"
        )
    pickles = sorted(n for n in names if n.endswith(_PICKLE_SUFFIXES) and n != "training_args.bin")
    if pickles:
        raise UnsupportedError(
            f"{id}: has only pickled weights ({pickles[0]}), which can run code when loaded; if you trust them, save "
            "them as safetensors with AutoModelForCausalLM.from_pretrained(...).save_pretrained(FOLDER) and give FOLDER"
        )
    for suffix, kind, remedy in _OTHER_FORMATS:
        if any(n.endswith(suffix) for n in names):
            raise UnsupportedError(f"{id}: has only {kind} weights; {remedy}")
    raise UnsupportedError(f"{id}: has no weights; it needs {SINGLE_FILE} or {INDEX_FILE}")


def gather(
    index: bytes | None, id: str, header_of: Callable[[str], Header]
) -> tuple[list[str], dict[str, TensorInfo], dict[str, str]]:
    """Shards, tensors and metadata of a checkpoint from its index (None: a single file) and its shards' headers.

    Args:
        index: the index file's bytes.
        id: the checkpoint, for messages.
        header_of: reads the header of a shard.

    Raises:
        UnsupportedError: the index names a tensor that its shard does not hold, or two shards hold one unlisted tensor.
    """
    if index is None:
        header = header_of(SINGLE_FILE)
        return [SINGLE_FILE], {t.name: t for t in header.tensors}, header.metadata
    weight_map = parse_index(index, INDEX_FILE)
    shards = sorted(set(weight_map.values()))
    headers = {shard: header_of(shard) for shard in shards}
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        for t in headers[shard].tensors:
            listed = weight_map.get(t.name, None if t.name not in tensors else tensors[t.name].file)
            if listed is None:
                tensors[t.name] = t  # transformers loads what a shard holds, listed or not
            elif listed == shard:
                tensors[t.name] = t
            elif t.name not in weight_map:
                raise UnsupportedError(
                    f"{id}: tensor {shown(t.name)} is in both {listed} and {shard}, and not in the index; "
                    "save the checkpoint again"
                )
    for name, shard in weight_map.items():
        if name not in tensors:
            raise UnsupportedError(
                f"{INDEX_FILE}: tensor {shown(name)} is not in {shown(shard)}, where the index says it is; "
                "fetch the checkpoint again"
            )
    return shards, tensors, headers[shards[0]].metadata
