"""Shows that a change of the code leaves what it computes as it was, byte for byte.

It converts a tiny random model of every supported architecture in many ways, runs patched models, and records a SHA-256
of every tensor written and of all logits. ``check`` does the same again and names what differs. Same bytes are to be
expected from the same machine and the same versions of torch and transformers only. Only Rehead's public functions are
used, so that the file works before and after a restructuring of the rest.

    python -m rehead.benchmarks.unchanged record before.json
    python -m rehead.benchmarks.unchanged check before.json           # exit code 4 if anything differs
    python -m rehead.benchmarks.unchanged check before.json --only blocks/
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from rehead.benchmarks.toy_models import VARIANTS, VOCAB, build, known
from rehead.convert import convert
from rehead.errors import ReheadError
from rehead.patches import patch_model

LENGTH = 300
"""Tokens of a sequence for patched models; more than one tile of the CPU kernels."""

FEWER: dict[str, Any] = {"num_key_value_heads": "fewer"}
"""Two KV heads where the model's class can hold that number, else one."""

TEXT = {"calibration": ["random"], "calibration_tokens": 1024, "calibration_length": 32}
SVD = {**FEWER, "method": "svd", **TEXT}
REFIT = {**SVD, "refit": True}
FIT = {**REFIT, "fit": 5}
WIDER = {**FEWER, "multiple_of": 8}
PARALLEL, SERIAL = {"block": "parallel"}, {"block": "serial"}
REFITTED = {"refit": True, **TEXT}

HOSTS = {
    "gpt_neox": "phi", "gptj": "phi", "codegen": "phi", "gpt_neox-full": "starcoder2", "gpt_neox-serial": "nemotron",
    "gpt2": "gpt_bigcode", "opt": "gpt_bigcode", "biogpt": "gpt_bigcode", "xglm": "gpt_bigcode",
}  # fmt: skip
CARRIED = ("llama", "mistral", "qwen2", "qwen3", "granite", "starcoder2")
SWITCHED = ("gpt_neox-serial", "falcon-rw", "stablelm")
WIDENED = {
    "ffn": ("llama", "qwen3", "gemma2", "phi3", "glm", "starcoder2", "falcon", "gpt_neox", "gpt2"),
    "hidden": ("llama", "qwen2", "qwen3", "gemma", "gemma3_text", "phi3", "granite", "olmo2"),
}
METHODS: dict[str, dict[str, Any]] = {
    "mean": FEWER,
    "svd": SVD,
    "first": {**FEWER, "method": "first"},
    "random": {**FEWER, "method": "random", "seed": 3},
    "procrustes": {**FEWER, "method": "procrustes"},
    "similar": {**FEWER, "grouping": "similar"},
    "similar-svd": {**SVD, "grouping": "similar"},
    "refit": REFIT,
    "refit-mean": {**REFIT, "method": "mean"},
    "fit": FIT,
    "bfloat16": {**FEWER, "dtype": "bfloat16"},
    "float16-svd": {**SVD, "dtype": "float16"},
    "shards": {**FEWER, "max_shard_size": "40KB"},
    "lengths": {**REFIT, "calibration_length": (16, 48)},
    "everything": {**FIT, **WIDER, **PARALLEL, "reinvest": "ffn", "layers": "1"},
    "built-in-text": {**REFIT, "calibration": []},
}
TILED = (
    "llama", "qwen3", "gemma2", "gemma3_text", "gpt_oss", "falcon", "falcon-rw", "bloom", "mpt", "mistral", "phi3",
    "gpt2", "gpt_neo", "gpt_neox", "cohere2", "llama4_text", "qwen3_next",
)  # fmt: skip
SERIAL_MODELS = ("llama", "qwen3", "gemma", "phi3", "starcoder2", "gpt_neox-serial", "falcon-rw", "gpt2", "mixtral")
PARALLEL_MODELS = ("gpt_neox", "gptj", "phi", "falcon", "falcon-mha", "cohere", "stablelm-plain")
PATCHES: dict[str, tuple[Sequence[str], str, dict[str, Any]]] = {
    "tiled": (TILED, "tiled", {}),
    "tiled-window": (TILED, "tiled", {"window": 5}),
    "parallel": (SERIAL_MODELS, "parallel", {}),
    "parallel-second": (SERIAL_MODELS, "parallel", {"layers": [1]}),
    "parallel-fused": ((*SERIAL_MODELS, *PARALLEL_MODELS), "parallel", {"fused": True}),
    "serial": (PARALLEL_MODELS, "serial", {}),
    "serial-fused": ((*SERIAL_MODELS, *PARALLEL_MODELS), "serial", {"fused": True}),
}


@dataclass(frozen=True)
class Case:
    """Something to compute.

    Attributes:
        name: group, model and what is done.
        model: a model type or one of :data:`VARIANTS`.
        steps: options of conversions, each of the result of the one before; empty for a patch.
        patch: a patch of the live model.
        options: its options.
    """

    name: str
    model: str
    steps: tuple[dict[str, Any], ...] = ()
    patch: str = ""
    options: dict[str, Any] = field(default_factory=dict)


