"""Casts computed in other ways than the package does: exact rationals, frexp in float64, gfloat, ml_dtypes."""

from __future__ import annotations

import math
from fractions import Fraction

import gfloat
import gfloat.formats as gf
import ml_dtypes
import numpy as np
import pytest

from isoscale import formats as F
from isoscale.formats import dispatch

INF, NAN = float("inf"), float("nan")
ML = {
    "e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2, "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m3": ml_dtypes.float6_e2m3fn, "e2m1": ml_dtypes.float4_e2m1fn, "e4m3_ieee": ml_dtypes.float8_e4m3,
    "e4m3_fnuz": ml_dtypes.float8_e4m3fnuz, "e5m2_fnuz": ml_dtypes.float8_e5m2fnuz, "e3m4": ml_dtypes.float8_e3m4,
    "e8m0": ml_dtypes.float8_e8m0fnu, "bf16": ml_dtypes.bfloat16, "fp16": np.float16,
}  # fmt: skip
GF = {
    "e4m3": gf.format_info_ocp_e4m3, "e5m2": gf.format_info_ocp_e5m2, "e3m2": gf.format_info_ocp_e3m2,
    "e2m3": gf.format_info_ocp_e2m3, "e2m1": gf.format_info_ocp_e2m1, "int8": gf.format_info_ocp_int8,
    "e8m0": gf.format_info_ocp_e8m0, "bf16": gf.format_info_bfloat16, "fp16": gf.format_info_binary16,
}  # fmt: skip
MX = ("mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e3m2", "mxfp6_e2m3", "mxfp4", "mxint8")
RULES = ("floor", "ceil", "even", "rceil")


@pytest.fixture(params=["kernel", "reference"])
def engine(request, monkeypatch):
    """Runs a test twice: with the kernels of this machine, and with the torch reference."""
    if request.param == "reference":
        monkeypatch.setattr(dispatch, "kernel_for", lambda device: "torch")
    elif dispatch.kernel_for("cpu") == "torch":
        pytest.skip("no compiler here")
    return request.param


def same(found, want):
    """Equal bit for bit, NaN equal to NaN, -0 different from 0."""
    found, want = np.asarray(found, np.float64), np.asarray(want, np.float64)
    wrong = ~((found == want) & (np.signbit(found) == np.signbit(want)) | np.isnan(found) & np.isnan(want))
    assert wrong.sum() == 0, (wrong.sum(), found[wrong][:5], want[wrong][:5])


def exact_exponent(amax: float, element: F.ElementFormat, rule: str) -> int:
    """The power-of-two scale's exponent by the rule's own words, in rational arithmetic; amax > 0."""
    a = Fraction(amax)

    def floor_log2(q: Fraction) -> int:
        k = q.numerator.bit_length() - q.denominator.bit_length()
        return k - 1 if Fraction(2) ** k > q else k

    def ceil_log2(q: Fraction) -> int:
        k = floor_log2(q)
        return k if Fraction(2) ** k == q else k + 1

    emax = floor_log2(Fraction(element.max))
    if rule == "floor":
        e = floor_log2(a) - emax
    elif rule == "ceil":
        e = ceil_log2(a) - emax
    elif rule == "rceil":
        e = ceil_log2(a / Fraction(element.max))
    else:
        step = Fraction(2) ** (floor_log2(a) - element.mantissa_bits)
        whole, rest = divmod(a / step, 1)
        up = rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2 == 1)
        e = floor_log2((whole + up) * step) - emax
    return max(-127, min(127, e))


def exact_round(x: Fraction, element: F.ElementFormat) -> Fraction:
    """Nearest value of the format, ties to the even code, saturating; by search in the table of values."""
    half = [Fraction(v) for v in element.values() if v >= 0]
    magnitude = min(abs(x), half[-1])
    at = max(i for i, v in enumerate(half) if v <= magnitude)
    if at + 1 < len(half):
        low, high = half[at], half[at + 1]
        twice = 2 * magnitude - low - high
        at += twice > 0 or (twice == 0 and at % 2 == 1)
    return -half[at] if x < 0 else half[at]


def round_elements(x: np.ndarray, element: F.ElementFormat) -> np.ndarray:
    """float64 values to the nearest of the format by gfloat, saturating; by table search for formats it has not."""
    if element.name in GF and element.layout != "twos":
        return gfloat.round_ndarray(GF[element.name], x, gfloat.RoundMode.TiesToEven, sat=True)
    values = element.values()
    ties = (values[1:] + values[:-1]) / 2
    clipped = np.clip(np.abs(x), 0, element.max)
    at = np.searchsorted(ties, clipped, side="left")
    tie = (at < len(ties)) & (np.take(ties, np.minimum(at, len(ties) - 1)) == clipped)
    zero = int(np.searchsorted(values, 0))
    at = np.where(tie & ((at - zero) % 2 == 1), at + 1, at)
    out = np.copysign(values[at], x)
    return np.where(out == 0, 0.0, out) if not element.has_negative_zero else out


