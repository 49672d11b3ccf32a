"""The Triton kernels of norms with a cast behind them. `triton_norm` launches them; only it imports this file.

A program of `norm` has whole rows in registers, as a tile [rows x KP, COLS] with one block to a row of the tile and KP
the number of blocks, filled up to a power of two: one read, one write. The arithmetic is that of `norm.cpp`; MXNorm's
sum is one of integers, so r has the same bits here, whatever the order of adding.
"""

# Triton reads the annotations and knows none but its own, so values have none here.
# mypy: disable-error-code="untyped-decorator, no-untyped-call, no-untyped-def"

import triton
import triton.language as tl

from isoscale.kernels.triton_kernels import _bits, _codes, _number, _pack, _read, _round, _scales, _tensor_scale, _write


@triton.jit
def _narrowed(u):
    """Bits of values rounded to bfloat16."""
    u = tl.where((u & 0x7FFFFFFF) > 0x7F800000, 0x7FC00000, u)
    return ((u + 0x7FFF + ((u >> 16) & 1)) >> 16) << 16


@triton.jit
def _mx_rms(amax, top, k, K, eps, w_full, w_last, SQUARE: tl.constexpr):
    """r of rows, from the bits of their blocks' largest magnitudes [rows, KP] and of the largest of those [rows]."""
    tiny = top < 0x00800000
    e = (tl.where(tiny, _bits(top.to(tl.float32)), top) >> 23) - tl.where(tiny, 276, 127)
    e = tl.where((top == 0) | (top >= 0x7F800000), 0, e)
    half = e >> 1  # 2^-e may be no number; in two steps it is one
    v = _number(tl.where(top[:, None] >= 0x7F800000, 0, amax))
    v = v * _number((127 - half) << 23)[:, None] * _number((127 - e + half) << 23)[:, None]
    if SQUARE:
        v = v * v
    n = (v * 68719476736.0).to(tl.int64)
    whole = tl.sum(tl.where(k < K - 1, n, 0), axis=1).to(tl.float32)
    last = tl.sum(tl.where(k == K - 1, n, 0), axis=1).to(tl.float32)
    g = (whole * w_full + last * w_last) * 1.4551915228366852e-11
    if SQUARE:
        g = tl.sqrt_rn(g)
    return g * _number((half + 127) << 23) * _number((e - half + 127) << 23) + eps


@triton.jit
def _plain_rms(x, n, eps, ROWS: tl.constexpr, KP: tl.constexpr):
    """r of rows of RMSNorm. Squares that float32 cannot hold are summed in float64."""
    v = _number(x)
    total = tl.sum(tl.reshape(tl.sum(v * v, axis=1), (ROWS, KP)), axis=1)
    size = tl.full((ROWS,), 0.0, tl.float32) + n
    r = tl.sqrt_rn(tl.div_rn(total, size) + eps)
    odd = (total < 7.888609052210118e-31) | (total >= 3.4028234663852886e38)
    if tl.max(odd.to(tl.int32), axis=0) > 0:
        w = v.to(tl.float64)
        more = tl.sum(tl.reshape(tl.sum(w * w, axis=1), (ROWS, KP)), axis=1)
        r = tl.where(odd, tl.sqrt(more / size.to(tl.float64) + eps).to(tl.float32), r)
    return r


@triton.jit
def _back(r):
    """1 / r: 0 for 0, and at most the largest number; NaN stays."""
    one = tl.full(r.shape, 1.0, tl.float32)
    inverse = tl.div_rn(one, tl.where(r == 0.0, one, r))
    inverse = tl.where(inverse > 3.4028234663852886e38, 3.4028234663852886e38, inverse)
    return tl.where(r == 0.0, 0.0, inverse)


@triton.jit
def _clamped(y, clamp):
    return tl.where(y > clamp, clamp, tl.where(y < -clamp, -clamp, y))


