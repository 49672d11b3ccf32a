"""Runs the cases of triton_cases.py: interpreted in processes of their own, and on a GPU where there is one.

The interpreter is chosen when Triton is first imported, so it must not happen in the process of the other tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from isoscale.kernels import triton_cast

CASES = Path(__file__).with_name("triton_cases.py")
GROUPS = (
    "formats and mx", "formats and not mx", "roundings", "rules", "blocks and mxfp4", "blocks and mxfp6",
    "blocks and fp8_1x128", "blocks and nvfp4", "both", "offsets or covered",
)  # fmt: skip


def run(group: str, **env: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", str(CASES), "-p", "no:cacheprovider", "-k", group]
    done = subprocess.run(command, env={**os.environ, **env}, text=True, capture_output=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert " passed" in done.stdout


@pytest.mark.skipif(not triton_cast.available(), reason="Triton is not installed")
@pytest.mark.parametrize("group", GROUPS)
def test_interpreted(group: str) -> None:
    run(group, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("group", GROUPS)
def test_on_a_gpu(group: str) -> None:
    run(group)


def test_kernels_are_imported_late_and_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import sys, isoscale.formats\nassert 'isoscale.kernels.triton_kernels' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
    monkeypatch.setenv("ISOSCALE_KERNELS", "off")
    assert not triton_cast.available()


COMPILE = """
import re
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from isoscale.kernels import triton_cast, triton_kernels
from isoscale.kernels.spec import CastSpec

spec = CastSpec(4, 1, 1, 0, 2, 6.0, False, "e4m3", "amax", 1, 16)
fn = triton_kernels.cast
values = dict(OP=1, LAYOUT=0, GIVEN=False, WIDE=True, NB=64, COLS=16, ROWS_B=1, COLS_B=16,
              **triton_cast._constants(spec), **triton_cast._element(spec, "stochastic", 23, -1))
types = dict(out_ptr="*u8", scale_ptr="*u8", tensor_ptr="*fp32", r_ptr="*fp32", d_ptr="*fp32", offset="i64")
signature = {n: "constexpr" if n in values else types.get(n, "*i32" if n.endswith("ptr") else "i32") for n in fn.arg_names}
constants = {(i,): values[n] for i, n in enumerate(fn.arg_names) if n in values}
source = ASTSource(fn=fn, signature=signature, constexprs=constants)
code = compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False}).asm["ptx"]
assert "div.rn.f32" in code
print(re.findall(r"fma\\.\\S*|\\S*\\.ftz\\S*|\\S*\\.approx\\S*", code))
"""


@pytest.mark.skipif(not triton_cast.available(), reason="Triton is not installed")
def test_gpu_code_has_no_fma_and_no_flushing_to_zero(tmp_path: Path) -> None:
    """Compiled for sm_90 without a GPU; the interpreter would accept what the compiler refuses."""
    pytest.importorskip("triton", "3.6")  # the compiler's own interface moves
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", COMPILE], env=env, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "[]"
