"""A norm and the cast of its result in one pass over memory, on a CPU: the bits of the norm's r followed by a cast.

MXNorm (arXiv 2603.13180) and, as its fair measure, RMSNorm without a gain. y = x (1 / r) is never written in full
precision, only codes or rounded values. All arithmetic is in float32; float16 goes through it.

What r is for MXNorm, to the bit on every device: with e = floor(log2 max_k m_k) (0 for a row of zeros), v_k = m_k 2^-e,
and n_k = trunc(2^36 v_k^p), the square rounded to float32,

    r = ((w_full float(n_1 + ... + n_(K-1)) + w_last float(n_K)) 2^-36)^(1/p) 2^e + eps

with integers in the sum, so that no order of adding changes it, and no square overflows or vanishes. It is within 4 ulp
of the exact value. A row with an inf or a NaN has r = NaN and is NaN as a whole. 1 / r is 0 for r = 0, and at most the
largest float32.
"""

from __future__ import annotations

import ctypes
import math
from typing import NamedTuple

import torch
from torch import Tensor

from isoscale._base.errors import ConfigError, did_you_mean
from isoscale.kernels import cpu
from isoscale.kernels.build import available, library, why_not
from isoscale.kernels.spec import CastSpec, NormSpec

__all__ = ["KINDS", "NormCodes", "NormValues", "available", "covers", "norm_encode", "norm_fake", "why_not"]

KINDS = ("mx1", "mx2", "rms")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class NormCodes(NamedTuple):
    """What `norm_encode` gives.

    Args:
        codes: uint8 [R, bytes of a row].
        scales: uint8 or float32 [R, K].
        tensor_scale: 0-d float32, e4m3 scales only.
        rms: float32 [R], the divisor r.
        summed: [R, D] in the dtype of x: x + residual, if there was one.
    """

    codes: Tensor
    scales: Tensor
    tensor_scale: Tensor | None
    rms: Tensor
    summed: Tensor | None


class NormValues(NamedTuple):
    """What `norm_fake` gives: values [R, D], and `rms` and `summed` as in `NormCodes`."""

    values: Tensor
    rms: Tensor
    summed: Tensor | None


class _Norm(ctypes.Structure):
    """`struct Norm` of norm.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("residual", "summed", "rms")),
        *((name, ctypes.c_float) for name in ("eps", "w_full", "w_last", "clamp")),
        *((name, ctypes.c_int32) for name in ("kind", "ride", "out_dtype", "fake", "stat")),
    )


def covers(spec: CastSpec, width: int) -> bool:
    """Whether the kernels can cast rows of `width` values so: scaled blocks along the row, of 4, 6 or 8 bits."""
    return spec.rows == 1 and spec.scale != "none" and spec.bits in (4, 6, 8) and 1 <= width < 1 << 31


def check(x: Tensor, spec: CastSpec, norm: NormSpec, residual: Tensor | None, tensor_amax: float | None) -> None:
    """Refuses what no kernel can do; the Triton kernels use it too.

    Raises:
        ConfigError: says what is wrong.
    """
    if norm.kind not in KINDS:
        raise ConfigError("no such norm", key="kind", value=norm.kind, hint=did_you_mean(norm.kind, KINDS))
    if x.dim() != 2 or not x.is_contiguous() or x.dtype not in _DTYPES:
        message = "the norm kernels want a contiguous matrix in float32, bfloat16 or float16"
        raise ConfigError(message, key="x", value=(tuple(x.shape), x.dtype), hint="x.reshape(-1, D).contiguous()")
    if not covers(spec, x.shape[1]):
        raise ConfigError("no norm kernel for such blocks", key="spec", value=spec, hint="scaled blocks along the row")
    if not (norm.eps >= 0 and norm.clamp > 0 and math.isfinite(norm.eps)):
        raise ConfigError("eps must be finite and not negative, clamp above 0", key="norm", value=norm)
    if norm.stat < 0 or (norm.stat and (norm.kind == "rms" or (spec.cols or x.shape[1]) % norm.stat)):
        message = "statistic blocks must divide those of the scales, and RMSNorm has none"
        raise ConfigError(message, key="stat", value=norm.stat, hint="8")
    if norm.ride and norm.clamp != math.inf:
        raise ConfigError("what rides undivided cannot be clamped", key="clamp", value=norm.clamp, hint="ride=False")
    if spec.scale == "e4m3" and tensor_amax is None:
        hint = "a bound of the normalised values (of x itself when it rides)"
        raise ConfigError("e4m3 scales need the tensor's largest magnitude before", key="tensor_amax", hint=hint)
    if residual is not None:
        same = residual.shape == x.shape and residual.dtype == x.dtype and residual.device == x.device
        if not same or not residual.is_contiguous():
            value = (tuple(residual.shape), residual.dtype)
            raise ConfigError("the residual must be as x is, and contiguous", key="residual", value=value)


def _call(
    x: Tensor, spec: CastSpec, norm: NormSpec, residual: Tensor | None, tensor_amax: float | None, nan_code: int,
    out: Tensor, scales: Tensor | None, tensor_scale: Tensor | None, fake: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Runs the kernel on float32 or bfloat16; gives rms and summed."""
    if x.device.type != "cpu":
        raise ConfigError("a tensor on another device than the CPU", key="device", value=str(x.device))
    rows, width = x.shape
    cast = cpu._struct(spec, (1, rows, width), x.dtype, "nearest-even")
    cast.nan_code, cast.x, cast.out = nan_code, x.data_ptr(), out.data_ptr()
    if tensor_amax is not None:
        cast.has_amax, cast.tensor_amax = 1, tensor_amax
    if scales is not None:
        cast.scales = scales.data_ptr()
    if tensor_scale is not None:
        cast.tensor_scale = tensor_scale.data_ptr()
    rms = torch.empty(rows, dtype=torch.float32)
    summed = None if residual is None else torch.empty_like(x)
    given = _Norm(
        rms=rms.data_ptr(), eps=norm.eps, w_full=norm.w_full, w_last=norm.w_last, clamp=norm.clamp,
        kind=KINDS.index(norm.kind), ride=norm.ride, out_dtype=int(out.dtype == torch.bfloat16), fake=fake,
        stat=norm.stat,
    )  # fmt: skip
    if residual is not None and summed is not None:
        given.residual, given.summed = residual.data_ptr(), summed.data_ptr()
    if library().isoscale_norm(ctypes.byref(cast), ctypes.byref(given)):
        raise MemoryError("no memory for the working space of a norm")
    return rms, summed