def blocks_exponent(amax: np.ndarray, element: F.ElementFormat, rule: str) -> np.ndarray:
    """As `exact_exponent`, by frexp and ldexp in float64 (exact for float32 inputs)."""
    with np.errstate(all="ignore"):
        fraction, p = np.frexp(amax)
        p = p - 1
        if rule == "floor":
            e = p - element.emax
        elif rule == "ceil":
            e = p - element.emax + (fraction != 0.5)
        elif rule == "rceil":
            e = p - element.emax
            e = e + (amax > np.ldexp(element.max, e))
        else:
            rounded = np.rint(np.ldexp(amax, element.mantissa_bits - p))
            e = np.frexp(np.ldexp(rounded, p - element.mantissa_bits))[1] - 1 - element.emax
    return np.where(amax == 0, -127, np.clip(e, -127, 127))


def cast_blocks(x: np.ndarray, fmt: F.BlockFormat) -> tuple[np.ndarray, np.ndarray]:
    """[N, B] float32 values to (values after the round trip, E8M0 codes)."""
    with np.errstate(invalid="ignore"):
        wide = x.astype(np.float64)
    amax = np.abs(wide).max(1)
    special = ~np.isfinite(amax)
    e = blocks_exponent(np.where(special, 0, amax), fmt.element, fmt.scale_rule)
    with np.errstate(all="ignore"):
        q = round_elements(np.ldexp(wide, -e[:, None]), fmt.element)
        y = np.ldexp(q, e[:, None]).astype(x.dtype)
    y[special] = np.nan
    return y, np.where(special, 255, e + 127).astype(np.uint8)


def cast_nvfp4(x: np.ndarray, block: int = 16) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """[rows, n] float32 with n a multiple of the block, in float32 step by step: values, codes of the scales, tensor scale."""
    one = np.float32(1)
    part = x.reshape(x.shape[0], -1, block)
    amax = np.abs(part).max(-1)
    good = np.isfinite(amax)
    top = amax[good].max() if good.any() else np.float32(0)
    with np.errstate(all="ignore"):
        enc = one if top == 0 else min(np.float32(2688) / top, np.finfo(np.float32).max)
        dec = one / np.float32(enc)
        scale = np.minimum(np.where(good, amax, 0) / np.float32(6) * np.float32(enc), np.float32(448))
        code = scale.astype(ml_dtypes.float8_e4m3fn)
        grow = code.astype(np.float32) * dec
        shrink = np.where(grow == 0, np.float32(0), np.minimum(one / grow, np.finfo(np.float32).max)).astype(np.float32)
        v = part * shrink[..., None]
        q = round_elements(v.astype(np.float64), F.E2M1).astype(np.float32)
        y = q * grow[..., None]
    y[~good] = np.nan
    stored = code.view(np.uint8).copy()
    stored[~good] = 0x7F
    return y.reshape(x.shape), stored, np.float32(dec)


def adversarial(element: F.ElementFormat, rng: np.random.Generator, count: int) -> np.ndarray:
    """[count, 32] float32 blocks where casts go wrong."""
    grid = element.values()
    ties = (grid[1:] + grid[:-1]) / 2
    pool = np.concatenate([grid, ties, ties * (1 + 2.0**-23), ties * (1 - 2.0**-24)]).astype(np.float32)
    x = rng.choice(pool, (count, 32))
    kind = rng.integers(0, 8, count)
    with np.errstate(all="ignore"):
        x *= np.exp2(rng.integers(-160, 125, count))[:, None].astype(np.float32)
        power = np.exp2(rng.integers(-149, 127, count)).astype(np.float32)
        top = np.where(kind == 1, np.nextafter(power, np.float32(0)), power)
        top = np.where(kind == 2, np.nextafter(power, np.float32(INF)), top)
        full = (element.max * power.astype(np.float64)).astype(np.float32)
        top = np.where(kind == 3, full, top)
        top = np.where(kind == 4, np.nextafter(full, np.float32(INF)), top)
        top = np.where(kind == 5, np.nextafter(full, np.float32(0)), top)
        top = np.where(np.isfinite(top), top, np.finfo(np.float32).max)
        small = (x / np.abs(x).max(1, keepdims=True) * 0.99) * top[:, None]
        x = np.where((kind < 6)[:, None], small, x)
        x[kind < 6, 0] = top[kind < 6]
    x[~np.isfinite(x)] = np.finfo(np.float32).max
    wide = (kind == 6).sum()
    x[kind == 6] = np.exp2(rng.uniform(-140, 125, (wide, 1))) * rng.uniform(-2, 2, (wide, 32))
    x[~np.isfinite(x)] = 1.0
    x[: count // 64] = 0
    x[count // 64 : count // 32, 3] = -0.0
    special = count // 32 + np.arange(count // 32)
    x[special, rng.integers(0, 32, len(special))] = rng.choice([INF, -INF, NAN], len(special))
    return x.astype(np.float32)


__all__ = ["GF", "INF", "ML", "MX", "NAN", "RULES", "adversarial", "blocks_exponent", "cast_blocks", "cast_nvfp4",
           "engine", "exact_exponent", "exact_round", "math", "round_elements", "same"]  # fmt: skip
