"""The shared scale of a block from its largest magnitude, exactly: integer arithmetic on exponents, no logarithm.

amax = a 2^p with a in [1, 2), and the element's largest value = b 2^emax. Then floor(log2 amax) = p, and
ceil(log2(amax / max)) = p - emax + (a > b): a comparison of mantissas, right to the last ulp where a float logarithm or
a product with a rounded 1 / max is not (arXiv 2506.08027 states the rule; OCP Microscaling Formats 1.0, section 6.3,
the floor rule).

What the standards leave open, and what is done here: a block with an inf or a NaN gets a NaN scale, so that nothing is
hidden; a block of zeros gets the smallest E8M0 scale (code 0), or the fp32 scale 1; a scale beyond 2^-127 .. 2^127 is
clamped to it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from isoscale.formats.grid import LAYOUT, Grid, power_of_two, round_to_grid
from isoscale.kernels.spec import CastSpec


class Scales(NamedTuple):
    """Scales of blocks, in the forms in which they are used.

    Args:
        stored: uint8 E8M0 or E4M3 codes, or float32.
        shrink: what elements are multiplied with before rounding, about 1 / scale; finite, in the wide dtype.
        grow: what rounded elements are multiplied with; NaN for a block with an inf or a NaN.
        tensor: the tensor's scale, 0-d float32 (E4M3 scales only).
    """

    stored: Tensor
    shrink: Tensor
    grow: Tensor
    tensor: Tensor | None


def scale_exponent(words: Tensor, spec: CastSpec) -> Tensor:
    """Exponent of a block's power-of-two scale, not clamped.

    Args:
        words: bits of the finite amax of each block: int32 of a float32, or int64 of a float64.
        spec: its rule, emax, largest value and mantissa bits are used.
    """
    wide, word, field, bias = LAYOUT[words.dtype == torch.int64]
    small = words < (1 << field)  # subnormal: normalise
    words = torch.where(small, (words.view(wide) * 2.0**field).view(word), words)
    if spec.rule == "even":
        words = words + (1 << (field - 1 - spec.mantissa_bits))
    exponent = (words >> field) - bias - small.to(word) * field - spec.emax
    mantissa = words & ((1 << field) - 1)
    if spec.rule == "ceil":
        exponent = exponent + (mantissa != 0).to(word)
    elif spec.rule == "rceil":
        top = int((2 * math.frexp(spec.max)[0] - 1) * (1 << field))
        exponent = exponent + (mantissa > top).to(word)
    return exponent


def block_scales(words: Tensor, spec: CastSpec, tensor_amax: Tensor | None = None) -> Scales:
    """Scales of blocks.

    Args:
        words: bits of the largest magnitude of each block, as in `scale_exponent`; those of inf and NaN too.
        spec: of the cast; its scale is not `none`.
        tensor_amax: for E4M3 scales, the largest magnitude of the whole tensor, 0-d, if it is known; else that of
            the blocks without inf and NaN.
    """
    wide, _, field, bias = LAYOUT[words.dtype == torch.int64]
    special = words >= ((2 * bias + 1) << field)
    zero = words == 0
    words = torch.where(special, 0, words)
    if spec.scale == "e8m0":
        exponent = torch.where(zero, -127, scale_exponent(words, spec).clamp(-127, 127))
        stored = torch.where(special, 255, exponent + 127).to(torch.uint8)
        grow = torch.where(special, math.nan, power_of_two(exponent, wide))
        return Scales(stored, power_of_two(-exponent, wide), grow, None)
    if spec.scale == "e4m3":
        return _e4m3_scales(_float32(words.view(wide)), special, spec, tensor_amax, wide)
    if spec.rule == "amax":
        scale = _divide(_float32(words.view(wide)), spec.max).clamp(min=2.0**-126)
    else:
        scale = power_of_two(scale_exponent(words, spec).clamp(-126, 127).to(torch.int32), torch.float32)
    scale = torch.where(zero | special, 1.0, scale)
    grow = torch.where(special, math.nan, scale)
    return Scales(grow, scale.reciprocal().to(wide), grow.to(wide), None)


def _float32(amax: Tensor) -> Tensor:
    """As float32; beyond its range the largest, so that a float64 saturates."""
    return amax.to(torch.float32).clamp(max=3.4028234663852886e38)


# Numbers stand in the functions, not as names beside them: with dynamic shapes the compiler makes inputs of those.


def _divide(a: Tensor | float, b: Tensor | float) -> Tensor:
    """a / b rounded once: torch multiplies with a rounded reciprocal where one side is a Python number."""
    a = torch.full_like(b, a) if isinstance(b, Tensor) and not isinstance(a, Tensor) else a
    assert isinstance(a, Tensor)
    return torch.div(a, b if isinstance(b, Tensor) else torch.full_like(a, b))


def tensor_scale(amax: Tensor, spec: CastSpec) -> tuple[Tensor, Tensor]:
    """Encoding and decoding scale of a tensor with E4M3 block scales (arXiv 2509.25149, appendix on NVFP4 scaling)."""
    encode = torch.where(amax == 0, 1.0, _divide(spec.max * 448.0, amax).clamp(max=3.4028234663852886e38))
    return encode, encode.reciprocal()


def _e4m3_scales(amax: Tensor, special: Tensor, spec: CastSpec, known: Tensor | None, wide: torch.dtype) -> Scales:
    whole = _float32(amax.amax() if known is None else known)
    encode, decode = tensor_scale(whole, spec)
    e4m3 = Grid(448.0, 448.0, -6, 3, True, False)
    rounded = round_to_grid((_divide(amax, spec.max) * encode).clamp(max=448.0), e4m3)
    code = torch.where(special, 0x7F, e4m3_codes(rounded)).to(torch.uint8)
    grow = rounded * decode
    shrink = torch.where(rounded == 0, 0.0, grow.reciprocal().clamp(max=3.4028234663852886e38))
    return Scales(code, shrink.to(wide), torch.where(special, math.nan, grow).to(wide), decode)


def e4m3_codes(values: Tensor) -> Tensor:
    """Codes, as int32, of float32 values that are zero or positive and on the E4M3 grid."""
    normal = (values.view(torch.int32) >> 20) - (120 << 3)
    return torch.where(values < 2.0**-6, (values * 2.0**9).to(torch.int32), normal)


def stored_to_factor(stored: Tensor, scale: str, tensor: Tensor | None) -> Tensor:
    """What decoding multiplies elements with, float32, from scales as they are stored."""
    if scale == "fp32":
        return stored
    code = stored.to(torch.int32)
    if scale == "e8m0":
        return torch.where(code == 255, math.nan, power_of_two(code - 127, torch.float32))
    low = code & 0x7F
    normal = ((low << 20) + (120 << 23)).view(torch.float32)
    value = torch.where(low < 8, low.to(torch.float32) * 2.0**-9, normal)
    value = torch.where(low == 0x7F, math.nan, torch.where(code > 0x7F, -value, value))
    return value if tensor is None else value * tensor