@triton.jit
def norm(
    x_ptr, residual_ptr, summed_ptr, out_ptr, scale_ptr, rms_ptr, amax_ptr, tensor_ptr, R, n, K, row_bytes, eps, w_full,
    w_last, clamp, KIND: tl.constexpr, RIDE: tl.constexpr, RESIDUAL: tl.constexpr, CODES: tl.constexpr,
    CLAMPED: tl.constexpr, WIDE: tl.constexpr, OUT_WIDE: tl.constexpr, ROWS: tl.constexpr, KP: tl.constexpr,
    COLS: tl.constexpr, MAX: tl.constexpr, TOP: tl.constexpr, EMIN: tl.constexpr, EMAX: tl.constexpr, M: tl.constexpr,
    BITS: tl.constexpr, TWOS: tl.constexpr, SCALE: tl.constexpr, RULE: tl.constexpr, ADD: tl.constexpr,
    ABOVE: tl.constexpr, NAN: tl.constexpr,
):  # fmt: skip
    """ROWS rows: r, and codes and scales (CODES) or values of x / r, or (RIDE) of x."""
    NB: tl.constexpr = ROWS * KP
    pid = tl.program_id(0).to(tl.int64)
    unit = tl.arange(0, NB)
    row, k = pid * ROWS + unit // KP, unit % KP
    first, ok = k * COLS, (row < R) & (k < K)
    at = first[:, None] + tl.arange(0, COLS)[None, :]
    where, inside = row[:, None] * n + at, ok[:, None] & (at < n)
    x = _read(x_ptr, where, inside, WIDE)
    if RESIDUAL:
        x = _bits(_number(x) + _number(_read(residual_ptr, where, inside, WIDE)))
        if not WIDE:
            x = _narrowed(x)
        _write(summed_ptr, where, x, inside, WIDE)
    amax = tl.max(x & 0x7FFFFFFF, axis=1)
    tops = tl.reshape(amax, (ROWS, KP))
    top = tl.max(tops, axis=1)
    if KIND == "rms":
        r = _plain_rms(x, n, eps, ROWS, KP)
    else:
        r = _mx_rms(tops, top, tl.arange(0, KP)[None, :], K, eps, w_full, w_last, KIND == "mx2")
    lost = (top >= 0x7F800000) | ((_bits(r) & 0x7FFFFFFF) >= 0x7F800000)
    r = tl.where(lost, float("nan"), r)
    rows = pid * ROWS + tl.arange(0, ROWS)
    tl.store(rms_ptr + rows, r, mask=rows < R)
    y = x
    if not RIDE:
        back = tl.reshape(tl.broadcast_to(_back(r)[:, None], (ROWS, KP)), (NB,))
        value, largest = _number(x) * back[:, None], _number(amax) * back
        if CLAMPED:
            value, largest = _clamped(value, clamp), _clamped(largest, clamp)
        y, amax = tl.where(inside, _bits(value), 0), _bits(largest) & 0x7FFFFFFF
    s_enc, s_dec = _tensor_scale(amax_ptr, MAX, SCALE)
    if SCALE == "e4m3":
        tl.store(tensor_ptr + tl.arange(0, 1), s_dec, mask=tl.full((1,), 0, tl.int64) + pid == 0)
    shrink, grow, stored = _scales(amax, s_enc, s_dec, MAX, EMAX, ADD, ABOVE, SCALE, RULE)
    v, e, q, steps = _round(y, shrink[:, None], where, 0, 0, TOP, EMIN, M, "nearest-even", 1)
    if CODES:
        if SCALE == "fp32":
            tl.store(scale_ptr + row * K + k, stored, mask=ok)
        else:
            tl.store(scale_ptr + row * K + k, stored.to(tl.uint8), mask=ok)
        codes = _codes(y, shrink[:, None], v, e, steps, EMIN, M, BITS, TWOS, NAN)
        _pack(out_ptr, codes, row, first, ok, row_bytes, NB, COLS, BITS)
    else:
        signed = _bits(q) | (v & -2147483648)
        if TWOS:
            signed = tl.where(q == 0.0, 0, signed)
        _write(out_ptr, where, _bits(_number(signed) * _number(grow)[:, None]), inside, OUT_WIDE)


@triton.jit
def turned(
    x_ptr, out_ptr, scale_ptr, rms_ptr, amax_ptr, R, n, K, row_bytes, clamp, RIDE: tl.constexpr, CLAMPED: tl.constexpr,
    WIDE: tl.constexpr, NB: tl.constexpr, COLS: tl.constexpr, MAX: tl.constexpr, TOP: tl.constexpr, EMIN: tl.constexpr,
    EMAX: tl.constexpr, M: tl.constexpr, BITS: tl.constexpr, TWOS: tl.constexpr, SCALE: tl.constexpr,
    RULE: tl.constexpr, ADD: tl.constexpr, ABOVE: tl.constexpr, NAN: tl.constexpr,
):  # fmt: skip
    """Codes and scales of x / r in blocks of COLS rows, for NB columns; r is known. K: blocks along a column."""
    column = tl.program_id(1).to(tl.int64) * NB + tl.arange(0, NB)
    k = tl.program_id(0).to(tl.int64)
    row = k * COLS + tl.arange(0, COLS)
    ok = column < n
    inside = ok[:, None] & (row < R)[None, :]
    where = row[None, :] * n + column[:, None]
    y = _read(x_ptr, where, inside, WIDE)
    if not RIDE:
        value = _number(y) * _back(tl.load(rms_ptr + row, mask=row < R, other=1.0))[None, :]
        if CLAMPED:
            value = _clamped(value, clamp)
        y = tl.where(inside, _bits(value), 0)
    s_enc, s_dec = _tensor_scale(amax_ptr, MAX, SCALE)
    shrink, _grow, stored = _scales(tl.max(y & 0x7FFFFFFF, axis=1), s_enc, s_dec, MAX, EMAX, ADD, ABOVE, SCALE, RULE)
    if SCALE == "fp32":
        tl.store(scale_ptr + column * K + k, stored, mask=ok)
    else:
        tl.store(scale_ptr + column * K + k, stored.to(tl.uint8), mask=ok)
    v, e, _q, steps = _round(y, shrink[:, None], where, 0, 0, TOP, EMIN, M, "nearest-even", 1)
    codes = _codes(y, shrink[:, None], v, e, steps, EMIN, M, BITS, TWOS, NAN)
    _pack(out_ptr, codes, column, k * COLS + tl.zeros_like(column), ok, row_bytes, NB, COLS, BITS)
