"""What people put on top of transformers: its pipeline, LoRA by PEFT, log-likelihoods by lm_eval.

Runs in Rehead's own environment, which has all three as extras. PEFT trains one step, folds its weights in, and the
folded model has to give what the adapted one gave.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from protocol import serve
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import rehead  # noqa: F401  (its own classes load by their names)

# Projections of attention, by the names that classes use. Not kv_a_proj_with_mqa: a converted latent is stored so small
# that one step of LoRA there drowns it.
TARGETS = r".*(q_proj|k_proj|v_proj|qkv_proj|query_key_value|c_attn|kv_b_proj)"


def handle(job: dict[str, Any]) -> dict[str, Any]:
    """Continue the prompt by the pipeline's model; the other two raise where they disagree."""
    folder, prompt, count = job["model"], job["prompt"], job["new_tokens"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    kind = json.loads((Path(folder) / "config.json").read_text())
    if kind.get("is_encoder_decoder"):
        raise RuntimeError("an encoder-decoder is no text-generation model")
    writer = pipeline("text-generation", model=folder, dtype=torch.float32, device="cpu")
    ids = torch.tensor([prompt])
    generated = writer.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False,
        pad_token_id=0, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    tokens = generated.sequences[0, len(prompt) :].tolist()
    rows = [row[0].log_softmax(-1) for row in generated.logits]
    text = tokenizer.decode(prompt)
    written = writer(text, max_new_tokens=4, do_sample=False, pad_token_id=0)[0]["generated_text"]
    if not written.startswith(text):
        raise RuntimeError("the pipeline did not continue its text")
    notes = [_lm_eval(folder, tokenizer, text), _peft(folder, ids)]
    return {
        "tokens": tokens,
        "logprobs": [float(row[token]) for token, row in zip(tokens, rows, strict=True)],
        "cache_bytes_per_token": None,
        "notes": notes,
    }


def _lm_eval(folder: str, tokenizer: Any, text: str) -> str:
    """lm_eval's log-likelihood of the text's second half must be the model's own."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    # Cut before a space, where tokens end.
    half = text.index(" ", len(text) // 2)
    evaluator = HFLM(pretrained=folder, dtype="float32", device="cpu", batch_size=1, max_length=4096)
    request = Instance(request_type="loglikelihood", doc={}, arguments=(text[:half], text[half:]), idx=0)
    measured = evaluator.loglikelihood([request], disable_tqdm=True)[0][0]
    context, whole = tokenizer(text[:half])["input_ids"], tokenizer(text)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        scores = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    own = sum(float(scores[i - 1, whole[i]]) for i in range(len(context), len(whole)))
    if abs(measured - own) > 1e-3 * abs(own):
        raise RuntimeError(f"lm_eval gives a log-likelihood of {measured:.3f}, the model {own:.3f}")
    return f"lm_eval {version('lm_eval')}: log-likelihood equal"


def _peft(folder: str, ids: torch.Tensor) -> str:
    """One step of LoRA, folded in: the same logits."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before = model(ids).logits.detach()
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM"))
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    adapted(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    adapted.eval()
    with torch.no_grad():
        trained = adapted(ids).logits
        folded = adapted.merge_and_unload()(ids).logits
    if torch.equal(before, trained):
        raise RuntimeError("PEFT's step changed nothing")
    if not torch.allclose(trained, folded, atol=1e-3, rtol=1e-3):
        raise RuntimeError("PEFT's folded weights do not give what the adapted model gave")
    return f"PEFT {version('peft')}: adapted, trained a step, folded in"


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(f"transformers {version('transformers')}", handle)
