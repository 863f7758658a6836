"""OpenVINO through optimum-intel: exported from the folder, compiled for the CPU in float32."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import openvino
import torch
from optimum.intel import OVModelForCausalLM
from protocol import serve
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401  (loaded once, before jobs are forked)

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "INFERENCE_NUM_THREADS": "1"}


def handle(job: dict[str, Any]) -> dict[str, Any]:
    """Continue the prompt greedily."""
    model = OVModelForCausalLM.from_pretrained(job["model"], export=True, ov_config=EXACT, load_in_8bit=False)
    ids = torch.tensor([job["prompt"]])
    count = job["new_tokens"]
    with torch.no_grad():
        answer = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False,
            num_beams=1, output_logits=True, return_dict_in_generate=True, pad_token_id=0,
        )  # fmt: skip
    tokens = answer.sequences[0, len(job["prompt"]) :].tolist()
    rows = [row[0].float().log_softmax(-1) for row in answer.logits]
    return {
        "tokens": tokens,
        "logprobs": [float(row[token]) for token, row in zip(tokens, rows, strict=True)],
        "cache_bytes_per_token": _cache_bytes(model, len(job["prompt"]) + count - 1),
        "notes": [],
    }


def _cache_bytes(model: Any, length: int) -> float | None:
    """Bytes per token of the state that the compiled model holds after the run."""
    request = getattr(model, "request", None)
    if request is None:
        return None
    request = request if hasattr(request, "query_state") else request.create_infer_request()
    states = [state.state for state in request.query_state()]
    held = sum(state.byte_size for state in states if length in tuple(state.shape))
    return held / length if held else None


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(f"{openvino.__version__.split('-')[0]} (optimum-intel {version('optimum-intel')})", handle)
