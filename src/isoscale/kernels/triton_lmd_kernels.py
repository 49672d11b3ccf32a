"""The Triton kernel of an LMD step. `triton_lmd` launches it; only it imports this file. `lmd.py` is the definition.

A program has a piece of the tensor in registers: one read, one write, noise made again from the index. Words and
normals have the bits of the definition; exponentials and logarithms are the device's own, to some ulp. Floats of 16
bits come and go as integers, since a conversion to bfloat16 is not the same on all devices.
"""

# Triton reads the annotations and knows none but its own, so values have none here.
# mypy: disable-error-code="untyped-decorator, no-untyped-call, no-untyped-def"

import triton
import triton.language as tl

from isoscale.kernels.triton_kernels import _bits, _number, _read, _write


@triton.jit
def _mix(h, key):
    h = (h ^ (h >> 16)) * 0x21F0AAAD
    h = ((h ^ (h >> 15)) + key) * 0x735A2D97
    return h ^ (h >> 15)


@triton.jit
def _words(index, k0, k1):
    line, key = index >> 4, tl.cast(k1, tl.uint32)
    h = (line & 0xFFFFFFFF).to(tl.uint32) + tl.cast(k0, tl.uint32)
    h = _mix(h ^ ((line >> 32) & 0xFFFFFFFF).to(tl.uint32) * 0x9E3779B1, key)
    flip = _mix((index & 15).to(tl.uint32) * 0x9E3779B9 + key, 0)
    h = (h ^ flip) * ((flip >> 16) | (flip << 16) | 1)
    return (h ^ (h >> 16)) * 0x735A2D97


@triton.jit
def _normal(h):
    total = (h & 255) + ((h >> 8) & 255) + ((h >> 16) & 255) + (h >> 24)
    s = (total.to(tl.int32) - 510).to(tl.float32)
    return (s * (s * s + 1112070.0)) * 5.773953759558026e-09


@triton.jit
def _uniform(h, HALF: tl.constexpr):
    return ((h >> (16 * HALF)) & 0xFFFF).to(tl.int32).to(tl.float32) * 1.52587890625e-05


@triton.jit
def _load(ptr, at, mask, KIND: tl.constexpr):
    """float32 numbers, or codes, of what is stored as `fp32`, `bf16`, or a grid."""
    if KIND == "fp32" or KIND == "bf16":
        x = _number(_read(ptr, at, mask, KIND == "fp32"))
    else:
        x = tl.load(ptr + at, mask=mask, other=0).to(tl.float32)
    return x


@triton.jit
def _store(ptr, at, x, mask, KIND: tl.constexpr):
    if KIND == "fp32" or KIND == "bf16":
        _write(ptr, at, _bits(x), mask, KIND == "fp32")
    elif KIND == "log16":
        tl.store(ptr + at, x.to(tl.int32).to(tl.int16), mask=mask)
    else:
        tl.store(ptr + at, x.to(tl.int32).to(tl.int8), mask=mask)


