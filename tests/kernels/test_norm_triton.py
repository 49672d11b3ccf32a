"""Runs the cases of triton_norm_cases.py: interpreted in processes of their own, and on a GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from isoscale.kernels import triton_norm

CASES = Path(__file__).with_name("triton_norm_cases.py")
GROUPS = (
    "formats and mxfp8", "formats and mxfp6", "formats and not mxfp8 and not mxfp6", "rules", "both", "clamp", "wide or refusals",
)  # fmt: skip
needs_triton = pytest.mark.skipif(not triton_norm.available(), reason="Triton is not installed")


def run(group: str, **env: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", str(CASES), "-p", "no:cacheprovider", "-k", group]
    done = subprocess.run(command, env={**os.environ, **env}, text=True, capture_output=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert " passed" in done.stdout


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("group", GROUPS)
def test_norms_interpreted(group: str) -> None:
    run(group, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("group", GROUPS)
def test_norms_on_a_gpu(group: str) -> None:
    run(group)


COMPILE = """
import re, sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from isoscale.kernels import triton_norm, triton_norm_kernels
from isoscale.kernels.spec import CastSpec

e4m3 = CastSpec(8, 3, 7, -6, 8, 448.0, False, "e8m0", "floor", 1, 32)
nvfp4 = CastSpec(4, 1, 1, 0, 2, 6.0, False, "e4m3", "amax", 1, 16)
types = dict(out_ptr="*u8", scale_ptr="*u8", tensor_ptr="*fp32", rms_ptr="*fp32", eps="fp32", w_full="fp32", w_last="fp32",
             clamp="fp32")
common = dict(RIDE=False, CLAMPED=True)
row = dict(RESIDUAL=True, CODES=True, OUT_WIDE=True, ROWS=2, KP=4, **common)
cases = [
    (triton_norm_kernels.norm, e4m3, dict(KIND="mx2", WIDE=False, **row)),
    (triton_norm_kernels.norm, nvfp4, dict(KIND="rms", WIDE=True, **row)),
    (triton_norm_kernels.turned, e4m3, dict(WIDE=False, NB=16, **common)),
]
fuse = sys.argv[1] == "fused"
for fn, spec, values in cases[:1] if fuse else cases:
    values = {**values, "COLS": spec.cols, **triton_norm._numbers(spec, -1)}
    words = "*i32" if values["WIDE"] else "*i16"
    kind = {n: types.get(n, words if n in ("x_ptr", "residual_ptr", "summed_ptr") else "*i32" if n.endswith("ptr") else "i32")
            for n in fn.arg_names}
    signature = {n: "constexpr" if n in values else kind[n] for n in fn.arg_names}
    constants = {(i,): values[n] for i, n in enumerate(fn.arg_names) if n in values}
    source = ASTSource(fn=fn, signature=signature, constexprs=constants)
    code = compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": fuse}).asm["ptx"]
    assert "div.rn.f32" in code
    assert "KIND" not in values or "sqrt.rn.f32" in code
    print(sorted(set(re.findall(r"fma\\.\\S*f32|\\S*\\.ftz\\S*|\\S*\\.approx\\S*", code))))
"""


def ptx(tmp_path: Path, how: str) -> str:
    pytest.importorskip("triton", "3.6")  # the compiler's own interface moves
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", COMPILE, how], env=env, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@needs_triton
def test_gpu_code_of_norms_has_no_fma_and_no_flushing_to_zero(tmp_path: Path) -> None:
    """Compiled for sm_90 without a GPU; the control allows fused products, and has them."""
    assert ptx(tmp_path / "exact", "exact").split() == ["[]"] * 3
    assert "fma.rn.f32" in ptx(tmp_path / "fused", "fused")
