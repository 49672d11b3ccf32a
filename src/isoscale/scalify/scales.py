"""Arithmetic on scales: exact, for powers of two, the same for a 0-d tensor and for a Python number.

A scale is a power of two, or 0: "any scale". 0 goes with data that mean the same under every scale (zeros,
infinities), so that such an operand adopts the scale of the others (Scalify, arXiv 2407.17353, its ANY_SCALE). Rules
are written once with these functions. With tensors they run inside the graph (scales that change while training); with
Python numbers they are gone when the graph is made (the static front end).

Scales are float32 where they are tensors: the exponent range of E8M0, 2^-126 to 2^127. A product below it would read as
"any scale"; nothing that trains comes near.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
from torch import Tensor

Scale: TypeAlias = Tensor | float
Number: TypeAlias = int | float | bool
ANY = 0.0
_EXPONENT, _MIN_NORMAL = 0x7F800000, 2.0**-126


def floor2(x: Scale) -> Scale:
    """The largest power of two not above x > 0; 0 for 0 (and below 2^-126)."""
    if not isinstance(x, Tensor):
        return math.ldexp(0.5, math.frexp(x)[1]) if x > 0 and math.isfinite(x) else ANY
    return (x.float().view(torch.int32) & _EXPONENT).view(torch.float32)


def nearest2(x: Scale) -> Scale:
    """The power of two nearest to x > 0 in log space: x / nearest2(x) is in [0.7071, 1.4142)."""
    return floor2(x * math.sqrt(2.0))


def is_power_of_two(x: float) -> bool:
    """Whether a positive finite number is a power of two."""
    return x > 0 and math.isfinite(x) and math.frexp(x)[0] == 0.5


def mul(a: Scale, b: Scale) -> Scale:
    """The scale of a product."""
    return a * b


def div(a: Scale, b: Scale) -> Scale:
    """The scale of a quotient; by a scale of 0 it is 0: x / 0 means the same under every scale."""
    if not isinstance(a, Tensor) and not isinstance(b, Tensor):
        return a / b if b else ANY
    if not isinstance(b, Tensor):
        return a * (1.0 / b) if b else a * 0.0
    return torch.where(b == 0, torch.zeros_like(b), a / b)


def larger(*scales: Scale) -> Scale:
    """The largest of several; 0 gives way to every other."""
    numbers = [s for s in scales if not isinstance(s, Tensor)]
    tensors = [s for s in scales if isinstance(s, Tensor)]
    if not tensors:
        return max(numbers)
    out = tensors[0]
    for other in tensors[1:]:
        out = torch.maximum(out, other)
    return out.clamp(min=max(numbers)) if numbers and max(numbers) > 0 else out


def root(s: Scale) -> tuple[Scale, Scale]:
    """(f, r) with f * r^2 = s, f in {1, 2} and r a power of two: sqrt(data * f) * r stays a power of two in scale."""
    if not isinstance(s, Tensor):
        if s == 0:
            return 1.0, ANY
        exponent = math.frexp(s)[1] - 1
        odd = exponent % 2
        return 2.0**odd, 2.0 ** ((exponent - odd) // 2)
    power = (s.view(torch.int32) >> 23) - 127
    odds = power & 1
    half = (((power - odds) >> 1) + 127) << 23
    none = s == 0
    return (torch.where(none, 1, 1 + odds)).float(), torch.where(none, 0, half).to(torch.int32).view(torch.float32)


def floor_root(n: int) -> int:
    """The largest power of two not above sqrt(n), n >= 1.

    By comparisons with powers of four: a symbolic n gets range guards, one graph for each octave of sqrt(n), where a
    square root in floating point would pin every size.
    """
    out = 1
    while 4 * out * out <= n:
        out *= 2
    return out


def split(x: Number) -> tuple[float, float]:
    """A number as (mantissa, scale), the scale the nearest power of two in log space.

    Rounding down instead, as the authors' package does, leaves mantissas in [1, 2): each product with a factor just
    below 1 (decay, averages) then halves the scale and doubles the data until fp16 overflows. 0, infinities and NaN
    take any scale.
    """
    x = float(x)
    if x == 0 or not math.isfinite(x):
        return x, ANY
    mantissa, exponent = math.frexp(x)
    if abs(mantissa) * math.sqrt(2.0) < 1.0:
        exponent -= 1
    exponent = max(-126, min(127, exponent))
    return math.ldexp(x, -exponent), math.ldexp(1.0, exponent)


def split_tensor(x: Tensor) -> tuple[Tensor, Tensor]:
    """A 0-d tensor as (mantissa, scale) at run time, as `split`."""
    size = x.detach().abs().float()
    scale = nearest2(size.clamp(max=2.0**126))  # times sqrt(2) it must stay finite
    assert isinstance(scale, Tensor)
    scale = torch.where(torch.isfinite(size) & (scale > 0), scale, torch.zeros_like(scale))
    data = (widened(x) / torch.where(scale == 0, 1.0, scale)).to(x.dtype)  # fp16 cannot hold every scale
    return torch.where(scale == 0, x, data), scale


def widened(x: Tensor) -> Tensor:
    """x in float32, or float64 where it is that."""
    return x if x.dtype == torch.float64 else x.float()


def rms2(x: Tensor) -> Tensor:
    """The power of two nearest to the RMS of a plain tensor, 0-d float32; 0 for zeros and for data that are not finite.

    Not the one below, as for the rescales of the paper: a norm's gain of 1 - 1e-4 would stand under 1/2, and double the
    data of everything behind it.
    """
    if x.numel() == 0:
        return torch.zeros((), device=x.device)
    top = floor2(x.abs().amax())  # squares of 1e-23 and 1e20 are outside float32
    assert isinstance(top, Tensor)
    found = nearest2((x.float() / torch.where(top == 0, 1.0, top)).square().mean().sqrt()) * top
    assert isinstance(found, Tensor)
    return torch.where(torch.isfinite(found), found, 0.0)


def ratio(source: Scale, target: Scale) -> Scale:
    """What data under `source` are multiplied by to stand under `target`; 1 where the source is any scale."""
    if not isinstance(source, Tensor) and not isinstance(target, Tensor):
        return source / target if source and target else 1.0
    if not isinstance(source, Tensor):
        return source / target if source else 1.0
    if not isinstance(target, Tensor):
        return torch.where(source == 0, 1.0, source * (1.0 / target)) if target else 1.0
    return torch.where(source == 0, 1.0, source / target)


def as_tensor(s: Scale, like: Tensor) -> Tensor:
    """A scale as a 0-d float32 tensor on `like`'s device."""
    if isinstance(s, Tensor):
        return s
    return torch.full((), s, dtype=torch.float32, device=like.device)
