"""The fused loss kernel compiles for three generations of cards, without one, and keeps its registers."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess

import pytest

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
]


@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize("everything", [False, True])
def test_token_losses(capability, everything, tmp_path) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from rehead.recipes.training.losses import fused
    from rehead.recipes.training.losses.kernels import token_losses

    flags = dict.fromkeys(("TEMPERED", "JS", "STUDENT_BIAS", "STUDENT_CAP", "TEACHER_BIAS", "TEACHER_CAP"), everything)
    options = {"num_warps": fused.warps(flags.values())}
    flags |= {"TEACHER": True, "GRADIENT": True, "BLOCK": 4096}
    pointers = {name: "*bf16" for name in ("student", "teacher", "student_bias", "teacher_bias")}
    pointers |= {"labels": "*i64", "rows": "*fp32", "stride_student": "i32", "stride_teacher": "i32"}
    pointers |= {"tokens": "i32", "vocabulary": "i32", "width": "i32"}
    types = {name: "constexpr" if name in flags else pointers.get(name, "fp32") for name in token_losses.arg_names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(token_losses.arg_names)
        if types[name].startswith("*") or name.startswith("stride") or name == "width"
    }
    source = ASTSource(fn=token_losses, signature=types, constexprs=flags, attrs=aligned)
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    path = tmp_path / "kernel.ptx"
    path.write_text(kernel.asm["ptx"])
    arch = f"sm_{capability}{'a' if capability == 90 else ''}"
    command = [triton.knobs.nvidia.ptxas.path, "-v", f"--gpu-name={arch}", str(path), "-o", str(tmp_path / "out")]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert sum(int(count) for count in re.findall(r"(\d+) bytes spill stores", report)) == 0, report
    # Sixteen bytes at a time, from memory and back.
    assert "ld.global.v4" in kernel.asm["ptx"]
    assert "st.global.v4" in kernel.asm["ptx"]