def supported() -> list[str]:
    """The model types that ``rehead families`` lists."""
    command = [sys.executable, "-m", "rehead", "families", "--json"]
    rows = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return [row["model_type"] for row in rows]


def cases() -> Iterator[Case]:
    """All of them, those of one model type after another within a group."""
    for model in dict.fromkeys((*supported(), "t5", *VARIANTS)):
        if not model.startswith("rehead_") and known(model):
            for what in ("mean", "procrustes", "svd", "refit"):
                yield Case(f"families/{model}/{what}", model, (METHODS[what],))
    for what, options in METHODS.items():
        yield Case(f"methods/llama-mha/{what}", "llama-mha", (options,))
    half = {"num_key_value_heads": 4, "dtype": "bfloat16"}
    yield Case("methods/llama-mha/again-from-bfloat16", "llama-mha", (half, REFIT))
    for model in ("qwen2", "qwen3", "gemma2", "phi3", "falcon", "cohere", "gpt_neox", "gpt2", "mixtral"):
        yield Case(f"methods/{model}/fit", model, (FIT,))
        yield Case(f"methods/{model}/similar", model, ({**SVD, "grouping": "similar"},))
    for what in ("first", "random", "procrustes"):
        yield Case(f"methods/t5-gated/{what}", "t5-gated", ({**FEWER, "method": what}, {"num_key_value_heads": 1}))
    for model, host in HOSTS.items():
        yield Case(f"hosts/{model}/{host}", model, ({"host": host},))
        yield Case(f"hosts/{model}/auto", model, ({"host": "auto", "dtype": "bfloat16"},))
        yield Case(f"hosts/{model}/pooled", model, ({**FEWER, "host": host}, {"num_key_value_heads": 1}))
    for model in (*CARRIED, *SWITCHED):
        yield Case(f"blocks/{model}/there-and-back", model, (PARALLEL, SERIAL))
        yield Case(f"blocks/{model}/pooled", model, ({**SVD, **PARALLEL, "refit": True},))
        if model != "stablelm":
            yield Case(f"blocks/{model}/refit", model, ({**PARALLEL, **REFITTED}, {**SERIAL, **REFITTED}))
    for model in CARRIED:
        yield Case(f"blocks/{model}/one-by-one", model, ({**PARALLEL, "layers": [1]}, PARALLEL))
    for model in ("falcon-mqa", "falcon-mha", "gpt_neox", "stablelm-plain"):
        yield Case(f"blocks/{model}/serial", model, (SERIAL,))
    yield Case("blocks/llama/auto", "llama", ({**PARALLEL, "layers": "auto:1", **TEXT},))
    yield Case("blocks/gpt_neox-serial/host", "gpt_neox-serial", ({**PARALLEL, "host": "auto"},))
    for what, widened in WIDENED.items():
        for model in widened:
            yield Case(f"reinvest/{model}/{what}", model, ({**WIDER, "reinvest": what},))
    for what, (patched, patch, options) in PATCHES.items():
        for model in patched:
            if known(model):
                yield Case(f"patches/{model}/{what}", model, patch=patch, options=options)


def save(name: str, folder: Path) -> Path:
    """A checkpoint of :func:`build` with a tokenizer that has one token for each ASCII character; made once."""
    if not folder.exists():
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        build(name).save_pretrained(folder)
        letters = ["\n", *map(chr, range(32, 127))]
        tokenizer = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="?"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)
    return folder


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, and its dtype and shape."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    kind = str(tensor.dtype).removeprefix("torch.")
    return f"{hashlib.sha256(data).hexdigest()} {kind} {list(tensor.shape)}"


def logits(model: Any, **inputs: Any) -> Tensor:
    """Logits ``[2, LENGTH, VOCAB]`` on fixed tokens, without a cache."""
    ids = torch.arange(2 * LENGTH).view(2, LENGTH) * 7 % VOCAB
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.flip(0)
    return model(input_ids=ids, use_cache=False, **inputs).logits


def folder_digests(folder: Path) -> dict[str, str]:
    """Of ``config.json`` and every tensor, and of the logits where the checkpoint carries a modelling file."""
    config = (folder / "config.json").read_bytes()
    digests = {"config.json": hashlib.sha256(config).hexdigest()}
    for path in sorted(folder.glob("*.safetensors")):
        digests |= {f"{path.name} {name}": digest(tensor) for name, tensor in sorted(load_file(path).items())}
    auto: Any = AutoModelForSeq2SeqLM if b"Seq2Seq" in config else AutoModelForCausalLM
    if b"auto_map" in config:
        with torch.no_grad():
            digests["logits"] = digest(logits(auto.from_pretrained(folder, dtype=torch.float32).eval()))
    return digests


