"""The Hopper and decode kernels compile for compute capability 9.0, without a GPU, and keep what makes them fast.

Triton's own ptxas reports register spills, and a C75xx warning when it serialises asynchronous matrix products.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
from types import SimpleNamespace

import pytest
import torch

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
]

INT, FLOAT = "i32", "fp32"
# Bytes of shared memory a block may use: A100, other cards of that generation or the next, H100 and H200.
SHARED = {80: 166_912, 89: 101_376, 90: 232_448}


def assemble(function, signature: dict, constants: dict, gluon: bool, tmp_path, capability=90, **options) -> str:
    """ptxas's report on the kernel, which must fit the card's shared memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    names = function.arg_names
    types = {name: "constexpr" if name in constants else signature.get(name, INT) for name in names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if types[name].startswith("*") or (name.startswith("stride") and name != "stride_mask")
    }
    source = (GluonASTSource if gluon else ASTSource)(fn=function, signature=types, constexprs=constants, attrs=aligned)
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert kernel.metadata.shared <= SHARED[capability], "more shared memory than the card has"
    path = tmp_path / "kernel.ptx"
    path.write_text(kernel.asm["ptx"])
    ptxas = triton.knobs.nvidia.ptxas.path
    report = subprocess.run(
        [
            ptxas,
            "-v",
            f"--gpu-name=sm_{capability}{'a' if capability == 90 else ''}",
            str(path),
            "-o",
            str(tmp_path / "kernel.cubin"),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    return report.stderr


def spilled(report: str) -> int:
    return sum(int(count) for count in re.findall(r"(\d+) bytes spill stores", report))


def descriptor(rows: int, dim: int, rank: int = 4) -> str:
    from triton.experimental.gluon import language as gl

    shape = [*[1] * (rank - 2), rows, dim]
    layout = gl.NVMMASharedLayout.get_default_for(shape, gl.bfloat16)
    return f"tensordesc<bf16[{','.join(map(str, shape))}],{layout!r}>"


@pytest.fixture
def hopper():
    module = pytest.importorskip("rehead.attention.kernels.hopper")
    if not module.READY:
        pytest.skip("this Triton release has no Hopper kernels")
    return module


HOPPER_FORWARD = {
    "plain": ("FORWARD", {"WINDOW": True, "FIRST": 0, "ROWS": 0}),
    "first tokens": ("NARROW", {"WINDOW": True, "FIRST": 16, "ROWS": 0}),
    "lists": ("NARROW", {"WINDOW": False, "FIRST": 0, "ROWS": 128}),
}


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("rules", HOPPER_FORWARD)
def test_hopper_forward(rules, dim, hopper, tmp_path):
    table, chosen = HOPPER_FORWARD[rules]
    config = getattr(hopper, table)[dim]
    flags = {"CAUSAL": True, "RANGE": True, "SINKS": True, **chosen}
    short = descriptor(flags["FIRST"] or config["BLOCK_N"], dim)
    signature = {
        "q_desc": descriptor(64, dim), "o_desc": descriptor(64, dim), "scale": FLOAT, "lse": "*fp32", "sinks": "*bf16",
        "k_desc": descriptor(config["BLOCK_N"], dim), "v_desc": descriptor(config["BLOCK_N"], dim),
        "k_first_desc": short, "v_first_desc": short,
        "counter": "*i32", "kv_start": "*i32", "kv_end": "*i32", "starts": "*i32", "index": "*i32",
    }  # fmt: skip
    kernel = hopper.hopper_forward.attention_forward
    report = assemble(kernel, signature, {"D": dim, "DV": dim, **config, **flags}, True, tmp_path, num_warps=4)
    assert "serialized" not in report
    assert spilled(report) == 0


@pytest.mark.parametrize("dim", [64, 128])
def test_hopper_backward(hopper, dim, tmp_path):
    config = hopper.BACKWARD[dim]
    flags = {"CAUSAL": True, "WINDOW": False, "RANGE": False, "SPLIT": False}
    rows, keys = descriptor(config["BLOCK_M"], dim), descriptor(config["BLOCK_N"], dim)
    signature = {
        "q_desc": rows, "do_desc": rows, "k_desc": keys, "v_desc": keys, "dk_desc": keys, "dv_desc": keys,
        "dk_part": "*fp32", "dv_part": "*fp32", "dq_acc": "*fp32", "lse": "*fp32", "delta": "*fp32", "scale": FLOAT,
        "kv_start": "*i32", "kv_end": "*i32",
    }  # fmt: skip
    kernel = hopper.hopper_backward.attention_backward
    report = assemble(kernel, signature, {"D": dim, "DV": dim, **config, **flags}, True, tmp_path, num_warps=8)
    assert "serialized" not in report
    assert spilled(report) <= 16  # a few bytes outside the loop


@pytest.mark.parametrize("first", [0, 16])
def test_hopper_finish(first, hopper, tmp_path):
    flags = {"D": 128, "DV": 128, "BLOCK_D": 128, "BLOCK_DV": 128, "BLOCK_M": 64, "WARPS": 8, "FIRST": first,
             "RANGE": True, "REPEAT": 8 if first else 1}  # fmt: skip
    pointers = {f"{name}_ptr": "*bf16" for name in ("dq", "q", "k", "v", "do")}
    pointers |= {name: "*fp32" for name in ("acc_ptr", "lse", "delta", "dk_ptr", "dv_ptr")}
    signature = pointers | {"kv_start": "*i32", "kv_end": "*i32", "scale": FLOAT}
    assert "registers" in assemble(hopper.hopper_finish.finish_query, signature, flags, False, tmp_path)


@pytest.mark.parametrize("direct", [False, True])
def test_hopper_latent(hopper, direct, tmp_path):
    flags = {"DV": 512, "CAUSAL": True, "START": True, "END": True, "OFFSET": True, "DIRECT": direct}
    wide, narrow = (descriptor(64, columns, 3) for columns in (hopper.LATENT_HALF, hopper.LATENT_TAIL))
    signature = {
        "q_desc": wide, "c_desc": wide, "q_tail_desc": narrow, "t_desc": narrow, "acc_ptr": "*fp32", "lse_ptr": "*fp32",
        "out_ptr": "*bf16", "start_ptr": "*i32", "end_ptr": "*i32", "offset_ptr": "*i32", "scale": FLOAT,
    }  # fmt: skip
    kernel, options = hopper.hopper_latent.partial_latents, {"num_warps": 4, "launch_pdl": True}
    report = assemble(kernel, signature, flags, True, tmp_path, **options)
    assert "serialized" not in report
    assert spilled(report) == 0


CHOOSING = {
    "block_sums": {"D": 64, "BLOCK_D": 64, "BLOCK_M": 128, "KEYS": 128, "WIDE": 16, "PRECISION": "ieee"},
    "block_levels": {"SAMPLES": 4, "KEYS": 128, "WIDE": 128, "LEVELS": 128, "PER_OCTAVE": 8},
    "lost_by_level": {"KEYS": 128, "WIDE": 32, "LEVELS": 128, "RUN": 4, "ONE": 1 << 30},
    "settle": {"LEVELS": 128, "ONE": 1 << 30, "WHOLE": False},
    "write_lists": {"WIDE": 256, "COUNT": False},
}


@pytest.mark.parametrize("name", CHOOSING)
def test_choosing_blocks(name, tmp_path):
    from rehead.attention.kernels import block_choice

    pointers = {"q_ptr": "*bf16", "k_ptr": "*bf16", "level_ptr": "*i16", "kept_ptr": "*i32"}
    pointers |= {"moments_ptr": "*i64", "scale": FLOAT, "log": FLOAT, "allowed": FLOAT}
    pointers |= {f"{each}_ptr": "*i32" for each in ("rows", "starts", "index")}
    pointers |= {f"{each}_ptr": "*fp32" for each in ("sums", "figures", "out")} | {"kv_start": "*i32", "kv_end": "*i32"}
    options = {"num_warps": 8, "num_stages": 3} if name == "block_sums" else {}
    report = assemble(getattr(block_choice, name), pointers, CHOOSING[name], False, tmp_path, **options)
    assert spilled(report) == 0


@pytest.mark.parametrize("rows", [16, 64])
def test_decode(rows, tmp_path):
    block_n, stages, warps = (64, 3, 4) if rows == 64 else (128, 3, 8)
    report = assemble_decode(rows, block_n, stages, 128, "bf16", 90, tmp_path, warps)
    assert spilled(report) == 0
    assert "serialized" not in report


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize(("width", "kind"), [(64, "bf16"), (128, "bf16"), (256, "bf16"), (128, "fp32"), (256, "fp32")])
@pytest.mark.parametrize("total", [1, 64])
def test_decode_fits_every_card(total, width, kind, capability, tmp_path, monkeypatch):
    module = importlib.import_module("rehead.attention.kernels.decode")
    general = importlib.import_module("rehead.attention.kernels.general")
    monkeypatch.setattr(general, "shared_memory", lambda device: SHARED[capability])
    monkeypatch.setattr(module, "is_hopper", lambda device: capability == 90)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=100))
    module.launch_shape.cache_clear()
    shape = module.launch_shape(torch.device("cuda"), 2 if kind == "bf16" else 4, width, total)
    module.launch_shape.cache_clear()
    for stages, bias in ((shape.stages, False), (min(2, shape.stages), True)):
        changed = {"BIAS": bias, "PLAIN": not bias}
        sizes = (shape.rows, shape.block_n, stages, width, kind, capability, tmp_path, shape.warps)
        report = assemble_decode(*sizes, **changed)
        assert "registers" in report


