"""Rounding to the values of an element format, in the input's own arithmetic.

How: clamp to the largest value, then scale so that the format's values around x are integers. Their spacing is a power
of two read off the exponent bits of x, so there is exactly one rounding, and no step (integer operations, products with
powers of two, round) that devices do in different ways.

Why not `x.to(torch.float8_e4m3fn)`: overflow saturates, gives NaN or gives inf depending on dtype, device and version;
float64 would be rounded twice (through float32); most formats have no dtype; and Inductor drops a cast to bf16 and back
as pointless. The arithmetic form costs the same in eager mode.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from isoscale.formats.element import ElementFormat

# mantissa bits and exponent bias of the wide types, and the integers of their size
LAYOUT = {False: (torch.float32, torch.int32, 23, 127), True: (torch.float64, torch.int64, 52, 1023)}
MANTISSA = {torch.float16: 10, torch.bfloat16: 7, torch.float32: 23, torch.float64: 52}


class Grid(NamedTuple):
    """An element format in numbers.

    Args:
        top: the largest value of the format.
        bound: the largest that the tensor's dtype holds too.
        emin: exponent of the smallest normal value.
        mantissa_bits: explicit ones.
        minus_zero: whether the format has one.
        powers: the values are bare powers of two (a scale format).
    """

    top: float
    bound: float
    emin: int
    mantissa_bits: int
    minus_zero: bool
    powers: bool


def grid_of(fmt: ElementFormat, dtype: torch.dtype) -> Grid:
    """The grid of a format for tensors of a dtype."""
    top = min(fmt.max, torch.finfo(dtype).max)
    fraction, exponent = math.frexp(top)
    scale = 1 << (min(fmt.mantissa_bits, MANTISSA[dtype]) + 1)
    bound = math.ldexp(math.floor(fraction * scale), exponent) / scale
    return Grid(fmt.max, bound, fmt.emin, fmt.mantissa_bits, fmt.has_negative_zero, fmt.layout == "scale")


def _whole(t: Tensor, rounding: str, random: Tensor | None, bits: int) -> Tensor:
    """t to an integer, perhaps in its own memory; `random` is in [0, 2^bits)."""
    if rounding == "nearest-even":
        return t.round_()
    if rounding == "up":
        return torch.ceil(t)
    if rounding == "down":
        return torch.floor(t)
    cut = torch.trunc(t)
    if rounding == "toward-zero":
        return cut
    rest = (t - cut).abs()
    if random is None:
        up = rest >= 0.5
    else:
        up = rest * 2.0**bits > random.to(t.dtype) + 0.5
    return cut + torch.copysign(up.to(t.dtype), t)


def round_to_grid(
    v: Tensor, grid: Grid, rounding: str = "nearest-even", random: Tensor | None = None, bits: int = 0
) -> Tensor:
    """The nearest value of the grid in the sense of a rounding; beyond the largest value it saturates.

    Args:
        v: float32 or float64, any shape; inf saturates, NaN stays.
        grid: of `grid_of`.
        rounding: one of `ROUNDINGS`.
        random: for stochastic rounding, integers in [0, 2^bits) of the shape of v.
        bits: how many bits each has.
    """
    wide, word, field, bias = LAYOUT[v.dtype == torch.float64]
    if grid.powers:
        return _power(v, rounding, random, bits)
    m = grid.mantissa_bits
    v = v.clamp(-grid.bound, grid.bound)
    if grid.emin - m > -bias:  # the spacing is a normal number of the wide type
        spacing = (v.view(word) & (2 * bias + 1 << field)).clamp(min=grid.emin + bias << field).sub_(m << field)
        whole = _whole(v.mul_(((2 * bias << field) - spacing).view(wide)), rounding, random, bits)
        v = whole.mul_(spacing.view(wide))  # in place: in eager mode the pieces of a tensor stay in the cache
    elif m < field:  # same exponent range as the input (fp32 to bf16): round the word itself
        cut = field - m
        words = v.view(word)
        part = (words & ((1 << cut) - 1)).to(wide) * 2.0**-cut
        kept = words >> cut
        part = torch.copysign(part + (kept & 1).to(wide), v)  # its integer part carries the parity, for ties to even
        step = (_whole(part, rounding, random, bits).abs() - (kept & 1).to(wide)).to(word)
        v = torch.where(v.isnan(), v, ((kept + step) << cut).view(wide))
        v = v.clamp(-grid.bound, grid.bound)
    return v if grid.minus_zero else torch.where(v == 0, 0.0, v)


def _power(v: Tensor, rounding: str, random: Tensor | None, bits: int) -> Tensor:
    """A power of two from 2^-127 to 2^127; zero becomes the smallest; negative numbers, inf and NaN become NaN."""
    _, word, field, bias = LAYOUT[v.dtype == torch.float64]
    bad = ~(v.isfinite() & (v >= 0))
    t = torch.where(bad, 1.0, v).clamp(2.0**-127, 2.0**127)
    small = t < 2.0**-126  # a float32 subnormal
    words = torch.where(small, t * 2.0, t).view(word)
    fraction = (words & ((1 << field) - 1)).to(t.dtype) * 2.0**-field
    exponent = (words >> field) - bias - small.to(word)
    odd = (exponent + 1 & 1).to(t.dtype)  # of the code, exponent + 127
    up = (_whole(fraction + odd, rounding, random, bits) - odd).to(word)
    return torch.where(bad, math.nan, power_of_two(exponent + up, t.dtype))


def power_of_two(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """2^exponent, exactly, for integers from -127 to 127."""
    wide, word, field, bias = LAYOUT[dtype == torch.float64]
    bits = (exponent.to(word) + bias) << field
    if dtype != torch.float64:
        bits = torch.where(exponent == -127, 1 << (field - 1), bits)
    return bits.view(wide)