def convert_model(source: Path, out: Path, options: dict[str, Any]) -> None:
    """One conversion on the CPU; ``"fewer"`` heads are two, else one."""
    options = {"device": "cpu", **options}
    if options.get("num_key_value_heads") == "fewer":
        try:
            convert(source, out, **(options | {"num_key_value_heads": 2}))
            return
        except ReheadError:
            options["num_key_value_heads"] = 1
    convert(source, out, **options)


def patched_digests(case: Case) -> dict[str, str]:
    """Of logits and gradients under a patch: whole, behind padding, token by token with a cache, and after its undo."""
    model = build(case.model)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :7] = 0
    start = torch.arange(14).view(2, 7) * 5 % VOCAB
    with patch_model(model, case.patch, **case.options):
        with torch.no_grad():
            digests = {"logits": digest(logits(model)), "padded": digest(logits(model, attention_mask=mask))}
            made = model.generate(
                start, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0, output_logits=True,
                return_dict_in_generate=True,
            )  # fmt: skip
        digests |= {"text": digest(made.sequences), "cached": digest(torch.stack(made.logits))}
        logits(model).square().mean().backward()
        gradients = [p.grad.reshape(-1) for _, p in sorted(model.named_parameters()) if p.grad is not None]
        digests["gradients"] = digest(torch.cat(gradients))
    with torch.no_grad():
        return digests | {"undone": digest(logits(model))}


def run(case: Case, work: Path) -> dict[str, str]:
    """Digests of a case; its error's class where Rehead refuses it. ``work`` keeps source checkpoints for the next."""
    try:
        if case.patch:
            return patched_digests(case)
        digests: dict[str, str] = {}
        source = save(case.model, work / case.model)
        with tempfile.TemporaryDirectory(dir=work) as place:
            for index, options in enumerate(case.steps):
                convert_model(source, Path(place, str(index)), options)
                source = Path(place, str(index))
                digests |= {f"{index} {name}": value for name, value in folder_digests(source).items()}
        return digests
    except ReheadError as error:
        return {"refused": type(error).__name__}
    except Exception as error:  # the other cases still count
        return {"failed": f"{type(error).__name__}: {error}".split("\n")[0][:200]}


def run_all(only: str, log: bool) -> dict[str, dict[str, str]]:
    """Digests of every case whose name contains ``only``."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    results = {}
    with tempfile.TemporaryDirectory() as work:
        for case in cases():
            if only in case.name:
                started = time.perf_counter()
                results[case.name] = result = run(case, Path(work))
                if log or "failed" in result:
                    outcome = result.get("failed") or result.get("refused") or f"{len(result)} digests"
                    print(f"{case.name:48} {time.perf_counter() - started:6.2f} s  {outcome}", flush=True)
    return results


def differences(before: dict[str, dict[str, str]], after: dict[str, dict[str, str]]) -> list[str]:
    """A line for each case that differs or is missing, with the first items in which it does."""
    lines = []
    for name, old in before.items():
        new = after.get(name)
        if new is None:
            lines.append(f"{name}: missing")
        elif new != old:
            items = [item for item in (old | new) if old.get(item) != new.get(item)]
            reason = new.get("failed") or new.get("refused") or ", ".join(items[:3])
            lines.append(f"{name}: {len(items)} of {len(old)} items differ: {reason}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Record or check; returns the exit code, 4 where anything differs or a case fails for no reason Rehead gives."""
    parser = argparse.ArgumentParser(
        description="Record what Rehead computes on tiny models, or check it against that."
    )
    parser.add_argument("what", choices=("record", "check"))
    parser.add_argument("file", type=Path, help="JSON")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains it")
    parser.add_argument("--log", action="store_true", help="a line for each case with its time")
    args = parser.parse_args(argv)
    before = {}
    if args.what == "check":
        try:
            before = json.loads(args.file.read_text())
        except (OSError, ValueError) as error:
            parser.error(f"{args.file}: cannot be read ({error}); record it first")
    started = time.perf_counter()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    machine = {**versions, "cpu": torch.backends.cpu.get_cpu_capability()}
    results = run_all(args.only, args.log)
    if not results:
        parser.error(f"--only {args.only}: no case has that in its name; leave it out")
    refused = sum("refused" in result for result in results.values())
    failed = sum("failed" in result for result in results.values())
    seconds = time.perf_counter() - started
    print(f"{len(results)} cases in {seconds:.0f} s; {refused} refused by Rehead, {failed} failed")
    if args.what == "record":
        args.file.write_text(json.dumps({"machine": machine, "cases": results}, indent=1) + "\n")
        return 4 if failed else 0
    if before["machine"] != machine:
        print(f"note: recorded with {before['machine']}, checked with {machine}")
    lines = differences({name: old for name, old in before["cases"].items() if args.only in name}, results)
    print("\n".join(lines) or "no difference")
    return 4 if lines or failed else 0


if __name__ == "__main__":
    sys.exit(main())
