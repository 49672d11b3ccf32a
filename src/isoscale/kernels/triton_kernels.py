"""The Triton kernels of casts. `triton_cast` launches them; only it imports this file, where Triton is installed.

A program has a tile [blocks, COLS]: one block of COLS values to a row (LAYOUT 0: along the last dimension; 1: along the
middle one, neighbouring columns side by side), or the rows of one tile of values that share a scale (2). Where a block
has another shape (GIVEN) its factors come from memory, and rows of the tile are plain pieces of rows.

The arithmetic is that of `cast.cpp`, on the bits of float32: no fma (`enable_fp_fusion=False`), IEEE division.
Values come and go as integers, since a conversion to bfloat16 is not the same on all devices.
"""

# Triton reads the annotations and knows none but its own, so values have none here.
# mypy: disable-error-code="untyped-decorator, no-untyped-call, no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _number(u):
    return u.to(tl.float32, bitcast=True)


@triton.jit
def _read(ptr, at, mask, WIDE: tl.constexpr):
    w = tl.load(ptr + at, mask=mask, other=0).to(tl.int32)
    if not WIDE:
        w = w << 16
    return w


@triton.jit
def _write(ptr, at, u, mask, WIDE: tl.constexpr):
    u = tl.where((u & 0x7FFFFFFF) > 0x7F800000, 0x7FC00000, u)
    if WIDE:
        tl.store(ptr + at, u, mask=mask)
    else:
        tl.store(ptr + at, ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).to(tl.int16), mask=mask)


@triton.jit
def _mix(h):
    h = h ^ (h >> 16)
    h = h * 0x21F0AAAD
    h = h ^ (h >> 15)
    h = h * 0x735A2D97
    return h ^ (h >> 15)


