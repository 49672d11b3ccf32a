"""A norm and the cast of its result on a GPU by Triton kernels: the same calls as `cpu_norm`, and the same bits.

(RMSNorm's r, a sum of float32 in no fixed order, may differ by some ulp; MXNorm's r is the same to the bit.)

One read and one write. A whole row is held in registers, so rows have at most 32768 values; blocks are powers of two.
float16 goes through float32. With `TRITON_INTERPRET=1` set before Triton is first imported the kernels run on CPU
tensors, slowly: that is how they are tested without a GPU.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from isoscale._base.errors import ConfigError
from isoscale.kernels.cpu import row_codes
from isoscale.kernels.cpu_norm import NormCodes, NormValues, check
from isoscale.kernels.spec import CastSpec, NormSpec
from isoscale.kernels.triton_cast import _constants, _element, _flat, _on, _power, _words, available

__all__ = ["available", "covers", "norm_encode", "norm_encode_both", "norm_fake"]

_LARGEST = 32768  # values of a row, filled up to a power of two of blocks
_PIECE = 4096  # values of a program, where a row is shorter


def covers(spec: CastSpec, width: int) -> bool:
    """Whether the kernels can cast rows of `width` values so: blocks of a power of two, the row in registers."""
    plain = spec.rows == 1 and spec.scale != "none" and spec.bits in (4, 6, 8) and _power(spec.cols, 4, 128)
    return plain and width >= 1 and _padded(-(-width // spec.cols)) * spec.cols <= _LARGEST


def _padded(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _numbers(spec: CastSpec, nan_code: int) -> dict[str, Any]:
    """The format as the kernels take it."""
    found = {**_constants(spec), **_element(spec, "nearest-even", 23, nan_code)}
    return {name: value for name, value in found.items() if name not in ("ROUNDING", "RANDOM")}


def _amax(x: Tensor, tensor_amax: float | None) -> Tensor:
    return torch.full((1,), tensor_amax or 0.0, device=x.device).view(torch.int32)


def _check(x: Tensor, spec: CastSpec, norm: NormSpec, residual: Tensor | None, tensor_amax: float | None) -> None:
    check(x, spec, norm, residual, tensor_amax)
    if norm.stat:
        raise ConfigError("no kernel here for statistic blocks of their own", key="stat", value=norm.stat, hint="0")
    if not covers(spec, x.shape[1]):
        hint = f"blocks of 4 to 128 values, a power of two, and rows of at most {_LARGEST} values"
        raise ConfigError("no norm kernel for such rows", key="spec", value=(spec.cols, x.shape[1]), hint=hint)


def _launch(
    x: Tensor, spec: CastSpec, norm: NormSpec, residual: Tensor | None, amax: Tensor, nan_code: int, out: Tensor,
    scales: Tensor | None, tensor: Tensor,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Runs the kernel on float32 or bfloat16; gives rms and summed."""
    from isoscale.kernels import triton_norm_kernels

    rows, width = x.shape
    count = -(-width // spec.cols)
    padded = _padded(count)
    size = padded * spec.cols
    per = max(1, min(_PIECE // size, _padded(max(rows, 1))))
    rms = torch.empty(rows, dtype=torch.float32, device=x.device)
    summed = None if residual is None else torch.empty_like(x)
    codes = scales is not None
    if rows:
        given, total = (_words(x if part is None else part) for part in (residual, summed))
        with _on(x):
            triton_norm_kernels.norm[(-(-rows // per),)](
                _words(x), given, total, out if codes else _words(out), _flat(scales), rms, amax, tensor, rows, width,
                count, out.shape[1], norm.eps, norm.w_full, norm.w_last, norm.clamp, KIND=norm.kind, RIDE=norm.ride,
                RESIDUAL=residual is not None, CODES=codes, CLAMPED=norm.clamp != math.inf,
                WIDE=x.dtype == torch.float32, OUT_WIDE=out.dtype == torch.float32, ROWS=per, KP=padded,
                COLS=spec.cols, **_numbers(spec, nan_code), enable_fp_fusion=False,
                num_warps=max(1, min(32, per * size // 512)),
            )  # fmt: skip
    return rms, summed


def norm_encode(
    x: Tensor, spec: CastSpec, norm: NormSpec, *, residual: Tensor | None = None, tensor_amax: float | None = None,
    nan_code: int = -1,
) -> NormCodes:  # fmt: skip
    """Packed codes and scales of x / r; see `cpu_norm.norm_encode`."""
    _check(x, spec, norm, residual, tensor_amax)
    if x.dtype == torch.float16:
        summed = x if residual is None else x + residual
        parts = norm_encode(summed.float(), spec, norm, tensor_amax=tensor_amax, nan_code=nan_code)
        return parts._replace(summed=None if residual is None else summed)
    rows, width = x.shape
    codes = torch.empty(rows, row_codes(spec, width) * spec.bits // 8, dtype=torch.uint8, device=x.device)
    kind = torch.float32 if spec.scale == "fp32" else torch.uint8
    scales = torch.empty(rows, -(-width // spec.cols), dtype=kind, device=x.device)
    tensor = torch.ones(1, device=x.device)
    rms, total = _launch(x, spec, norm, residual, _amax(x, tensor_amax), nan_code, codes, scales, tensor)
    return NormCodes(codes, scales, tensor.view(()) if spec.scale == "e4m3" else None, rms, total)


def norm_fake(
    x: Tensor, spec: CastSpec, norm: NormSpec, *, residual: Tensor | None = None, tensor_amax: float | None = None,
    out_dtype: torch.dtype | None = None,
) -> NormValues:  # fmt: skip
    """x / r after a round trip through a format; see `cpu_norm.norm_fake`."""
    _check(x, spec, norm, residual, tensor_amax)
    out_dtype = out_dtype or x.dtype
    if out_dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ConfigError("values come in float32, bfloat16 or float16", key="out_dtype", value=out_dtype)
    if x.dtype == torch.float16:
        summed = x if residual is None else x + residual
        found = norm_fake(summed.float(), spec, norm, tensor_amax=tensor_amax, out_dtype=out_dtype)
        return found._replace(summed=None if residual is None else summed)
    kind = torch.bfloat16 if out_dtype == torch.bfloat16 else torch.float32
    values = torch.empty(x.shape, dtype=kind, device=x.device)
    tensor = torch.ones(1, device=x.device)
    rms, total = _launch(x, spec, norm, residual, _amax(x, tensor_amax), -1, values, None, tensor)
    return NormValues(values.to(out_dtype), rms, total)


def norm_encode_both(
    x: Tensor, spec: CastSpec, norm: NormSpec, *, residual: Tensor | None = None, tensor_amax: float | None = None,
    nan_code: int = -1,
) -> tuple[NormCodes, tuple[Tensor, Tensor]]:  # fmt: skip
    """What `norm_encode` gives, and codes and scales of the same y in blocks along the tokens.

    The second is what a weight gradient multiplies with. No row's r is known before the whole row was read, and
    a block of rows does not fit into registers: so x (with a residual: the sum) is read twice, the second time by a
    launch of its own. y is never written.

    Returns:
        The parts of `norm_encode`; codes uint8 [D, bytes of R codes] and scales [D, ceil(R / block)].

    Raises:
        ConfigError: as `norm_encode`.
    """
    parts = norm_encode(x, spec, norm, residual=residual, tensor_amax=tensor_amax, nan_code=nan_code)
    from isoscale.kernels import triton_norm_kernels

    x = x if parts.summed is None else parts.summed
    x = x.float() if x.dtype == torch.float16 else x
    rows, width = x.shape
    count = -(-rows // spec.cols)
    codes = torch.empty(width, row_codes(spec, rows) * spec.bits // 8, dtype=torch.uint8, device=x.device)
    kind = torch.float32 if spec.scale == "fp32" else torch.uint8
    scales = torch.empty(width, count, dtype=kind, device=x.device)
    per = 64
    if rows:
        with _on(x):
            triton_norm_kernels.turned[(count, -(-width // per))](
                _words(x), codes, _flat(scales), parts.rms, _amax(x, tensor_amax), rows, width, count, codes.shape[1],
                norm.clamp, RIDE=norm.ride, CLAMPED=norm.clamp != math.inf, WIDE=x.dtype == torch.float32, NB=per,
                COLS=spec.cols, **_numbers(spec, nan_code), enable_fp_fusion=False,
                num_warps=max(1, min(8, per * spec.cols // 512)),
            )  # fmt: skip
    return parts, (codes, scales)
