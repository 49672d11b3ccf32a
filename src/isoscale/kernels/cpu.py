"""Casts on a CPU by the compiled kernels: the same bits as the torch reference, in about the time of a copy.

The caller sees to it that tensors are contiguous and that numbers are in range; these functions make the call.
float16 goes through float32, which changes no bit: the last step of a cast is float32 to the tensor's own dtype.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from isoscale._base.errors import ConfigError
from isoscale.kernels.build import available, library, why_not
from isoscale.kernels.spec import CastSpec

__all__ = ["ROUNDINGS", "available", "decode", "encode", "fake_cast", "why_not"]

ROUNDINGS = ("nearest-even", "toward-zero", "nearest-away", "up", "down", "stochastic")
_SCALES = ("none", "e8m0", "e4m3", "fp32")
_RULES = ("floor", "ceil", "even", "rceil", "amax", "none")
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_GROUP = {4: 2, 6: 4, 8: 1}


class _Cast(ctypes.Structure):
    """`struct Cast` of cast.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "out", "scales", "tensor_scale")),
        *((name, ctypes.c_int64) for name in ("L", "R", "n", "row_codes", "rows", "cols")),
        *((name, ctypes.c_int64) for name in ("offset", "step_l", "step_r", "step_c")),
        *((name, ctypes.c_int32) for name in ("strided", "dtype", "bits", "m", "bias", "emin", "emax", "twos")),
        *((name, ctypes.c_int32) for name in ("scale", "rule", "rounding", "random_bits")),
        *((name, ctypes.c_uint32) for name in ("k0", "k1")),
        *((name, ctypes.c_float) for name in ("max", "tensor_amax")),
        *((name, ctypes.c_int32) for name in ("has_amax", "nan_code", "max_code", "inf_code", "threads")),
    )


def _index(name: str, known: tuple[str, ...], key: str) -> int:
    if name not in known:
        raise ConfigError("not known to the kernels", key=key, value=name, hint="one of " + ", ".join(known))
    return known.index(name)


