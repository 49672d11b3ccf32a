"""The Triton kernels against the definition of a cast; run by test_triton.py, interpreted or on a GPU."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from cast_oracle import Answer, draw, edges, same, spec_of, unpacked

from isoscale._base.errors import ConfigError
from isoscale.formats.block import BLOCKS, BlockFormat, by_name
from isoscale.formats.element import ElementFormat
from isoscale.kernels import triton_cast

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FULL = DEVICE == "cuda" or os.environ.get("ISOSCALE_FULL") == "1"  # the interpreter takes 0.1 s for a launch
KEYS = (0x12345678, 0x9ABCDEF0)
NAMES = [f.name for f in BLOCKS] + ["e4m3", "e5m2", "e2m1", "e3m2", "int8", "e4m3_fnuz"]
Any_ = ElementFormat | BlockFormat


def nan_code(fmt: Any_) -> int:
    element = fmt if isinstance(fmt, ElementFormat) else fmt.element
    return next((codes[0] for codes in element.nan_codes if codes), -1)


def check(x: torch.Tensor, fmt: Any_, shape: tuple[int, int, int], strided: bool = False, *,
          block: tuple[int, int] | None = None, **how: object) -> None:  # fmt: skip
    spec = spec_of(fmt, *(block or (None, None)))
    element = fmt if isinstance(fmt, ElementFormat) else fmt.element
    if how.get("rounding") == "stochastic":
        how = {"keys": KEYS, "random_bits": 23, **how}
    want = Answer(x, fmt, spec, shape, strided, **{("random_bits_" if k == "random_bits" else k): v for k, v in how.items()})  # type: ignore[arg-type]
    there = x.to(DEVICE)
    if element.has_negative_zero or spec.twos:
        got = triton_cast.fake_cast(there, spec, shape, strided, **how)  # type: ignore[arg-type]
        assert same(got.cpu().reshape(shape), want.in_shape(x.dtype, strided))
    parts = triton_cast.encode(there, spec, shape, strided, nan_code=nan_code(fmt), **how)  # type: ignore[arg-type]
    compare(parts, want, spec.bits)
    back = triton_cast.decode(*parts, spec, tuple(want.values.shape), x.dtype, element.specials)  # type: ignore[arg-type]
    values = want.values if element.has_negative_zero else torch.where(want.values == 0, 0.0, want.values)
    if element.has_nan or spec.scale != "none":
        assert same(back.cpu(), values.to(x.dtype))


def compare(parts: triton_cast.Parts, want: Answer, bits: int) -> None:
    codes, scales, tensor = (None if part is None else part.cpu() for part in parts)
    assert codes is not None
    assert codes.shape == want.codes.shape
    width, loose = want.loose.shape[-1], unpacked(codes.numpy(), bits)
    assert (loose[..., width:] == 0).all()
    assert ((loose[..., :width] == want.loose) | np.broadcast_to(want.special, want.loose.shape)).all()
    assert (scales is None) == (want.scales is None)
    if scales is not None:
        assert same(scales, torch.from_numpy(want.scales))
    if tensor is not None:
        assert float(tensor) == float(want.tensor_scale)


@pytest.mark.parametrize("name", NAMES)
def test_formats(name: str) -> None:
    fmt = by_name(name)
    own = NAMES.index(name)
    for seed, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16)):
        if not FULL and seed != own % 3:
            continue
        x = draw((2, 9, 70), seed, dtype, special=dtype != torch.float32, wide=True)
        check(x, fmt, (2, 9, 70))
        if isinstance(fmt, ElementFormat) or (fmt.block[0] == 1 and fmt.block[1]):
            check(x, fmt, (2, 9, 70), True)


@pytest.mark.parametrize("rounding", ["toward-zero", "nearest-away", "up", "down", "stochastic"])
def test_roundings(rounding: str) -> None:
    names = ("mxfp8_e4m3", "mxint8", "nvfp4", "mxfp6_e2m3", "fp8_row_e5m2")
    for name in names if FULL else names[:2]:
        x = draw((3, 8, 65), 5, special=True)
        check(x, by_name(name), (3, 8, 65), rounding=rounding)
        if name != "fp8_row_e5m2":
            check(x, by_name(name), (3, 8, 65), True, rounding=rounding)


@pytest.mark.parametrize("rule", ["floor", "ceil", "even", "rceil", "amax"])
def test_rules(rule: str) -> None:
    names = ("fp8_1x128_e5m2", "mxfp8_e4m3", "mxfp4", "mxint8")
    for name in names if FULL else names[:2]:
        fmt = by_name(name)
        if rule != "amax" or fmt.scale == "fp32":
            fmt = fmt.with_(scale_rule=rule, block=(1, 32))
            x = edges(spec_of(fmt))
            check(x, fmt, (1, *x.shape))
            check(x.bfloat16().t().contiguous(), fmt, (1, *x.t().shape), True)


@pytest.mark.parametrize("name", ["mxfp4", "mxfp6_e3m2", "fp8_1x128_e4m3", "nvfp4"])
@pytest.mark.parametrize("block", [(1, 16), (1, 4), (16, 16), (32, 8), (128, 128), (1, 5), (3, 700), (0, 32), (1, 0), (0, 0)])
def test_blocks(block: tuple[int, int], name: str) -> None:
    x = draw((1, 33, 40), 3, torch.bfloat16, special=True, wide=True)
    check(x, by_name(name), (1, 33, 40), block=block)
    if block[0] == 1 and block[1] in (4, 16):
        check(x, by_name(name), (1, 33, 40), True, block=block)


def test_tensor_amax_and_offsets() -> None:
    x = draw((1, 8, 64), 2)
    for amax in (0.0, 3.0, 3.4e38):
        check(x, by_name("nvfp4"), (1, 8, 64), tensor_amax=amax)
    for offset in (2**32 - 100, 2**40 + 17):
        for bits in (1, 23):
            check(x, by_name("mxfp4"), (1, 8, 64), rounding="stochastic", offset=offset, random_bits=bits)


@pytest.mark.parametrize("name", ["mxfp8_e4m3", "mxfp6_e3m2", "mxfp4", "nvfp4", "mxint8"])
def test_both_encodings_from_one_read(name: str) -> None:
    fmt = by_name(name)
    spec = spec_of(fmt)
    for shape, dtype in (((64, 64), torch.float32), ((70, 33), torch.bfloat16)):
        for how in ({}, {"rounding": "stochastic", "keys": KEYS}):
            x = draw(shape, 7, dtype, special=True)
            along, across = triton_cast.encode_both(x.to(DEVICE), spec, shape, nan_code=nan_code(fmt), **how)  # type: ignore[arg-type]
            compare(along, Answer(x, fmt, spec, (1, *shape), **how), spec.bits)  # type: ignore[arg-type]
            compare(across, Answer(x, fmt, spec, (1, *shape), True, **how), spec.bits)  # type: ignore[arg-type]


def test_what_is_not_covered_is_refused() -> None:
    spec = spec_of(by_name("mxfp4"))
    assert triton_cast.covers(spec, True)
    assert triton_cast.covers(spec._replace(cols=5), False)
    assert not triton_cast.covers(spec._replace(cols=5), True)
    with pytest.raises(ConfigError, match="no kernel"):
        triton_cast.fake_cast(torch.ones(1, 5, 2, device=DEVICE), spec._replace(cols=5), (1, 5, 2), True)
    with pytest.raises(ConfigError, match="both ways"):
        triton_cast.encode_both(torch.ones(8, 8, device=DEVICE), spec._replace(cols=128), (8, 8))