@pytest.mark.parametrize(("capability", "total"), [(90, 128), (90, 16), (80, 128), (89, 128)])
@pytest.mark.parametrize(("kind", "width"), [("bf16", 512), ("fp32", 256)])
def test_latents_fit_every_card(kind, width, total, capability, tmp_path, monkeypatch):
    module = importlib.import_module("rehead.attention.kernels.decode")
    general = importlib.import_module("rehead.attention.kernels.general")
    monkeypatch.setattr(general, "shared_memory", lambda device: SHARED[capability])
    monkeypatch.setattr(module, "is_hopper", lambda device: capability == 90)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=100))
    shape = module.latent_shape.__wrapped__(torch.device("cuda"), 2 if kind == "bf16" else 4, width, total)
    sizes = (shape.rows, shape.block_n, shape.stages, width, kind, capability, tmp_path, shape.warps)
    report = assemble_decode(*sizes, D=64, BLOCK_D=64, TAIL=True, GROUP=total, AHEAD=0, MASK=False)
    assert spilled(report) <= 64 or kind == "fp32"
    assert "serialized" not in report


def assemble_decode(
    rows: int, block_n: int, stages: int, width: int, kind: str, capability: int, tmp_path, warps: int = 4, **changed
) -> str:
    from rehead.attention.kernels import decode_kernels

    flags = {
        "GROUP": 4, "D": width, "DV": width, "BLOCK_D": width, "BLOCK_DV": width, "ROWS": rows, "BLOCK_N": block_n,
        "SCAN": 1024, "CAUSAL": True, "WINDOW": False, "CHUNK": False, "SOFTCAP": False, "START": True, "END": True,
        "MASK": True, "OFFSET": True, "ALIBI": False, "SINKS": True, "BIAS": False, "DIRECT": False,
        "EARLY": capability == 90, "AHEAD": 256, "SINGLE": True, "PLAIN": True,
        "TAIL": False, "PRECISION": "ieee" if kind == "bf16" else "tf32x3",
    }  # fmt: skip
    flags |= changed
    pointers = {f"{name}_ptr": f"*{kind}" for name in ("q", "k", "v", "out")} | {"bias_ptr": "*fp32"}
    pointers |= {f"{name}_ptr": "*i32" for name in ("start", "end", "offset")}
    pointers |= {"acc_ptr": "*fp32", "lse_ptr": "*fp32", "mask_ptr": "*u8", "alibi": "*fp32", "sinks": "*bf16"}
    signature = pointers | {"scale": FLOAT, "softcap": FLOAT}
    options = {"num_warps": warps, "num_stages": stages} | ({"launch_pdl": True} if capability == 90 else {})
    return assemble(decode_kernels.partial_attention, signature, flags, False, tmp_path, capability, **options)


