"""The Triton norm kernels against the torch reference; run by test_norm_triton.py, interpreted or on a GPU."""

from __future__ import annotations

import os

import pytest
import torch
from cast_oracle import same, spec_of
from norm_oracle import AMAX, check, divided, hard_rows, norm_spec

from isoscale import formats
from isoscale._base.errors import ConfigError
from isoscale.formats.block import BlockFormat
from isoscale.kernels import build, cpu_norm, triton_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FULL = DEVICE == "cuda" or os.environ.get("ISOSCALE_FULL") == "1"  # the interpreter takes 0.1 s for a launch
NAMES = ("mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e3m2", "mxfp6_e2m3", "mxfp4", "mxint8", "nvfp4", "fp8_1x128_e4m3")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COMPILED = build.available()
LIMIT = 8  # ulp of RMSNorm's r; of MXNorm's r the bits are those of the CPU kernel, which has 4


@pytest.fixture(autouse=True)
def _reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISOSCALE_KERNELS", "off")


def block(name: str) -> BlockFormat:
    found = formats.by_name(name)
    assert isinstance(found, BlockFormat)
    return found


def run(x: torch.Tensor, name: str | BlockFormat, kind: str, eps: float = 1e-5, **how: object) -> None:
    """Against the reference; and r against the CPU's to the bit, where it is a sum of integers."""
    fmt = block(name) if isinstance(name, str) else name
    residual = how.pop("residual", None)
    norm = norm_spec(kind, x.shape[1], fmt, eps, **how)  # type: ignore[arg-type]
    dtypes = (None, torch.float32) if FULL else (None,)
    rms = check(triton_norm, x, fmt, norm, residual=residual, device=DEVICE, limit=LIMIT, out_dtypes=dtypes)  # type: ignore[arg-type]
    if kind != "rms" and COMPILED:
        h = x if residual is None else x + residual
        amax = AMAX if fmt.scale == "e4m3" else None
        assert same(rms, cpu_norm.norm_fake(h, spec_of(fmt), norm, tensor_amax=amax).rms)


@pytest.mark.parametrize("name", NAMES)
def test_formats(name: str) -> None:
    own = NAMES.index(name)
    for at, dtype in enumerate(DTYPES):
        for kind in cpu_norm.KINDS:
            if FULL or at == own % 3 or kind == "mx2":
                width = (1, 70, 256)[(at + own) % 3]
                run(hard_rows(width, dtype), name, kind, 0.0 if at == 0 else 1e-5)


@pytest.mark.parametrize("rule", ["floor", "ceil", "even", "rceil"])
def test_rules(rule: str) -> None:
    for name in ("mxfp8_e4m3", "fp8_1x128_e4m3") if FULL else ("mxfp8_e4m3",):
        x = torch.cat([hard_rows(96, torch.float32, seed) for seed in range(3)])
        run(x, block(name).with_(scale_rule=rule), "mx2", 0.0)


@pytest.mark.parametrize("name", NAMES if FULL else ("mxfp8_e4m3", "mxint8", "nvfp4"))
def test_clamp_residual_and_ride(name: str) -> None:
    for dtype in DTYPES if FULL else DTYPES[:2]:
        x, other = hard_rows(100, dtype), hard_rows(100, dtype, 1).flip(0)
        run(x, name, "mx2", clamp=1.5)
        run(x, name, "mx1", residual=other)
        run(x, name, "rms", residual=other)
        run(x, name, "mx2", ride=True)


def test_wide_rows_and_many_rows() -> None:
    g = torch.Generator().manual_seed(0)
    run(torch.randn(2, 5000, generator=g).bfloat16(), "mxfp8_e4m3", "mx2")
    run(torch.randn(2, 5000, generator=g), "mxfp8_e4m3", "rms")
    run(torch.randn(67, 40, generator=g), "mxfp6_e2m3", "mx2")


@pytest.mark.parametrize("name", ["mxfp8_e4m3", "mxfp6_e3m2", "nvfp4"])
def test_both_encodings(name: str) -> None:
    fmt = block(name)
    amax = AMAX if fmt.scale == "e4m3" else None
    nan_code = -1 if fmt.element.nan_code is None else fmt.element.nan_code
    for how in ({}, {"clamp": 1.5}, {"ride": True}):
        x = torch.cat([hard_rows(72, torch.bfloat16), hard_rows(72, torch.bfloat16, 1)])  # 30 rows: no whole blocks of 32
        norm = norm_spec("mx2", 72, fmt, **how)  # type: ignore[arg-type]
        parts, (codes, scales) = triton_norm.norm_encode_both(
            x.to(DEVICE), spec_of(fmt), norm, residual=x.flip(0).to(DEVICE), tensor_amax=amax, nan_code=nan_code
        )
        y = divided(x + x.flip(0), parts.rms.cpu(), norm)
        known = None if amax is None else torch.tensor(amax)
        for axis, found in ((-1, parts[:2]), (0, (codes, scales))):
            want = formats.encode(y, fmt, axis=axis, tensor_amax=known)
            assert same(found[0].cpu(), want.codes)
            assert same(found[1].cpu(), want.scales)


def test_no_rows_and_refusals() -> None:
    fmt = block("mxfp4")
    spec, norm = spec_of(fmt), norm_spec("mx2", 32, fmt)
    assert triton_norm.norm_encode_both(torch.empty(0, 32, device=DEVICE), spec, norm)[1][0].shape == (32, 0)
    assert triton_norm.norm_fake(torch.empty(0, 32, device=DEVICE), spec, norm).values.shape == (0, 32)
    assert triton_norm.covers(spec, 32768)
    assert not triton_norm.covers(spec, 32769)
    assert not triton_norm.covers(spec._replace(cols=24), 32)
    x = torch.ones(2, 48, device=DEVICE)
    with pytest.raises(ConfigError, match="no norm kernel"):
        triton_norm.norm_encode(x, spec._replace(cols=24), norm)
    with pytest.raises(ConfigError, match="tensor_amax"):
        triton_norm.norm_fake(x, spec_of(block("nvfp4")), norm)
    with pytest.raises(ConfigError, match="out_dtype"):
        triton_norm.norm_fake(x, spec, norm, out_dtype=torch.float64)