@triton.jit
def _scales(
    amax, s_enc, s_dec, MAX: tl.constexpr, EMAX: tl.constexpr, ADD: tl.constexpr, ABOVE: tl.constexpr,
    SCALE: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """Factors r and d (as bits) and stored scales of blocks, from the bits of amax."""
    bad = amax >= 0x7F800000
    u = tl.where(bad, 0, amax)
    top = tl.full(u.shape, MAX, tl.float32)
    one = tl.full(u.shape, 1.0, tl.float32)
    if SCALE == "e4m3":
        t = tl.minimum(tl.div_rn(_number(u), top) * s_enc, 448.0)
        a = _bits(t)
        e = tl.maximum(a & 0x7F800000, 121 << 23)
        magic = e + (20 << 23)
        total = t + _number(magic)
        code = (e >> 20) - (121 << 3) + (_bits(total) - magic)
        value = total - _number(magic)
        back = value * s_dec
        zero = value == 0.0
        r = tl.where(zero, 0.0, tl.minimum(tl.div_rn(one, tl.where(zero, 1.0, back)), 3.4028234663852886e38))
        d = _bits(back)
        stored = tl.where(bad, 0x7F, code)
    elif RULE == "amax":
        s = tl.maximum(tl.div_rn(_number(u), top), 1.1754943508222875e-38)
        s = tl.where(u == 0, 1.0, s)
        r = tl.div_rn(one, s)
        d = _bits(s)
        stored = tl.where(bad, 0x7FC00000, d)
    else:
        tiny = u < 0x00800000
        v = tl.where(tiny, _bits(u.to(tl.float32)), u)
        e = ((v + ADD) >> 23) - tl.where(tiny, 276, 127) - EMAX + ((v & 0x7FFFFF) > ABOVE).to(tl.int32)
        if SCALE == "fp32":
            e = tl.where(u == 0, 0, tl.minimum(tl.maximum(e, -126), 127))
        else:
            e = tl.minimum(tl.maximum(e, -127), 127)
        r = _number(tl.where(e == 127, 0x00400000, (127 - e) << 23))
        d = tl.where(e == -127, 0x00400000, (e + 127) << 23)
        if SCALE == "fp32":
            stored = tl.where(bad, 0x7FC00000, d)
        else:
            stored = tl.where(bad, 255, e + 127)
    return r, tl.where(bad, 0x7FC00000, d), stored


@triton.jit
def _tensor_scale(amax_ptr, MAX: tl.constexpr, SCALE: tl.constexpr):
    """Encoding and decoding scale of the tensor; 1 and 1 without E4M3 scales."""
    s_enc = tl.full((1,), 1.0, tl.float32)
    if SCALE == "e4m3":
        amax = _number(tl.load(amax_ptr + tl.arange(0, 1)))
        zero = amax == 0.0
        top = tl.full((1,), MAX * 448.0, tl.float32)
        s_enc = tl.where(zero, 1.0, tl.minimum(tl.div_rn(top, tl.where(zero, 1.0, amax)), 3.4028234663852886e38))
    return s_enc, tl.div_rn(tl.full((1,), 1.0, tl.float32), s_enc)


@triton.jit
def _round(
    x, r, index, k0, k1, TOP: tl.constexpr, EMIN: tl.constexpr, M: tl.constexpr,
    ROUNDING: tl.constexpr, RANDOM: tl.constexpr,
):  # fmt: skip
    """Bits of x times r; its exponent field; the rounded magnitude; the same in units of its spacing, an integer."""
    v = _bits(_number(x) * r)
    a = tl.minimum(v & 0x7FFFFFFF, TOP)
    e = tl.maximum(a & 0x7F800000, (EMIN + 127) << 23)
    if ROUNDING == "nearest-even":
        magic = e + ((23 - M) << 23)
        total = _number(a) + _number(magic)
        q = total - _number(magic)
        steps = _bits(total) - magic
    else:
        spacing = e - (M << 23)
        t = _number(a) * _number((254 << 23) - spacing)
        steps = t.to(tl.int32)
        rest = t - steps.to(tl.float32)
        if ROUNDING == "stochastic":
            h = _mix((index & 0xFFFFFFFF).to(tl.uint32) + tl.cast(k0, tl.uint32))
            h = _mix((h ^ (index >> 32).to(tl.uint32)) + tl.cast(k1, tl.uint32))
            above = rest * (1 << RANDOM) > (h >> (32 - RANDOM)).to(tl.int32).to(tl.float32) + 0.5
        elif ROUNDING == "nearest-away":
            above = rest >= 0.5
        elif ROUNDING == "up":
            above = (rest > 0.0) & (v >= 0)
        elif ROUNDING == "down":
            above = (rest > 0.0) & (v < 0)
        else:
            above = rest > 1.0
        steps += above.to(tl.int32)
        q = steps.to(tl.float32) * _number(spacing)
    return v, e, q, steps


@triton.jit
def _codes(
    x, r, v, e, steps, EMIN: tl.constexpr, M: tl.constexpr, BITS: tl.constexpr,
    TWOS: tl.constexpr, NAN: tl.constexpr,
):  # fmt: skip
    if TWOS:
        code = tl.where(v < 0, -steps, steps) & ((1 << BITS) - 1)
    else:
        code = ((e >> 23) - (EMIN + 127)) * (1 << M) + steps
        code = tl.where(v < 0, code | (1 << (BITS - 1)), code)
        if NAN == 1 << (BITS - 1):  # the code of -0 is NaN
            code = tl.where(code == NAN, 0, code)
    a = x & 0x7FFFFFFF
    lost = (a > 0x7F800000) | ((a == 0x7F800000) & (r == 0.0))
    return tl.where(lost, NAN if NAN > 0 else 0, code)


@triton.jit
def _pack(
    ptr, codes, row, first, ok, row_bytes, NB: tl.constexpr, COLS: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    """Stores codes [NB, COLS]; row and first, [NB]: the stored row, and the place in it of the first code."""
    start = row * row_bytes
    if BITS == 8:
        at = first[:, None] + tl.arange(0, COLS)[None, :]
        tl.store(ptr + start[:, None] + at, codes.to(tl.uint8), mask=ok[:, None] & (at < row_bytes))
    elif BITS == 4:
        low, high = tl.split(tl.reshape(codes, (NB, COLS // 2, 2)))
        at = first[:, None] // 2 + tl.arange(0, COLS // 2)[None, :]
        tl.store(ptr + start[:, None] + at, (low | (high << 4)).to(tl.uint8), mask=ok[:, None] & (at < row_bytes))
    else:
        even, odd = tl.split(tl.reshape(codes, (NB, COLS // 4, 2, 2)))
        c0, c2 = tl.split(even)
        c1, c3 = tl.split(odd)
        word = c0 | (c1 << 6) | (c2 << 12) | (c3 << 18)
        at = (first[:, None] // 4 + tl.arange(0, COLS // 4)[None, :]) * 3
        mask = ok[:, None] & (at < row_bytes)
        for byte in tl.static_range(3):
            tl.store(ptr + start[:, None] + at + byte, ((word >> (8 * byte)) & 255).to(tl.uint8), mask=mask)


@triton.jit(do_not_specialize=["offset", "k0", "k1"])
def cast(
    x_ptr, out_ptr, scale_ptr, amax_ptr, tensor_ptr, r_ptr, d_ptr,
    R, n, C, K, Kb, Rb, units, row_bytes, offset, k0, k1,
    OP: tl.constexpr, LAYOUT: tl.constexpr, GIVEN: tl.constexpr, WIDE: tl.constexpr, NB: tl.constexpr,
    COLS: tl.constexpr, ROWS_B: tl.constexpr, COLS_B: tl.constexpr, MAX: tl.constexpr, TOP: tl.constexpr,
    EMIN: tl.constexpr, EMAX: tl.constexpr, M: tl.constexpr, BITS: tl.constexpr, TWOS: tl.constexpr,
    SCALE: tl.constexpr, RULE: tl.constexpr, ADD: tl.constexpr, ABOVE: tl.constexpr, ROUNDING: tl.constexpr,
    RANDOM: tl.constexpr, NAN: tl.constexpr,
):  # fmt: skip
    """One tile. OP 0: values, 1: codes and scales, 2: the largest amax of blocks without inf and NaN, by an atomic."""
    pid = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, COLS)
    if LAYOUT == 0:
        unit = pid * NB + tl.arange(0, NB)
        row, k = unit // K, unit % K
        first, ok = k * COLS, unit < units
        where = row[:, None] * n + first[:, None] + j[None, :]
        scale_at = unit
    elif LAYOUT == 1:
        column = tl.program_id(1).to(tl.int64) * NB + tl.arange(0, NB)
        batch, k = pid // K, pid % K
        first, ok = k * COLS + tl.zeros_like(column), column < C
        row = batch * C + column
        where = (batch * n + k * COLS + j)[None, :] * C + column[:, None]
        scale_at = row * K + k
    else:
        band, k = pid // K, pid % K
        r_in = (band % Rb) * NB + tl.arange(0, NB)
        first, ok = k * COLS + tl.zeros_like(r_in), r_in < R
        row = (band // Rb) * R + r_in
        where = row[:, None] * n + first[:, None] + j[None, :]
        scale_at = pid + tl.arange(0, 1)
    inside = ok[:, None] & ((first[:, None] + j[None, :]) < n)
    x = _read(x_ptr, where, inside, WIDE)
    if SCALE == "none":
        r = tl.full((1, 1), 1.0, tl.float32)
        d = r
    elif GIVEN:  # factors from memory, element by element
        block = (row // R * Rb + row % R // ROWS_B)[:, None] * Kb + (first[:, None] + j[None, :]) // COLS_B
        r = tl.load(r_ptr + block, mask=inside, other=1.0)
        d = tl.load(d_ptr + block, mask=inside, other=1.0)
    else:
        amax = tl.max(x & 0x7FFFFFFF, axis=1)
        if LAYOUT == 2:
            amax = tl.max(amax, axis=0) + tl.zeros((1,), tl.int32)
        if OP == 2:
            tl.atomic_max(amax_ptr, tl.max(tl.where(amax >= 0x7F800000, 0, amax), axis=0))
        s_enc, s_dec = _tensor_scale(amax_ptr, MAX, SCALE)
        if SCALE == "e4m3" and OP == 1:
            tl.store(tensor_ptr + tl.arange(0, 1), s_dec, mask=tl.full((1,), 0, tl.int64) + pid == 0)
        r, d, stored = _scales(amax, s_enc, s_dec, MAX, EMAX, ADD, ABOVE, SCALE, RULE)
        r, d = r[:, None], _number(d)[:, None]
        if OP == 1:
            real = ok if LAYOUT != 2 else scale_at >= 0
            if SCALE == "fp32":
                tl.store(scale_ptr + scale_at, stored, mask=real)
            else:
                tl.store(scale_ptr + scale_at, stored.to(tl.uint8), mask=real)
    if OP != 2:
        v, e, q, steps = _round(x, r, where + offset, k0, k1, TOP, EMIN, M, ROUNDING, RANDOM)
        if OP == 0:
            signed = _bits(q) | (v & -2147483648)
            if TWOS:
                signed = tl.where(q == 0.0, 0, signed)
            y = _bits(_number(signed) * d)
            if SCALE == "none":
                y = tl.where((x & 0x7FFFFFFF) > 0x7F800000, 0x7FC00000, y)
            _write(out_ptr, where, y, inside, WIDE)
        else:
            codes = _codes(x, r, v, e, steps, EMIN, M, BITS, TWOS, NAN)
            _pack(out_ptr, codes, row, first, ok, row_bytes, NB, COLS, BITS)


@triton.jit(do_not_specialize=["offset", "k0", "k1"])
def cast_both(
    x_ptr, out_ptr, scale_ptr, turned_ptr, turned_scale_ptr, amax_ptr, tensor_ptr,
    R, n, row_bytes, turned_bytes, offset, k0, k1,
    WIDE: tl.constexpr, SIDE: tl.constexpr, COLS: tl.constexpr, MAX: tl.constexpr, TOP: tl.constexpr,
    EMIN: tl.constexpr, EMAX: tl.constexpr, M: tl.constexpr, BITS: tl.constexpr, TWOS: tl.constexpr,
    SCALE: tl.constexpr, RULE: tl.constexpr, ADD: tl.constexpr, ABOVE: tl.constexpr, ROUNDING: tl.constexpr,
    RANDOM: tl.constexpr, NAN: tl.constexpr,
):  # fmt: skip
    """A square of a matrix [R, n], read once: its codes along rows, and its codes along columns, turned."""
    NB: tl.constexpr = SIDE * SIDE // COLS
    PER: tl.constexpr = SIDE // COLS
    r0 = tl.program_id(0).to(tl.int64) * SIDE
    c0 = tl.program_id(1).to(tl.int64) * SIDE
    i = tl.arange(0, SIDE)
    where = (r0 + i)[:, None] * n + (c0 + i)[None, :]
    square = _read(x_ptr, where, ((r0 + i) < R)[:, None] & ((c0 + i) < n)[None, :], WIDE)
    block = tl.arange(0, NB)
    for turned in tl.static_range(2):
        if turned == 0:
            x, index = tl.reshape(square, (NB, COLS)), tl.reshape(where, (NB, COLS))
            row, first = r0 + block // PER, c0 + block % PER * COLS
            height, width, to, scale_to, size = R, n, out_ptr, scale_ptr, row_bytes
        else:
            x, index = tl.reshape(tl.trans(square), (NB, COLS)), tl.reshape(tl.trans(where), (NB, COLS))
            row, first = c0 + block // PER, r0 + block % PER * COLS
            height, width, to, scale_to, size = n, R, turned_ptr, turned_scale_ptr, turned_bytes
        ok = (row < height) & (first < width)
        s_enc, s_dec = _tensor_scale(amax_ptr + turned, MAX, SCALE)
        if SCALE == "e4m3":
            tl.store(tensor_ptr + turned + tl.arange(0, 1), s_dec, mask=tl.full((1,), 0, tl.int64) + r0 + c0 == 0)
        r, _d, stored = _scales(tl.max(x & 0x7FFFFFFF, axis=1), s_enc, s_dec, MAX, EMAX, ADD, ABOVE, SCALE, RULE)
        r = r[:, None]
        at = row * tl.cdiv(width, COLS) + first // COLS
        if SCALE == "fp32":
            tl.store(scale_to + at, stored, mask=ok)
        else:
            tl.store(scale_to + at, stored.to(tl.uint8), mask=ok)
        v, e, _q, steps = _round(x, r, index + offset, k0, k1, TOP, EMIN, M, ROUNDING, RANDOM)
        codes = _codes(x, r, v, e, steps, EMIN, M, BITS, TWOS, NAN)
        _pack(to, codes, row, first, ok, size, NB, COLS, BITS)


@triton.jit
def scales(
    amax_ptr, r_ptr, d_ptr, stored_ptr, tensor_ptr, tensor_amax_ptr, count,
    SIZE: tl.constexpr, MAX: tl.constexpr, EMAX: tl.constexpr, SCALE: tl.constexpr, RULE: tl.constexpr,
    ADD: tl.constexpr, ABOVE: tl.constexpr,
):  # fmt: skip
    """Factors and stored scales of blocks whose amax is known."""
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    ok = at < count
    s_enc, s_dec = _tensor_scale(tensor_amax_ptr, MAX, SCALE)
    r, d, stored = _scales(tl.load(amax_ptr + at, mask=ok, other=0), s_enc, s_dec, MAX, EMAX, ADD, ABOVE, SCALE, RULE)
    tl.store(r_ptr + at, r, mask=ok)
    tl.store(d_ptr + at, _number(d), mask=ok)
    if SCALE == "fp32":
        tl.store(stored_ptr + at, stored, mask=ok)
    else:
        tl.store(stored_ptr + at, stored.to(tl.uint8), mask=ok)
    if SCALE == "e4m3":
        tl.store(tensor_ptr + tl.arange(0, 1), s_dec)


@triton.jit
def decode(
    codes_ptr, scale_ptr, tensor_ptr, out_ptr, R, n, K, Kb, Rb,
    units, row_bytes, WIDE: tl.constexpr, NB: tl.constexpr, COLS: tl.constexpr, ROWS_B: tl.constexpr,
    COLS_B: tl.constexpr, BIAS: tl.constexpr, M: tl.constexpr, BITS: tl.constexpr, TWOS: tl.constexpr,
    SCALE: tl.constexpr, LARGEST: tl.constexpr, INFINITE: tl.constexpr, NAN: tl.constexpr,
):  # fmt: skip
    """Values of packed codes. LARGEST: the largest finite code; INFINITE, NAN: exact codes, negative if none."""
    unit = tl.program_id(0).to(tl.int64) * NB + tl.arange(0, NB)
    row, at = (unit // K)[:, None], (unit % K * COLS)[:, None] + tl.arange(0, COLS)[None, :]
    inside = (unit < units)[:, None] & (at < n)
    bit = at * BITS
    byte = row * row_bytes + bit // 8
    word = tl.load(codes_ptr + byte, mask=inside, other=0).to(tl.int32)
    if BITS == 6:
        more = inside & (bit // 8 + 1 < row_bytes)
        word = word | (tl.load(codes_ptr + byte + 1, mask=more, other=0).to(tl.int32) << 8)
    code = (word >> (bit % 8).to(tl.int32)) & ((1 << BITS) - 1)
    HALF: tl.constexpr = 1 << (BITS - 1)
    if TWOS:
        value = (code - tl.where(code >= HALF, 2 * HALF, 0)).to(tl.float32) * (1.0 / (1 << M))
    else:
        a = code & (HALF - 1)
        low = a < (1 << M)
        lift = tl.where(low, 1 << 23, 0)
        value = _number((a << (23 - M)) + ((127 - BIAS) << 23) + lift)
        value -= tl.where(low, _number(tl.full(a.shape, (128 - BIAS) << 23, tl.int32)), 0.0)
        u = _bits(value)
        u = tl.where(a > LARGEST, tl.where(a == INFINITE, 0x7F800000, 0x7FC00000), u)
        u = tl.where(code == NAN, 0x7FC00000, tl.where(code >= HALF, u | -2147483648, u))
        value = _number(u)
    if SCALE != "none":
        block = (row // R * Rb + row % R // ROWS_B) * Kb + at // COLS_B
        if SCALE == "fp32":
            d = tl.load(scale_ptr + block, mask=inside, other=0.0)
        else:
            c = tl.load(scale_ptr + block, mask=inside, other=0).to(tl.int32)
            if SCALE == "e8m0":
                d = _number(tl.where(c == 255, 0x7FC00000, tl.where(c == 0, 0x00400000, c << 23)))
            else:
                small = (c & 127) < 8
                v = _number(((c & 127) << 20) + (120 << 23) + tl.where(small, 1 << 23, 0))
                v -= tl.where(small, 0.015625, 0.0)
                v = tl.where(c >= 128, -v, v) * tl.load(tensor_ptr)
                d = _number(tl.where((c & 127) == 127, 0x7FC00000, _bits(v)))
        value = value * d
    _write(out_ptr, row * n + at, _bits(value), inside, WIDE)