@pytest.mark.parametrize("name", ["forward", "grad_query", "grad_key_value"])
def test_general_kernels_with_every_rule(name, tmp_path):
    assert "registers" in assemble_general(name, 128, "bf16", 90, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize(("width", "kind"), [(64, "bf16"), (128, "bf16"), (256, "bf16"), (128, "fp32"), (256, "fp32")])
@pytest.mark.parametrize("name", ["forward", "grad_query", "grad_key_value"])
def test_general_kernels_fit_every_card(name, width, kind, capability, tmp_path):
    assert "registers" in assemble_general(name, width, kind, capability, tmp_path)


def assemble_general(name: str, width: int, kind: str, capability: int, tmp_path) -> str:
    from rehead.attention.kernels import backward, forward, general

    kernel = forward.attention_forward if name == "forward" else getattr(backward, name)
    itemsize = 2 if kind == "bf16" else 4
    tile = general.tile_for(name, width, itemsize, SHARED[capability])
    rules = ("CAUSAL", "WINDOW", "FIRST", "CHUNK", "SOFTCAP", "RANGE", "KEY_MASK", "SEGMENTS", "BLOCKS", "ALIBI",
             "SINKS", "BIAS")  # fmt: skip
    flags = dict.fromkeys(rules, True) | {
        "ROWS": 128, "KEYS": 128,
        "D": width - 8, "DV": width, "BLOCK_D": width, "BLOCK_DV": width,
        "PRECISION": "ieee" if itemsize == 2 else "tf32x3",
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
    }  # fmt: skip
    flags = {key: value for key, value in flags.items() if key in kernel.arg_names}
    pointers = {f"{item}_ptr": f"*{kind}" for item in ("q", "k", "v", "o", "do", "dq", "dk", "dv", "bias")}
    pointers |= {item: "*i32" for item in ("kv_start", "kv_end", "q_segments", "kv_segments", "seg_begin", "seg_end")}
    pointers |= {"starts": "*i32", "index": "*i32"}
    pointers |= {"lse_ptr": "*fp32", "delta_ptr": "*fp32", "alibi": "*fp32", "sinks": "*bf16", "key_mask": "*u8"}
    signature = pointers | {"scale": FLOAT, "softcap": FLOAT}
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return assemble(kernel, signature, flags, False, tmp_path, capability, **options)
