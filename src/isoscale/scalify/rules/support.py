"""What the rules share: operators by name, half data made wide, numbers under a scale, powers of scales."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from isoscale.scalify import scales
from isoscale.scalify.pair import Pair, lift, times, under
from isoscale.scalify.scales import Number, Scale

_LOWEST, _HIGHEST = -126, 127


def ops(*names: str) -> tuple[OpOverload, ...]:
    """aten operators by name, `tanh` or `sum.dim_IntList`; names that this torch does not have are left out."""
    found = []
    for name in names:
        packet, _, overload = name.partition(".")
        op = getattr(getattr(torch.ops.aten, packet, None), overload or "default", None)
        if isinstance(op, OpOverload):
            found.append(op)
    return tuple(found)


def wide(x: Any) -> Any:
    """Half and narrower data as float32; float32, float64, integers and numbers as they are."""
    return x.float() if isinstance(x, Tensor) and x.is_floating_point() and x.dtype.itemsize < 4 else x


def dtype_of(*xs: Any) -> torch.dtype:
    """The dtype that torch promotes these operands' data to; numbers and 0-d tensors give way as they do there."""
    tensors = [x.data if isinstance(x, Pair) else x for x in xs]
    tensors = [x for x in tensors if isinstance(x, Tensor)]
    floats = [x for x in tensors if x.is_floating_point()]
    strong = [x for x in floats if x.dim()] or floats
    out: torch.dtype = strong[0].dtype
    for x in strong[1:]:
        out = torch.promote_types(out, x.dtype)
    return out


def known(s: Scale) -> Scale:
    """A scale as a factor: 1 where it is any."""
    return torch.where(s == 0, 1.0, s) if isinstance(s, Tensor) else s or 1.0


def inverse(s: Scale) -> Scale:
    """1 / s; 1 where it is any."""
    return 1.0 / known(s)


def real(x: Any) -> Any:
    """The value, in float32 where the data are half: what a function that is not linear has to see."""
    if not isinstance(x, Pair):
        return wide(x)
    return times(wide(x.data), known(x.scale))


def under_wide(pair: Pair, s: Scale) -> Any:
    """The data under another scale, in float32 where they are half: nothing is rounded."""
    return times(wide(pair.data), scales.ratio(pair.scale, s))


def stored(y: Any, s: Scale, dtype: torch.dtype) -> Pair:
    """A plain value as a pair under a given scale, rounded once to its dtype."""
    return Pair(times(y, inverse(s)).to(dtype), s)


def smaller(a: Scale, b: Scale) -> Scale:
    """The smaller of two scales."""
    if not isinstance(a, Tensor) and not isinstance(b, Tensor):
        return min(a, b)
    if not isinstance(a, Tensor):
        a, b = b, a
    assert isinstance(a, Tensor)
    return torch.minimum(a, b) if isinstance(b, Tensor) else a.clamp(max=b)


def capped(s: Scale) -> Scale:
    """min(s, 1), and 1 for any scale: of odd functions that are the identity near 0 and level off."""
    return smaller(known(s), 1.0)


def below(n: int) -> int:
    """The largest power of two not above n >= 1, by comparisons: a symbolic n gets one range guard an octave."""
    out = 1
    while 2 * out <= n:
        out *= 2
    return out


def number(c: Number, s: Scale, like: Tensor) -> Any:
    """The number c as data under a scale: c / s, in the width of `like` and rounded once."""
    if c == 0 or not math.isfinite(c):
        return c
    if not isinstance(s, Tensor):
        return c / s if s else c
    kind = torch.float64 if like.dtype == torch.float64 else torch.float32
    out = torch.where(s == 0, c, c / s.to(kind))
    return out if like.dim() else out.to(like.dtype)


def operand(x: Any, s: Scale, like: Tensor) -> Any:
    """A number, tensor or pair as data under a scale."""
    if isinstance(x, (int, float)):
        return number(x, s, like)
    return under(lift(x), s)


def size(x: Tensor, dim: Any = None) -> Any:
    """How many elements a reduction over `dim` (an int, several, or None and [] for all) takes together."""
    if dim is None or (isinstance(dim, (list, tuple)) and not dim) or x.dim() == 0:
        return x.numel()
    out: Any = 1
    for d in dim if isinstance(dim, (list, tuple)) else [dim]:
        out = out * x.shape[d]
    return out


def power(s: Scale, p: float) -> tuple[Scale, Scale]:
    """(rest, scale) with rest * scale = s^p, the exponent rounded down to a whole number and held in float32's range.

    The rest is 1 for a whole p, but for exponents out of range. s^0 is 1 even for any scale.
    """
    if p == 0:
        return 1.0, 1.0
    if not isinstance(s, Tensor):
        if s == 0:
            return 1.0, scales.ANY
        exponent = (math.frexp(s)[1] - 1) * p
        whole = min(max(math.floor(exponent), _LOWEST), _HIGHEST)
        return 2.0 ** (exponent - whole), 2.0**whole
    ours = (s.view(torch.int32) >> 23) - 127
    wanted = ours * p
    whole_bits = torch.floor(wanted) if isinstance(p, float) else wanted
    whole_bits = whole_bits.clamp(_LOWEST, _HIGHEST).to(torch.int32)
    scale = torch.where(s == 0, 0, (whole_bits + 127) << 23).to(torch.int32).view(torch.float32)
    return torch.where(s == 0, 1.0, torch.exp2((wanted - whole_bits).float())), scale


MASK = 2.0**10
"""A constant this much larger than what it goes into is a mask, not a value."""


def beside(s: Scale, c: Scale) -> Scale:
    """The scale of a tensor under s into which constants under c go: the larger; for a mask s, or a little above.

    Under the scale of a mask such as -1e9 or the smallest float the values beside it would be lost. Under s alone fp16
    could not tell a mask from a value where s is small: so that 1024, or the mask if that is less, stays below fp16's
    top, the scale is min(c, 2^10) 2^-15 at least.
    """
    if not isinstance(s, Tensor) and not isinstance(c, Tensor):
        return max(s, min(c, MASK) * 2.0**-15) if s and c > MASK * s else max(s, c)
    most = scales.larger(s, c)
    assert isinstance(most, Tensor)
    mask = torch.as_tensor((s != 0) & (c > MASK * s) if isinstance(s, Tensor) else c > (MASK * s or math.inf))
    least = (c.clamp(max=MASK) if isinstance(c, Tensor) else min(c, MASK)) * 2.0**-15
    return torch.where(mask, scales.larger(s, least), most)


def filler(c: Any, s: Scale, like: Tensor) -> Any:
    """A constant (number, 0-d tensor or pair) as data under a scale; a finite one stays finite in like's dtype."""
    top = torch.finfo(like.dtype).max
    if isinstance(c, (int, float)):
        if c == 0 or not math.isfinite(c):
            return c
        out = number(c, s, like)
        return out.clamp(-top, top) if isinstance(out, Tensor) else min(max(out, -top), top)
    pair = lift(c)
    out = under_wide(pair, s)
    return torch.where(torch.isfinite(pair.data), out.clamp(-top, top), pair.data)


def scale_of(c: Any) -> Scale:
    """The scale that a constant is split to."""
    return lift(c).scale