@triton.jit
def _clamp(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def _part(a, index, sigma, offset, k0, k1):
    """p+ or p- of the split."""
    return tl.exp(a + sigma * _normal(_words(index, k0, k1)) + offset)


@triton.jit
def _hyper(theta, centre):
    up, down = tl.exp(theta + centre), tl.exp(centre - theta)
    return up - down, up + down, tl.sqrt(up * up + down * down)


@triton.jit
def _momentum(code, range):
    size = tl.exp2((tl.abs(code) - 127.0) * 0.25 + range)
    return tl.where(code == 0.0, 0.0, tl.where(code < 0.0, -size, size))


@triton.jit
def _momentum_code(v, range, u):
    size = tl.maximum(tl.abs(v), 1.1754943508222875e-38)
    below = _clamp(tl.floor((tl.log2(size) - range) * 4.0 + 127.0), 0.0, 127.0)
    part = size * tl.exp2(-((tl.maximum(below, 1.0) - 127.0) * 0.25 + range))
    share = tl.where(below == 0.0, part, (part - 1.0) * 5.285213507883246)
    code = tl.minimum(below + tl.where(u < share, 1.0, 0.0), 127.0)
    return tl.where(v < 0.0, -code, code)


@triton.jit
def _moved(
    a_ptr, v_ptr, i, mask, index, a, u, k0, k1, alpha, decay, beta1, rest1, beta2, rest2, low, rate, lift, range,
    HYPER: tl.constexpr, RULE: tl.constexpr, MEDIAN: tl.constexpr, MOMENTUM: tl.constexpr, RAW: tl.constexpr,
    SINGLE: tl.constexpr, CELL: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    """Stores a median and its momentum after the update; gives ln r."""
    stored = _load(v_ptr, i, mask, MOMENTUM)
    v = stored
    if MOMENTUM == "log8":
        v = _momentum(stored, range)
    t = beta1 * v + rest1 * u
    kept = t
    if not SINGLE:
        kept = beta2 * v + rest2 * u
    s = t
    if not RAW:
        s = tl.where(t > 0.0, 1.0, tl.where(t < 0.0, -1.0, 0.0))
    pull = a
    if RULE == "constant":
        pull = tl.full(a.shape, 1.0, tl.float32)
    elif RULE != "log-normal":
        pull = tl.exp(rate * a + lift)
        if HYPER:
            pull = (pull - tl.exp(lift - rate * a)) * 0.5
        else:
            pull = pull - 1.0
    new = _clamp(a - _clamp(alpha * (s + decay * pull), -1.0, 1.0), low, 12.0)
    alive = u != 0.0
    code = new
    was = a
    if MEDIAN != "fp32" or MOMENTUM == "log8":
        h = _words(index, k0, k1)
        if MEDIAN != "fp32":
            code = _clamp(tl.floor(new * (1.0 / CELL) + _uniform(h, 0)), -TOP - 1.0, TOP)
            was = a * (1.0 / CELL)
        if MOMENTUM == "log8":
            kept = _momentum_code(kept, range, _uniform(h, 1))
    code = tl.where(alive, code, was)
    _store(a_ptr, i, code, mask, MEDIAN)
    _store(v_ptr, i, tl.where(alive, kept, stored), mask, MOMENTUM)
    return code * CELL


@triton.jit(
    do_not_specialize=[
        "n", "start", "inner", "stride", "n00", "n01", "n10", "n11", "x00", "x01", "x10", "x11", "r00", "r01", "r10",
        "r11",
    ]
)  # fmt: skip
def lmd(
    a0_ptr, a1_ptr, v0_ptr, v1_ptr, g0_ptr, g1_ptr, out_ptr, n, start, inner, stride, alpha, decay, beta1, rest1, beta2,
    rest2, low, rate, lift, range, centre, now_sigma, now_offset, now_scale, now_spread, next_sigma, next_offset,
    next_scale, next_spread, n00, n01, n10, n11, x00, x01, x10, x11, r00, r01, r10, r11, HYPER: tl.constexpr,
    RULE: tl.constexpr, MEDIAN: tl.constexpr, MOMENTUM: tl.constexpr, GRAD: tl.constexpr, WEIGHT: tl.constexpr,
    RAW: tl.constexpr, SINGLE: tl.constexpr, GIVEN: tl.constexpr, STEP: tl.constexpr, PLAIN: tl.constexpr,
    CELL: tl.constexpr, TOP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A step (STEP) and the next sample, or that alone, of one piece. PLAIN: element i has the index start + i."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    index = i + start
    if not PLAIN:
        index = start + i // inner * stride + i % inner
    a0 = _load(a0_ptr, i, mask, MEDIAN) * CELL
    a1 = a0
    if not HYPER:
        a1 = _load(a1_ptr, i, mask, MEDIAN) * CELL
    if STEP:
        u0 = _load(g0_ptr, i, mask, GRAD)
        u1 = u0
        if GIVEN:
            if not HYPER:
                u1 = _load(g1_ptr, i, mask, GRAD)
        elif HYPER:
            net, gross, wide = _hyper(a0, centre)
            u0 = u0 * gross * (now_scale + now_spread * net / wide * _normal(_words(index, n00, n01)))
        else:
            u1 = -(u0 * _part(a1, index, now_sigma, now_offset, n10, n11))
            u0 = u0 * _part(a0, index, now_sigma, now_offset, n00, n01)
        a0 = _moved(
            a0_ptr, v0_ptr, i, mask, index, a0, u0, r00, r01, alpha, decay, beta1, rest1, beta2, rest2, low, rate, lift,
            range, HYPER, RULE, MEDIAN, MOMENTUM, RAW, SINGLE, CELL, TOP,
        )  # fmt: skip
        if not HYPER:
            a1 = _moved(
                a1_ptr, v1_ptr, i, mask, index, a1, u1, r10, r11, alpha, decay, beta1, rest1, beta2, rest2, low, rate,
                lift, range, HYPER, RULE, MEDIAN, MOMENTUM, RAW, SINGLE, CELL, TOP,
            )  # fmt: skip
    if HYPER:
        net, gross, wide = _hyper(a0, centre)
        w = next_scale * net + next_spread * wide * _normal(_words(index, x00, x01))
    else:
        w = _part(a0, index, next_sigma, next_offset, x00, x01) - _part(a1, index, next_sigma, next_offset, x10, x11)
    _store(out_ptr, i, w, mask, WEIGHT)


@triton.jit(do_not_specialize=["n", "start", "inner", "stride", "k0", "k1"])
def noise(bits_ptr, normal_ptr, n, start, inner, stride, k0, k1, BLOCK: tl.constexpr):
    """Words and normals, for tests."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    h = _words(start + i // inner * stride + i % inner, k0, k1)
    tl.store(bits_ptr + i, h.to(tl.int32, bitcast=True), mask=i < n)
    tl.store(normal_ptr + i, _normal(h), mask=i < n)
