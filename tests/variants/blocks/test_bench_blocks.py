"""The benchmark of blocks: every variant computes its form, on one rank and split over two, and the table adds up."""

import json
import os

import pytest
import torch
from two_ranks import LEAVE, torchrun

from rehead.benchmarks import blocks
from rehead.benchmarks.block_model import FORMS, Pieces, Shape, Stack
from rehead.benchmarks.block_products import Ranks
from rehead.benchmarks.block_variants import Bench, variants
from rehead.errors import UnsupportedError, UsageError

SMALL = ["--cpu", "--hidden", "64", "--head-dim", "16", "--layers", "2", "--batch", "2", "--length", "16"]
SMALL += ["--context", "16", "--decode-batch", "2", "--seconds", "0.01", "--compile", "no"]

TWO_RANKS = """
import sys, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
import test_bench_blocks as t
dist.init_process_group("gloo")
for kv_heads in (2, 1):
    t.check_variants(kv_heads)
"""


def run(stack, x, grad):
    x = x.clone().requires_grad_()
    out = stack(x)
    out.backward(grad)
    return out.detach(), x.grad


def mine(whole, name, bench, kv_heads):
    """This rank's share of a whole gradient."""
    if name in ("k", "v"):
        parts = min(bench.size, kv_heads)
        return whole.chunk(parts, 0)[bench.index * parts // bench.size]
    return whole.chunk(bench.size, 1 if name in ("o", "down") else 0)[bench.index]


def matrix_gradients(block):
    """The gradients of a block's seven matrices, however they are joined."""
    grads = {name: matrix.grad for name, matrix in block.matrices.items()}
    if "in" in grads:
        qkv, grads["gate_up"] = grads["in"].split([sum(block.cut), len(grads["in"]) - sum(block.cut)])
        grads["qkv"] = qkv
        grads["o"], grads["down"] = grads["out"].split([block.cut[0], grads["out"].shape[1] - block.cut[0]], 1)
    if "qkv" in grads:
        grads |= zip("qkv", grads["qkv"].split(block.cut))
        grads |= zip(("gate", "up"), grads["gate_up"].chunk(2))
    return {name: grads[name] for name in ("q", "k", "v", "gate", "up", "o", "down")}


def check_variants(kv_heads):
    bench = Bench(torch.device("cpu"), torch.float64, 0.01)
    shape = Shape(64, kv_heads, 2, 2, 16, 16)
    like = torch.empty(0, dtype=torch.float64)
    x, grad = bench.inputs(shape, 16), bench.inputs(shape, 16).flip(1)
    for form in FORMS:
        plain = Stack(shape, form, "separate", Ranks(), Pieces(), like)
        want, want_grad = run(plain, x, grad)
        cache, token = plain.empty_cache(like), bench.inputs(shape, 1)
        decoded = plain.decode(token, cache)
        for variant in variants("train", bench.size, kv_heads, ["no"], full=True):
            if variant.form != form or variant.collectives == "dtensor":
                continue
            stack = bench.stack(variant, shape)
            got, got_grad = run(stack, x, grad)
            torch.testing.assert_close(got, want, msg=variant.label)
            torch.testing.assert_close(got_grad, want_grad, msg=variant.label)
            for block, reference in zip(stack.blocks, plain.blocks):
                for name, gradient in matrix_gradients(block).items():
                    share = mine(reference.matrices[name].grad, name, bench, kv_heads)
                    torch.testing.assert_close(gradient, share, msg=f"{variant.label}: {name}")
            if bench.size == 1:  # caches are drawn by rank, so only a whole one can be compared
                torch.testing.assert_close(stack.decode(token, stack.empty_cache(like)), decoded, msg=variant.label)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_variants_compute_the_same(kv_heads):
    check_variants(kv_heads)


def test_variants_compute_the_same_on_two_ranks(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO_RANKS + LEAVE)
    done = torchrun(str(script), os.path.dirname(__file__))
    assert done.returncode == 0, done.stderr[-2000:]


def test_forms_differ():
    like = torch.empty(0, dtype=torch.float64)
    shape = Shape(64, 2, 1, 1, 8, 16)
    x = torch.randn(1, 8, 64, dtype=torch.float64)
    serial, parallel = (Stack(shape, form, "fused", Ranks(), Pieces(), like)(x) for form in FORMS)
    assert (serial - parallel).norm() > 0.1 * serial.norm()


def test_decoding_continues_a_training_pass():
    """The decode step after a cache of real keys is the last position of a pass over everything."""
    like = torch.empty(0, dtype=torch.float64)
    shape = Shape(64, 2, 1, 2, 12, 16)
    stack = Stack(shape, "parallel", "fused", Ranks(), Pieces(), like)
    x = torch.randn(2, 13, 64, dtype=torch.float64)
    cache = stack.empty_cache(like)
    block = stack.blocks[0]
    with torch.no_grad():
        _, n = block._norm(x, None, 0)
        _, k, v = (part.unflatten(-1, (-1, 16)) for part in (n @ block.matrices["qkv"].T).split(block.cut, -1))
        _, k = stack.pieces.rotate(k, k, stack.cos, stack.sin)
        cache[0][0][:, :12], cache[0][1][:, :12] = k[:, :12], v[:, :12]
        torch.testing.assert_close(stack.decode(x[:, 12:], cache), stack(x)[:, 12:])


def test_published_sizes():
    assert [Shape(n, 8).intermediate for n in (1024, 4096, 8192)] == [2816, 11008, 22016]
    assert Shape(4096, 32, layers=32).parameters == 32 * (4 * 4096**2 + 3 * 4096 * 11008)


def test_command(tmp_path, capsys):
    file = tmp_path / "rows.json"
    blocks.main([*SMALL, "--kv", "gqa,mqa", "--json", str(file)])
    report = json.loads(file.read_text())
    assert {(f["kv_heads"], f["step"]) for f in report["summary"]} == {
        (4, "train"), (4, "decode"), (1, "train"), (1, "decode"),
    }  # fmt: skip
    for fact in report["summary"]:
        rows = [r for r in report["rows"] if (r["kv_heads"], r["step"]) == (fact["kv_heads"], fact["step"])]
        best = {form: min(r["milliseconds"] for r in rows if r["form"] == form) for form in FORMS}
        assert fact["speedup"] == pytest.approx(best["serial"] / best["parallel"])
    assert report["machine"]["torch"] == torch.__version__
    assert "| hidden | KV heads |" in capsys.readouterr().out


@pytest.mark.slow
def test_command_on_two_ranks_with_dtensor(tmp_path):
    file = tmp_path / "rows.json"
    command = ["-m", "rehead.benchmarks.blocks", *SMALL, "--kv", "gqa", "--steps", "train", "--json", str(file)]
    done = torchrun(*command)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(file.read_text())["rows"]
    assert {row["collectives"] for row in rows} == {"plain", "overlapped", "dtensor"}
    assert all(row["skipped"] is None and row["milliseconds"] > 0 for row in rows)


def test_refusals():
    with pytest.raises(UsageError, match="--hidden 100"):
        blocks.main([*SMALL, "--hidden", "100"])
    with pytest.raises(UsageError, match="whole numbers"):
        blocks.main([*SMALL, "--hidden", "big"])
    for wrong in (["--layers", "0"], ["--batch", "-1"], ["--head-dim", "0"], ["--hidden", "256,0"]):
        with pytest.raises(UsageError, match=f"{wrong[0]} .*must be 1 or more"):
            blocks.main([*SMALL, *wrong])
    with pytest.raises(UsageError, match="--kv"):
        blocks.main([*SMALL, "--kv", "some"])
    with pytest.raises(UsageError, match="do not divide over 3"):
        blocks.shapes(blocks._parser().parse_args(["--hidden", "1024"]), 3)
    if not torch.cuda.is_available():
        with pytest.raises(UnsupportedError, match="--cpu"):
            blocks.main([])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_captured_steps_keep_their_tensors():
    bench = Bench(torch.device("cuda"), torch.bfloat16, 0.01)
    shape = Shape(256, 2, 2, 2, 128)
    for kind in blocks.STEPS:
        rows = blocks.measure(bench, shape, kind, variants(kind, 1, 2, ["no"], full=True))
        torch.cuda.synchronize()
        assert all(row.skipped is None and row.graph for row in rows)
