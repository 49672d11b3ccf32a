"""The definition of a cast, block by block in numpy: other arithmetic than the kernels' (frexp, float64, tables of values)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from isoscale.formats.block import BlockFormat
from isoscale.formats.element import E4M3, ElementFormat
from isoscale.kernels.spec import CastSpec

MASK = 0xFFFFFFFF


def spec_of(fmt: BlockFormat | ElementFormat, rows: int | None = None, cols: int | None = None) -> CastSpec:
    element = fmt if isinstance(fmt, ElementFormat) else fmt.element
    scale, rule = ("none", "none") if isinstance(fmt, ElementFormat) else (fmt.scale, fmt.scale_rule)
    block = (1, 0) if isinstance(fmt, ElementFormat) else fmt.block
    return CastSpec(
        element.bits, element.mantissa_bits, element.bias, element.emin, element.emax, element.max,
        element.layout == "twos", scale, rule, block[0] if rows is None else rows, block[1] if cols is None else cols,
    )  # fmt: skip


def mix(h: np.ndarray) -> np.ndarray:
    h = h ^ (h >> 16)
    h = (h * 0x21F0AAAD) & MASK
    h = h ^ (h >> 15)
    h = (h * 0x735A2D97) & MASK
    return h ^ (h >> 15)


def random_bits(index: np.ndarray, keys: tuple[int, int], n: int) -> np.ndarray:
    index = index.astype(np.uint64)
    h = mix(((index & np.uint64(MASK)) + np.uint64(keys[0])) & np.uint64(MASK))
    return mix(((h ^ (index >> np.uint64(32))) + np.uint64(keys[1])) & np.uint64(MASK)) >> np.uint64(32 - n)


def rounded(t: np.ndarray, negative: np.ndarray, rounding: str, bits: np.ndarray | None, n: int) -> np.ndarray:
    low = np.floor(t)
    rest = t - low
    if rounding == "nearest-even":
        return np.rint(t)
    if rounding == "toward-zero":
        return low
    if rounding == "nearest-away":
        return low + (rest >= 0.5)
    if rounding == "stochastic":
        assert bits is not None
        return low + (rest * 2.0**n > bits + 0.5)
    return np.where(negative == (rounding == "down"), np.ceil(t), low)


def on_grid(a: np.ndarray, m: int, emin: int, rounding: str = "nearest-even", negative: Any = False, bits: Any = None, n: int = 0) -> np.ndarray:
    """Magnitudes (float64, already clamped) on a grid."""
    exponent = np.maximum(np.frexp(a)[1] - 1, emin)
    spacing = np.ldexp(1.0, exponent - m)
    return rounded(a / spacing, negative, rounding, bits, n) * spacing


class Answer:
    """What a cast must give: values [L, R, n] float32, codes [L, R, bytes], scales, tensor scale, which are special."""

    def __init__(self, x: torch.Tensor, fmt: BlockFormat | ElementFormat, spec: CastSpec, shape: tuple[int, int, int],
                 strided: bool = False, *, rounding: str = "nearest-even", keys: tuple[int, int] | None = None, random_bits_: int = 23,
                 offset: int = 0, tensor_amax: float | None = None) -> None:  # fmt: skip
        element = fmt if isinstance(fmt, ElementFormat) else fmt.element
        with np.errstate(all="ignore"):
            self._run(x, element, spec, shape, strided, rounding, keys, random_bits_, offset, tensor_amax)

    def _run(self, x, element, spec, shape, strided, rounding, keys, n_bits, offset, tensor_amax):  # type: ignore[no-untyped-def]
        values = x.float().numpy().reshape(shape)
        index = np.arange(values.size, dtype=np.int64).reshape(shape) + offset
        if strided:
            values, index = values.transpose(0, 2, 1), index.transpose(0, 2, 1)
        L, R, n = values.shape
        rows, cols = spec.rows or R, spec.cols or n
        Rb, K = -(-R // rows), -(-n // cols)

        def blocks(array: np.ndarray) -> np.ndarray:
            array = np.pad(array, ((0, 0), (0, Rb * rows - R), (0, K * cols - n)))
            return array.reshape(L, Rb, rows, K, cols)

        v = blocks(values)
        special = ~np.isfinite(v).all((2, 4), keepdims=True)
        amax = np.where(special, 0, np.abs(np.where(np.isfinite(v), v, 0)).max((2, 4), keepdims=True)).astype(np.float64)
        f32 = np.float32
        p = np.where(amax > 0, np.frexp(amax)[1] - 1, -1000)
        e = p - spec.emax
        if spec.rule == "ceil":
            e = e + (amax > np.ldexp(1.0, p))
        elif spec.rule == "rceil":
            e = e + (amax > np.ldexp(spec.max, e))
        elif spec.rule == "even":
            m = spec.mantissa_bits
            e = np.frexp(np.floor(np.ldexp(amax, m - p) + 0.5))[1] - 1 + p - m - spec.emax
        self.tensor_scale = None
        if spec.scale == "none":
            special = np.zeros_like(special)
            r = d = np.ones_like(amax, f32)
            self.scales = None
        elif spec.scale == "e8m0":
            e = np.where(amax == 0, -127, np.clip(e, -127, 127))
            r, d = np.ldexp(1.0, -e).astype(f32), np.ldexp(1.0, e).astype(f32)
            self.scales = np.where(special, 255, e + 127).astype(np.uint8)
        elif spec.scale == "fp32":
            if spec.rule == "amax":
                d = np.maximum(amax.astype(f32) / f32(spec.max), f32(2.0**-126))
            else:
                d = np.ldexp(1.0, np.clip(e, -126, 127)).astype(f32)
            d = np.where(amax == 0, f32(1), d)
            r = f32(1) / d
            self.scales = np.where(special, f32(np.nan), d)
        else:
            whole = f32(amax.max() if tensor_amax is None else tensor_amax)
            top = np.finfo(f32).max
            s_enc = f32(1) if whole == 0 else min(f32(spec.max * 448) / whole, top)
            s_dec = f32(1) / s_enc
            t = np.minimum(amax.astype(f32) / f32(spec.max) * s_enc, f32(448)).astype(np.float64)
            c = on_grid(t, 3, -6)
            table = np.array([E4M3.value(code) for code in range(127)])
            self.scales = np.where(special, 127, np.searchsorted(table, c)).astype(np.uint8)
            d = c.astype(f32) * s_dec
            r = np.where(c == 0, f32(0), np.minimum(f32(1) / d, top))
            self.tensor_scale = s_dec
        d = np.where(special, f32(np.nan), d)
        if self.scales is not None:
            self.scales = self.scales.reshape(L, Rb, K)
        w = v * r
        nan = np.isnan(v) if spec.scale == "none" else np.broadcast_to(special, v.shape)
        negative = np.signbit(w)
        bits = None if keys is None else random_bits(blocks(index), keys, n_bits).astype(np.float64)
        a = np.minimum(np.where(np.isnan(w), 0, np.abs(w)).astype(np.float64), spec.max)
        q = on_grid(a, spec.mantissa_bits, spec.emin, rounding, negative, bits, n_bits)
        signed = np.where(negative & ~((q == 0) & spec.twos), -q, q).astype(f32)

        def back(array: np.ndarray) -> np.ndarray:
            return array.reshape(L, Rb * rows, K * cols)[:, :R]

        out = np.where(nan, f32(np.nan), signed * d)
        self.values = torch.from_numpy(back(out)[..., :n].copy())
        self.special = back(nan)
        half = 1 << (spec.bits - 1)
        table = np.array([element.value(code) for code in range(half)])
        table = np.where(np.isfinite(table), table, np.inf)
        magnitude = np.searchsorted(table, q)
        code = np.where(negative, (-magnitude) % (2 * half) if spec.twos else magnitude + half, magnitude)
        if not element.has_negative_zero:
            code = np.where(magnitude == 0, 0, code)
        self.loose = back(code).astype(np.uint8)
        self.codes = packed(self.loose, spec.bits)

    def in_shape(self, dtype: torch.dtype, strided: bool) -> torch.Tensor:
        return (self.values.transpose(1, 2) if strided else self.values).contiguous().to(dtype)


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    group = {4: 2, 6: 4, 8: 1}[bits]
    codes = np.pad(codes, ((0, 0), (0, 0), (0, -codes.shape[-1] % group)))
    stream = (codes[..., None] >> np.arange(bits)) & 1
    return np.packbits(stream.reshape(*codes.shape[:2], -1).astype(np.uint8), axis=-1, bitorder="little")


def unpacked(codes: np.ndarray, bits: int) -> np.ndarray:
    stream = np.unpackbits(codes, axis=-1, bitorder="little").reshape(*codes.shape[:2], -1, bits)
    return (stream << np.arange(bits)).sum(-1).astype(np.uint8)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bits; any NaN equals any NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return bool((a == b).all())
    word = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return bool(((a.view(word) == b.view(word)) | (a.isnan() & b.isnan())).all())


def draw(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32, *, special: bool = False, wide: bool = False) -> torch.Tensor:
    """Hard inputs: many binades, ties, zeros of both signs, subnormals and, if asked, inf and NaN."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g) * torch.exp2(torch.randint(-9, 9, shape, generator=g).float())
    ties = torch.randint(-64, 64, shape, generator=g) / 16
    pick = torch.rand(shape, generator=g)
    x = torch.where(pick < 0.2, ties, x)
    if wide:
        rows = torch.randint(-140, 127, (*shape[:-1], 1), generator=g)
        x = (x.double() * torch.exp2(rows.double())).clamp(-3.4e38, 3.4e38).float()
        x = torch.where(pick > 0.98, torch.tensor(2.0**-140), x)
    x = torch.where((pick > 0.5) & (pick < 0.56), -0.0, x)
    x = torch.where((pick > 0.6) & (pick < 0.62), 0.0, x)
    x[..., : shape[-1] // 3] = torch.where(pick[..., :1] < 0.1, -0.0, x[..., : shape[-1] // 3])
    if special:
        for low, value in ((0.7, float("inf")), (0.71, float("-inf")), (0.72, float("nan"))):
            x = torch.where((pick > low) & (pick < low + 0.003), value, x)
    return x.to(dtype)


def edges(spec: CastSpec) -> torch.Tensor:
    """Rows of 32 whose largest magnitude sits at, one ulp below and one above the points where a scale rule turns."""
    points = []
    for k in (-150, -149, -140, -127, -126, -120, -119, -118, -60, -1, 0, 1, 60, 118, 119, 125, 127):
        for base in (1.0, spec.max / 2.0**spec.emax, 2 - 2.0 ** -(spec.mantissa_bits + 1), 1.5):
            value = np.float32(min(base * 2.0**k, 3.4e38))
            points += [np.nextafter(value, np.float32(0)), value, np.nextafter(value, np.float32(np.inf))]
    tops = torch.from_numpy(np.array(points, np.float32)).clamp(max=3.4028234e38)
    g = torch.Generator().manual_seed(0)
    x = torch.rand(len(points), 32, generator=g) * 2 - 1
    x = x * tops[:, None]
    x[:, 7] = -tops
    return x