def _blocks(spec: CastSpec, rows: int, n: int) -> tuple[int, int, int, int]:
    """Extent of a block across and along, with 0 as the whole; how many of them."""
    across, along = spec.rows or max(rows, 1), spec.cols or max(n, 1)
    return across, along, -(-rows // across), -(-n // along)


def row_codes(spec: CastSpec, n: int) -> int:
    """Codes of a stored row of `n` values: whole blocks, then whole packs."""
    _, cols, _, count = _blocks(spec, 1, n)
    group = _GROUP[spec.bits]
    return -(-count * cols // group) * group


def _struct(spec: CastSpec, shape: tuple[int, int, int], dtype: torch.dtype, rounding: str) -> _Cast:
    L, R, n = shape
    rows, cols, _, _ = _blocks(spec, R, n)
    return _Cast(
        L=L, R=R, n=n, row_codes=row_codes(spec, n), rows=rows, cols=cols, step_l=R * n, step_r=n, step_c=1,
        dtype=_DTYPES[dtype], bits=spec.bits, m=spec.mantissa_bits, bias=spec.bias, emin=spec.emin, emax=spec.emax,
        twos=spec.twos, scale=_index(spec.scale, _SCALES, "scale"), rule=_index(spec.rule, _RULES, "rule"),
        rounding=_index(rounding, ROUNDINGS, "rounding"), max=spec.max, nan_code=-1, inf_code=-1, max_code=255,
        threads=torch.get_num_threads(),
    )  # fmt: skip


def _prepare(
    x: Tensor, spec: CastSpec, shape: tuple[int, int, int], strided: bool, rounding: str,
    keys: tuple[int, int] | None, random_bits: int, offset: int, tensor_amax: float | None,
) -> _Cast:  # fmt: skip
    if x.numel() != shape[0] * shape[1] * shape[2] or not x.is_contiguous() or x.device.type != "cpu":
        raise ConfigError("the kernels want a contiguous CPU tensor of that size", key="shape", value=shape)
    if rounding == "stochastic" and (keys is None or not 1 <= random_bits <= 23):
        raise ConfigError("stochastic rounding wants keys and 1 to 23 bits", key="random_bits", value=random_bits)
    L, n, columns = shape
    cast = _struct(spec, (L, columns, n) if strided else shape, x.dtype, rounding)
    cast.strided, cast.x, cast.offset, cast.random_bits = strided, x.data_ptr(), offset, random_bits
    if keys is not None:
        cast.k0, cast.k1 = keys
    if tensor_amax is not None:
        cast.has_amax, cast.tensor_amax = 1, tensor_amax
    return cast


def _call(name: str, cast: _Cast) -> None:
    if getattr(library(), name)(ctypes.byref(cast)):
        raise MemoryError("no memory for the working space of a cast")


def fake_cast(
    x: Tensor, spec: CastSpec, shape: tuple[int, int, int], strided: bool = False, *, rounding: str = "nearest-even",
    keys: tuple[int, int] | None = None, random_bits: int = 23, offset: int = 0, tensor_amax: float | None = None,
) -> Tensor:  # fmt: skip
    """Rounds to a format and back; the result has the shape and dtype of `x`.

    Args:
        x: contiguous, on the CPU, float32, bfloat16 or float16.
        spec: the cast; a block extent of 0 is the whole.
        shape: how to read `x`: (L, R, n) with blocks along n, or when strided (L, n, C) with blocks along n.
        strided: see `shape`.
        rounding: one of `ROUNDINGS`.
        keys: two 32-bit words, for stochastic rounding.
        random_bits: how many random bits decide, 1 to 23.
        offset: index of the first element, for the random bits.
        tensor_amax: largest magnitude of the whole tensor, for e4m3 scales; by default that of `x`.

    Raises:
        ConfigError: an unknown name, a wrong size or device.
    """
    if x.dtype == torch.float16:
        wide = fake_cast(
            x.float(), spec, shape, strided, rounding=rounding, keys=keys, random_bits=random_bits, offset=offset,
            tensor_amax=tensor_amax,
        )  # fmt: skip
        return wide.to(torch.float16)
    cast = _prepare(x, spec, shape, strided, rounding, keys, random_bits, offset, tensor_amax)
    out = torch.empty_like(x)
    if x.numel():
        cast.out = out.data_ptr()
        _call("isoscale_fake", cast)
    return out


def encode(
    x: Tensor, spec: CastSpec, shape: tuple[int, int, int], strided: bool = False, *, rounding: str = "nearest-even",
    keys: tuple[int, int] | None = None, random_bits: int = 23, offset: int = 0, tensor_amax: float | None = None,
    nan_code: int = -1,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Rounds to packed codes and scales.

    Args:
        x: as for `fake_cast`, like all that follow but the last.
        spec: see there.
        shape: see there.
        strided: see there.
        rounding: see there.
        keys: see there.
        random_bits: see there.
        offset: see there.
        tensor_amax: see there.
        nan_code: what a NaN becomes, 0 if negative; where it is the code of -0, zeros lose their sign.

    Returns:
        codes, uint8 [L, R, bytes of a row], the axis of the blocks moved to the last place; scales, uint8 or float32
        [L, blocks across, blocks along], None without scales; the tensor scale, 0-d float32, None except for e4m3.

    Raises:
        ConfigError: as `fake_cast`.
    """
    x = x.float() if x.dtype == torch.float16 else x
    steps: tuple[int, int, int] | None = None
    if strided and (spec.cols or shape[1]) % _GROUP[spec.bits] and shape[1] > (spec.cols or shape[1]):
        L, n, columns = shape  # blocks that end inside a byte: as rows, with the random bits of the given order
        x, shape, strided = x.view(shape).transpose(1, 2).contiguous(), (L, columns, n), False
        steps = (n * columns, 1, columns)
    cast = _prepare(x, spec, shape, strided, rounding, keys, random_bits, offset, tensor_amax)
    if steps is not None:
        cast.step_l, cast.step_r, cast.step_c = steps
    cast.nan_code = nan_code
    codes = torch.empty(cast.L, cast.R, cast.row_codes * spec.bits // 8, dtype=torch.uint8)
    scales = tensor_scale = None
    if spec.scale != "none":
        kind = torch.float32 if spec.scale == "fp32" else torch.uint8
        _, _, across, along = _blocks(spec, cast.R, cast.n)
        scales = torch.empty(cast.L, across, along, dtype=kind)
        cast.scales = scales.data_ptr()
    if spec.scale == "e4m3":
        tensor_scale = torch.ones((), dtype=torch.float32)
        cast.tensor_scale = tensor_scale.data_ptr()
    if x.numel():
        cast.out = codes.data_ptr()
        _call("isoscale_encode", cast)
    return codes, scales, tensor_scale


def decode(
    codes: Tensor, scales: Tensor | None, tensor_scale: Tensor | None, spec: CastSpec, shape: tuple[int, int, int],
    dtype: torch.dtype, specials: str = "none",
) -> Tensor:  # fmt: skip
    """The values of packed codes, [L, R, n] in `dtype`.

    Args:
        codes: as `encode` gives them, contiguous, on the CPU.
        scales: likewise, or None.
        tensor_scale: likewise, or None.
        spec: the cast they come from.
        shape: (L, R, n).
        dtype: float32, bfloat16 or float16.
        specials: what the top codes mean: `ieee`, `fn`, `fnuz` or `none`.

    Raises:
        ConfigError: tensors of a wrong size.
    """
    if dtype == torch.float16:
        return decode(codes, scales, tensor_scale, spec, shape, torch.float32, specials).to(dtype)
    cast = _struct(spec, shape, dtype, "nearest-even")
    L, R, n = shape
    _, _, across, along = _blocks(spec, R, n)
    want = L * R * cast.row_codes * spec.bits // 8
    if codes.numel() != want or (scales is not None and scales.numel() != L * across * along):
        raise ConfigError("codes or scales of another size than the shape wants", key="shape", value=shape)
    if (scales is None) != (spec.scale == "none") or (tensor_scale is None) != (spec.scale != "e4m3"):
        raise ConfigError("scales are missing, or too many", key="scales", value=spec.scale)
    half = 1 << (spec.bits - 1)
    cast.max_code = half - {"ieee": (1 << spec.mantissa_bits) + 1, "fn": 2}.get(specials, 1)
    cast.inf_code = cast.max_code + 1 if specials == "ieee" else -1
    cast.nan_code = half if specials == "fnuz" else -1
    out = torch.empty(shape, dtype=dtype)
    if out.numel():
        cast.x, cast.out = codes.data_ptr(), out.data_ptr()
        cast.scales = None if scales is None else scales.data_ptr()
        cast.tensor_scale = None if tensor_scale is None else tensor_scale.data_ptr()
        _call("isoscale_decode", cast)
    return out
