"""Claim: a long prompt's attention over the blocks that carry its mass, choice included, beside the dense kernel.

Queries and keys are those of a model on a real text: one forward pass with YaRN where the text is longer than what the
model was trained on. Layer by layer it prints the time of the dense and the sparse call, of the choice alone, the share
of blocks computed, the lost mass that the call estimated and bounded, and the one that it really had. Times are those
of CUDA graphs, so of the kernels alone; "launched" is the sparse call as Python launches it, with an empty queue.

    python -m rehead.benchmarks.sparse MODEL --text FILE [--lengths 32768,131072] [--lost-mass 0.05] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rehead.attention.attend import attend
from rehead.attention.call import AttentionCall
from rehead.attention.install import installation
from rehead.benchmarks.attention import median_ms, require_cuda
from rehead.benchmarks.command import run_script
from rehead.benchmarks.graphs import warm_up
from rehead.benchmarks.machine import headline, machine
from rehead.errors import UsageError
from rehead.patches import patch_model
from rehead.variants.sparse import SparseOptions, choice_of, recorded
from rehead.variants.sparse import attend as sparse


def load(checkpoint: str, length: int, trained: int | None = None) -> Any:
    """The model in bfloat16 on the GPU, its rotary positions stretched by YaRN to ``length`` tokens."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(checkpoint)
    trained = trained or config.max_position_embeddings
    if length > trained:
        config.rope_parameters = {
            **config.rope_parameters,
            "rope_type": "yarn",
            "factor": length / trained,
            "original_max_position_embeddings": trained,
        }
        config.max_position_embeddings = length
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, config=config, dtype=torch.bfloat16)
    return model.to("cuda").eval()


def _graph(function: Callable[[], object]) -> Callable[[], object]:
    """One call of a function as a CUDA graph."""
    warm_up(function, 1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def measure(call: AttentionCall, options: SparseOptions, budget_ms: float = 30.0) -> dict[str, float]:
    """Milliseconds of a call, dense and sparse, and what the sparse one lost."""
    compute: Callable[[AttentionCall], Tensor] = attend
    state: Mapping[str, Tensor] = {}
    with torch.no_grad(), recorded(measure=True) as reports:
        sparse(call, options, state, compute)
    with torch.no_grad():
        dense_ms = median_ms(_graph(lambda: attend(call)), budget_ms)
        launched_ms = median_ms(lambda: sparse(call, options, state, compute), budget_ms)
        sparse_ms, choice_ms = launched_ms, float("nan")
        if options.bound == "sampled":  # the other sizes its lists on the host, which no graph can hold
            sparse_ms = median_ms(_graph(lambda: sparse(call, options, state, compute)), budget_ms)
            choice_ms = median_ms(_graph(lambda: choice_of(call, options)), budget_ms)
    report = reports[0]
    return {
        "dense_ms": dense_ms,
        "sparse_ms": sparse_ms,
        "launched_ms": launched_ms,
        "choice_ms": choice_ms,
        "density": report.density,
        "estimate": report.estimate,
        "bound": report.bound,
        "lost": float("nan") if report.lost is None else report.lost,
    }


def run(checkpoint: str, tokens: Tensor, length: int, options: SparseOptions, every: int = 1) -> dict[str, Any]:
    """All layers of one prompt: each layer's figures and the next tokens' divergence from the dense pass.

    Args:
        checkpoint: a local folder.
        tokens: int ``[N]`` with at least ``length`` tokens.
        length: of the prompt.
        options: of the variant.
        every: measure one layer in so many.
    """
    if tokens.numel() < length:
        raise UsageError(f"the text has {tokens.numel()} tokens, fewer than {length}; give a longer one")
    model = load(checkpoint, length)
    ids = tokens[None, :length].long().cuda()
    rows: list[dict[str, Any]] = []
    last = 2048
    with torch.no_grad(), patch_model(model, "tiled"):
        dense = model(ids, logits_to_keep=last, use_cache=False).logits.float().log_softmax(-1)
        installed = installation(model)
        assert installed is not None
        layers: list[Any] = installed.layers[::every]
        for layer in layers:

            def measured(call: AttentionCall, index: int | None = layer.index) -> Tensor:
                rows.append({"layer": index, **measure(call, options)})
                return attend(call)

            layer.attend = measured
        model(ids, logits_to_keep=1, use_cache=False)
        for layer in layers:
            del layer.attend
        with patch_model(model, "sparse", **dict(options)):
            approximate = model(ids, logits_to_keep=last, use_cache=False).logits.float().log_softmax(-1)
    kl = float((dense.exp() * (dense - approximate)).sum(-1).mean())
    nll = [float(-part[0, :-1].gather(1, ids[0, -last + 1 :, None]).mean()) for part in (dense, approximate)]
    return {"length": length, "layers": rows, "kl": kl, "nll_dense": nll[0], "nll_sparse": nll[1]}


def table(result: dict[str, Any]) -> str:
    """One prompt's layers as text."""
    lines = [
        f"{result['length']} tokens",
        "layer   dense ms  sparse ms  choice ms   launched  times  blocks  estimate   bound    lost",
    ]
    times = ("dense_ms", "sparse_ms", "choice_ms", "launched_ms")
    for row in result["layers"]:
        spent = "  ".join(f"{row[name]:9.3f}" for name in times)
        lines.append(
            f"{row['layer']:5}  {spent}  {row['dense_ms'] / row['sparse_ms']:5.2f}  {row['density']:6.3f}  "
            f"{row['estimate']:8.4f}  {row['bound']:6.4f}  {row['lost']:6.4f}"
        )
    total = {name: sum(row[name] for row in result["layers"]) for name in times}
    mean = {name: sum(row[name] for row in result["layers"]) / len(result["layers"]) for name in ("density", "lost")}
    spent = "  ".join(f"{total[name]:9.3f}" for name in times)
    lines.append(
        f"  all  {spent}  {total['dense_ms'] / total['sparse_ms']:5.2f}  {mean['density']:6.3f}  "
        f"{'':16}  {mean['lost']:6.4f}"
    )
    lines.append(
        f"last tokens: KL {result['kl']:.4f}, NLL {result['nll_dense']:.4f} dense, {result['nll_sparse']:.4f} sparse"
    )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print; ``argv`` as on the command line."""
    parser = argparse.ArgumentParser(prog="python -m rehead.benchmarks.sparse", description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--text", required=True, help="a text file of the longest length or more")
    parser.add_argument("--lengths", default="32768,131072", help="tokens of the prompts, with commas between")
    parser.add_argument("--lost-mass", type=float, default=0.05)
    parser.add_argument("--bound", default="sampled", choices=("sampled", "hard"))
    parser.add_argument("--every", type=int, default=1, help="measure one layer in so many")
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args(argv)
    require_cuda("sparse")
    from transformers import AutoTokenizer

    text = Path(args.text).read_text(encoding="utf-8")
    tokens = AutoTokenizer.from_pretrained(args.checkpoint)(text, return_tensors="pt").input_ids[0]
    options = SparseOptions(lost_mass=args.lost_mass, bound=args.bound)
    facts = machine()
    print(headline(facts))
    results = []
    for length in map(int, args.lengths.split(",")):
        results.append(run(args.checkpoint, tokens, length, options, args.every))
        print(table(results[-1]), flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps({"machine": facts, "results": results}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
