"""Runs the cases of triton_lmd_cases.py: interpreted in a process of its own, and on a GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from isoscale.kernels import triton_lmd

CASES = Path(__file__).with_name("triton_lmd_cases.py")
needs_triton = pytest.mark.skipif(not triton_lmd.available(), reason="Triton is not installed")


def run(**env: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", str(CASES), "-p", "no:cacheprovider"]
    done = subprocess.run(command, env={**os.environ, **env}, text=True, capture_output=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert " passed" in done.stdout


@pytest.mark.slow
@needs_triton
def test_lmd_interpreted() -> None:
    run(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_lmd_on_a_gpu() -> None:
    run()


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from isoscale.kernels.triton_lmd_kernels import lmd

for hyper, medians, momentum, rule, place in ((False, "fp32", "bf16", "log-normal", True), (True, "log8", "log8", "half-normal", False)):
    values = dict(HYPER=hyper, RULE=rule, MEDIAN=medians, MOMENTUM=momentum, GRAD="bf16", WEIGHT="bf16", RAW=False, SINGLE=False,
                  GIVEN=False, STEP=True, PLAIN=place, CELL=1.0 if medians == "fp32" else 0.0625, TOP=127.0, BLOCK=1024)
    kinds = {"fp32": "*i32", "bf16": "*i16", "log8": "*i8"}
    def kind(name):
        if name in values:
            return "constexpr"
        if name.endswith("ptr"):
            return {"a": kinds[medians], "v": kinds[momentum]}.get(name[0], "*i16")
        return "i64" if name in ("n", "start", "inner", "stride") else "i32" if name[1:].isdigit() else "fp32"
    signature = {name: kind(name) for name in lmd.arg_names}
    constants = {(i,): values[name] for i, name in enumerate(lmd.arg_names) if name in values}
    source = ASTSource(fn=lmd, signature=signature, constexprs=constants)
    code = compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False}).asm["ptx"]
    print("fma.rn.f32" in code, "mul.rn.f32" in code or "mul.f32" in code)
"""


@needs_triton
def test_gpu_code_is_made(tmp_path: Path) -> None:
    """Compiled for sm_90 without a GPU: without fused products in the normals."""
    pytest.importorskip("triton", "3.6")  # the compiler's own interface moves
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", COMPILE], env=env, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["False", "True"] * 2
