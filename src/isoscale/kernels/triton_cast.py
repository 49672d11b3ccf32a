"""Casts on a GPU by Triton kernels: the same bits and the same calls as `cpu`.

Blocks of a power of two along an axis, and tiles of powers of two, take one read and one write; per-tensor, per-row and
odd blocks read twice (the largest magnitudes come from torch), E4M3 scales read twice too (for the tensor's amax).
float16 goes through float32, which changes no bit. With `TRITON_INTERPRET=1` set before Triton is first imported the
kernels run on CPU tensors, slowly: that is how they are tested without a GPU.

`torch.compile` does not look into these calls; `isoscale.formats` wraps them as a custom operator.
"""

from __future__ import annotations

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from isoscale._base.errors import ConfigError
from isoscale.kernels.cpu import ROUNDINGS, row_codes
from isoscale.kernels.spec import CastSpec

Parts = tuple[Tensor, Tensor | None, Tensor | None]
_PIECE = 4096  # values of a program
_SIDE = 64  # of a square that is encoded both ways


def available() -> bool:
    """Whether Triton is installed, and not switched off by ISOSCALE_KERNELS=off."""
    off = os.environ.get("ISOSCALE_KERNELS", "").lower() == "off"
    return not off and importlib.util.find_spec("triton") is not None


def _power(n: int, low: int, high: int) -> bool:
    return low <= n <= high and n & (n - 1) == 0


def covers(spec: CastSpec, strided: bool) -> bool:
    """Whether the kernels can do such a cast: all but blocks of odd or large size along a middle dimension."""
    return not strided or spec.scale == "none" or (spec.rows == 1 and _power(spec.cols, 4, 128))


def _constants(spec: CastSpec) -> dict[str, Any]:
    word = torch.tensor(spec.max, dtype=torch.float32).view(torch.int32).item()
    above = {"ceil": 0, "rceil": int(word) & 0x7FFFFF}.get(spec.rule, 0x7FFFFF)
    add = 1 << (22 - spec.mantissa_bits) if spec.rule == "even" else 0
    return {"MAX": spec.max, "EMAX": spec.emax, "SCALE": spec.scale, "RULE": spec.rule, "ADD": add, "ABOVE": above}


def _element(spec: CastSpec, rounding: str, random_bits: int, nan_code: int) -> dict[str, Any]:
    word = torch.tensor(spec.max, dtype=torch.float32).view(torch.int32).item()
    return {
        "TOP": int(word), "EMIN": spec.emin, "M": spec.mantissa_bits, "BITS": spec.bits, "TWOS": spec.twos,
        "ROUNDING": rounding, "RANDOM": random_bits if rounding == "stochastic" else 1, "NAN": nan_code,
    }  # fmt: skip