def norm_encode(
    x: Tensor, spec: CastSpec, norm: NormSpec, *, residual: Tensor | None = None, tensor_amax: float | None = None,
    nan_code: int = -1,
) -> NormCodes:  # fmt: skip
    """Packed codes and scales of x / r.

    Args:
        x: [R, D], contiguous, float32, bfloat16 or float16.
        spec: the cast, nearest-even; scaled blocks along the row (`covers`).
        norm: what r is; see the module.
        residual: as x; then x + residual, rounded to the dtype of x, is normalised and returned too.
        tensor_amax: for e4m3 scales, a bound of the values that are cast.
        nan_code: as in `cpu.encode`.

    Returns:
        See `NormCodes`. Codes and scales are those of `cpu.encode` of the float32 tensor x (1 / r).

    Raises:
        ConfigError: an unknown norm, another layout, no tensor_amax where one is needed.
    """
    check(x, spec, norm, residual, tensor_amax)
    if x.dtype == torch.float16:
        summed = x if residual is None else x + residual
        parts = norm_encode(summed.float(), spec, norm, tensor_amax=tensor_amax, nan_code=nan_code)
        return parts._replace(summed=None if residual is None else summed)
    rows, width = x.shape
    codes = torch.empty(rows, cpu.row_codes(spec, width) * spec.bits // 8, dtype=torch.uint8)
    kind = torch.float32 if spec.scale == "fp32" else torch.uint8
    scales = torch.empty(rows, -(-width // (spec.cols or width)), dtype=kind)
    tensor_scale = torch.ones((), dtype=torch.float32) if spec.scale == "e4m3" else None
    rms, total = _call(x, spec, norm, residual, tensor_amax, nan_code, codes, scales, tensor_scale, False)
    return NormCodes(codes, scales, tensor_scale, rms, total)


def norm_fake(
    x: Tensor, spec: CastSpec, norm: NormSpec, *, residual: Tensor | None = None, tensor_amax: float | None = None,
    out_dtype: torch.dtype | None = None,
) -> NormValues:  # fmt: skip
    """x / r after a round trip through a format.

    Args:
        x: as for `norm_encode`, like all that follow but the last.
        spec: see there.
        norm: see there.
        residual: see there.
        tensor_amax: see there.
        out_dtype: float32, bfloat16 or float16; by default that of x.

    Returns:
        See `NormValues`. The values are those of `cpu.fake_cast` of the float32 tensor x (1 / r), in `out_dtype`.

    Raises:
        ConfigError: as `norm_encode`.
    """
    check(x, spec, norm, residual, tensor_amax)
    out_dtype = out_dtype or x.dtype
    if out_dtype not in _DTYPES:
        raise ConfigError("values come in float32, bfloat16 or float16", key="out_dtype", value=out_dtype)
    wide = x
    if x.dtype == torch.float16:
        wide = (x if residual is None else x + residual).float()
    given = None if wide is not x else residual
    values = torch.empty(x.shape, dtype=torch.bfloat16 if out_dtype == torch.bfloat16 else torch.float32)
    rms, summed = _call(wide, spec, norm, given, tensor_amax, -1, values, None, None, True)
    if wide is not x and residual is not None:
        summed = wide.to(x.dtype)
    return NormValues(values.to(out_dtype), rms, summed)