def _on(x: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _words(x: Tensor) -> Tensor:
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def _warps(values: int) -> int:
    return max(1, min(8, values // 512))


class _Run:
    """One cast: its shapes, its scratch tensors and its launches."""

    def __init__(
        self, x: Tensor, spec: CastSpec, shape: tuple[int, int, int], strided: bool, rounding: str,
        keys: tuple[int, int] | None, random_bits: int, offset: int, tensor_amax: float | None, nan_code: int,
    ) -> None:  # fmt: skip
        if x.numel() != shape[0] * shape[1] * shape[2] or not x.is_contiguous():
            raise ConfigError("the kernels want a contiguous tensor of that size", key="shape", value=shape)
        if rounding not in ROUNDINGS or (rounding == "stochastic" and (keys is None or not 1 <= random_bits <= 23)):
            raise ConfigError("a rounding that the kernels do not know, or no keys", key="rounding", value=rounding)
        if not covers(spec, strided):
            raise ConfigError("no kernel for such blocks along a middle dimension", key="block", value=spec.cols)
        self.x, self.spec, self.strided = x, spec, strided
        self.L, self.R, self.n = (shape[0], shape[2], shape[1]) if strided else shape
        self.rows, self.cols = spec.rows or max(self.R, 1), spec.cols or max(self.n, 1)
        self.Rb, self.Kb = -(-self.R // self.rows), -(-self.n // self.cols)
        self.row_bytes = row_codes(spec, self.n) * spec.bits // 8
        tile = self.rows > 1 and _power(self.rows, 2, 128) and _power(self.cols, 4, 128) and self.rows * self.cols >= 64
        self.layout = 1 if strided else 2 if tile and spec.scale != "none" else 0
        self.given = spec.scale != "none" and not (
            self.layout == 2 or (self.rows == 1 and _power(self.cols, 4, 128))
        )
        self.width = 64 if spec.scale == "none" or self.given else self.cols
        if strided and spec.scale == "none":
            self.width = 32
        self.K = -(-self.n // self.width)
        if spec.scale == "none" or self.given:  # the row's padding is stored too
            self.K = max(self.K, -(-row_codes(spec, self.n) // self.width))
        first, second = keys or (0, 0)
        signed = [key - (1 << 32) if key >> 31 else key for key in (first, second)]
        self.random = {"offset": offset, "k0": signed[0], "k1": signed[1]}
        self.constants = {**_constants(spec), **_element(spec, rounding, random_bits, nan_code)}
        self.amax = torch.zeros(1, dtype=torch.int32, device=x.device)
        self.r = self.d = self.tensor = torch.ones(1, device=x.device)
        self.stored: Tensor | None = None
        if spec.scale != "none":
            kind = torch.float32 if spec.scale == "fp32" else torch.uint8
            self.stored = torch.empty(self.L, self.Rb, self.Kb, dtype=kind, device=x.device)
        if x.numel():
            self._amax(tensor_amax)

    def _amax(self, tensor_amax: float | None) -> None:
        from isoscale.kernels import triton_kernels

        known = None
        if self.given:
            bits = _words(self.x).view(self.L, self.R, self.n)
            bits = bits & 0x7FFFFFFF if bits.dtype == torch.int32 else (bits.to(torch.int32) & 0x7FFF) << 16
            bits = pad(bits, (0, self.Kb * self.cols - self.n, 0, self.Rb * self.rows - self.R))
            known = bits.view(self.L, self.Rb, self.rows, self.Kb, self.cols).amax((2, 4))
        if self.spec.scale == "e4m3":
            if tensor_amax is not None:
                self.amax = torch.full((1,), tensor_amax, device=self.x.device).view(torch.int32)
            elif known is not None:
                self.amax = torch.where(known >= 0x7F800000, 0, known).amax().view(1)
            else:
                self.launch(2, self.x)
        if known is not None and self.stored is not None:
            self.r, self.d = (torch.empty(known.shape, device=self.x.device) for _ in range(2))
            self.tensor = torch.ones(1, device=self.x.device)
            count, size = known.numel(), 256
            with _on(self.x):
                triton_kernels.scales[(-(-count // size),)](
                    known, self.r, self.d, _flat(self.stored), self.tensor, self.amax, count, SIZE=size,
                    **_constants(self.spec), enable_fp_fusion=False,
                )  # fmt: skip

    def launch(self, op: int, out: Tensor) -> None:
        """Runs the kernel: 0 values, 1 codes, 2 the tensor's amax."""
        from isoscale.kernels import triton_kernels

        per = self.rows if self.layout == 2 else max(1, _PIECE // self.width) if self.layout == 0 else 64
        units = self.L * self.R * self.K
        grid = ((-(-units // per),), (self.L * self.K, -(-self.R // per)), (self.L * self.Rb * self.K,))[self.layout]
        with _on(self.x):
            triton_kernels.cast[grid](
                _words(self.x), out if out.dtype == torch.uint8 else _words(out), _flat(self.stored), self.amax,
                self.tensor, self.r, self.d, self.R, self.n, self.R, self.K, self.Kb, self.Rb, units, self.row_bytes,
                **self.random, OP=op, LAYOUT=self.layout, GIVEN=self.given, WIDE=self.x.dtype == torch.float32, NB=per,
                COLS=self.width, ROWS_B=self.rows, COLS_B=self.cols, **self.constants, enable_fp_fusion=False,
                num_warps=_warps(per * self.width),
            )  # fmt: skip


def _flat(scales: Tensor | None) -> Tensor | None:
    return scales.view(torch.int32) if scales is not None and scales.dtype == torch.float32 else scales


def fake_cast(
    x: Tensor, spec: CastSpec, shape: tuple[int, int, int], strided: bool = False, *, rounding: str = "nearest-even",
    keys: tuple[int, int] | None = None, random_bits: int = 23, offset: int = 0, tensor_amax: float | None = None,
) -> Tensor:  # fmt: skip
    """Rounds to a format and back; see `cpu.fake_cast`."""
    wide = x.float() if x.dtype == torch.float16 else x
    run = _Run(wide, spec, shape, strided, rounding, keys, random_bits, offset, tensor_amax, -1)
    out = torch.empty_like(wide)
    if x.numel():
        run.launch(0, out)
    return out.to(x.dtype)


def encode(
    x: Tensor, spec: CastSpec, shape: tuple[int, int, int], strided: bool = False, *, rounding: str = "nearest-even",
    keys: tuple[int, int] | None = None, random_bits: int = 23, offset: int = 0, tensor_amax: float | None = None,
    nan_code: int = -1,
) -> Parts:  # fmt: skip
    """Rounds to packed codes and scales; see `cpu.encode`."""
    x = x.float() if x.dtype == torch.float16 else x
    run = _Run(x, spec, shape, strided, rounding, keys, random_bits, offset, tensor_amax, nan_code)
    codes = torch.empty(run.L, run.R, run.row_bytes, dtype=torch.uint8, device=x.device)
    if x.numel():
        run.launch(1, codes)
    return codes, run.stored, run.tensor.view(()) if spec.scale == "e4m3" else None


def encode_both(
    x: Tensor, spec: CastSpec, shape: tuple[int, int], *, rounding: str = "nearest-even",
    keys: tuple[int, int] | None = None, random_bits: int = 23, offset: int = 0, nan_code: int = -1,
) -> tuple[Parts, Parts]:  # fmt: skip
    """Both encodings of a matrix [R, n] from one read of it: along its rows, and along its columns.

    The second is not the first one turned: its blocks and scales are others.

    Returns:
        What `encode` gives for (1, R, n), and what it gives, strided, for (1, R, n).

    Raises:
        ConfigError: blocks are not of 4 to 64 values, a power of two, with a scale.
    """
    if spec.rows != 1 or not _power(spec.cols, 4, _SIDE) or spec.scale == "none":
        hint = "blocks of 4 to 64 values, a power of two"
        raise ConfigError("such blocks cannot be cast both ways at once", key="block", value=spec.cols, hint=hint)
    from isoscale.kernels import triton_kernels

    x = x.float() if x.dtype == torch.float16 else x
    settings: Any = (rounding, keys, random_bits, offset, None, nan_code)
    runs = [_Run(x, spec, (1, *shape), strided, *settings) for strided in (False, True)]
    codes = [torch.empty(1, run.R, run.row_bytes, dtype=torch.uint8, device=x.device) for run in runs]
    tensor = torch.ones(2, device=x.device)
    rows, n = shape
    if x.numel():
        with _on(x):
            triton_kernels.cast_both[(-(-rows // _SIDE), -(-n // _SIDE))](
                _words(x), codes[0], _flat(runs[0].stored), codes[1], _flat(runs[1].stored),
                torch.cat([run.amax for run in runs]), tensor, rows, n, runs[0].row_bytes, runs[1].row_bytes,
                **runs[0].random, WIDE=x.dtype == torch.float32, SIDE=_SIDE, COLS=spec.cols, **runs[0].constants,
                enable_fp_fusion=False, num_warps=8,
            )  # fmt: skip
    last = [tensor[at] if spec.scale == "e4m3" else None for at in range(2)]
    return (codes[0], runs[0].stored, last[0]), (codes[1], runs[1].stored, last[1])


def decode(
    codes: Tensor, scales: Tensor | None, tensor_scale: Tensor | None, spec: CastSpec, shape: tuple[int, int, int],
    dtype: torch.dtype, specials: str = "none",
) -> Tensor:  # fmt: skip
    """The values of packed codes, [L, R, n]; see `cpu.decode`."""
    if dtype == torch.float16:
        return decode(codes, scales, tensor_scale, spec, shape, torch.float32, specials).to(dtype)
    from isoscale.kernels import triton_kernels

    L, R, n = shape
    rows, cols = spec.rows or max(R, 1), spec.cols or max(n, 1)
    across, along = -(-R // rows), -(-n // cols)
    row_bytes = row_codes(spec, n) * spec.bits // 8
    if codes.numel() != L * R * row_bytes or (scales is not None and scales.numel() != L * across * along):
        raise ConfigError("codes or scales of another size than the shape wants", key="shape", value=shape)
    if (scales is None) != (spec.scale == "none") or (tensor_scale is None) != (spec.scale != "e4m3"):
        raise ConfigError("scales are missing, or too many", key="scales", value=spec.scale)
    half = 1 << (spec.bits - 1)
    largest = half - {"ieee": (1 << spec.mantissa_bits) + 1, "fn": 2}.get(specials, 1)
    out = torch.empty(shape, dtype=dtype, device=codes.device)
    width, per = 64, _PIECE // 64
    K = -(-n // width)
    if out.numel():
        with _on(codes):
            triton_kernels.decode[(-(-L * R * K // per),)](
                codes, codes if scales is None else scales, codes if tensor_scale is None else tensor_scale,
                _words(out), R, n, K, along, across, L * R * K, row_bytes, WIDE=dtype == torch.float32, NB=per,
                COLS=width, ROWS_B=rows, COLS_B=cols, BIAS=spec.bias, M=spec.mantissa_bits, BITS=spec.bits,
                TWOS=spec.twos, SCALE=spec.scale, LARGEST=largest,
                INFINITE=largest + 1 if specials == "ieee" else -1, NAN=half if specials == "fnuz" else -1,
                enable_fp_fusion=False, num_warps=8,
            )  # fmt: skip
    return out
