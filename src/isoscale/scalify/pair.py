"""A value as (data, scale), and the few ways to make one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from isoscale.scalify import scales
from isoscale.scalify.scales import Number, Scale

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """value = data * scale.

    Attributes:
        data: a tensor; for a number that was split, the mantissa.
        scale: a power of two, or 0 (any scale): a 0-d float32 tensor or a Python number.
    """

    data: Any
    scale: Scale


def times(data: Any, factor: Scale) -> Any:
    """data * factor in the data's own dtype, rounded once; a factor beyond fp16's range is no harm."""
    if not isinstance(factor, Tensor) and factor == 1:
        return data
    if isinstance(data, Tensor) and data.dtype in _HALF:
        return (data.float() * factor).to(data.dtype)
    return data * factor


def under(pair: Pair, scale: Scale) -> Any:
    """The data of a pair under another scale: data * (pair.scale / scale). Any-scale data stay as they are."""
    if pair.scale is scale:
        return pair.data
    return times(pair.data, scales.ratio(pair.scale, scale))


def value(pair: Pair | Tensor, dtype: torch.dtype | None = None) -> Any:
    """The plain value data * scale.

    Args:
        pair: whose value; a scaled or a plain tensor will do (no gradient: `as_plain` has one).
        dtype: of the result; by default that of the data, but the product is taken in float32 at least.
    """
    if isinstance(pair, Tensor):  # scaled (it carries the two) or plain
        pair = Pair(getattr(pair, "_data", pair), getattr(pair, "_scale", 1.0))
    data = pair.data
    if not isinstance(data, Tensor):
        return data if _is_any(pair.scale) else data * pair.scale
    dtype = dtype or data.dtype
    if not data.is_floating_point():
        return data
    wide = data if data.dtype in (torch.float32, torch.float64) else data.float()
    if isinstance(pair.scale, Tensor):
        return (wide * torch.where(pair.scale == 0, 1.0, pair.scale)).to(dtype)
    return (wide * (pair.scale or 1.0)).to(dtype)


def _is_any(scale: Scale) -> bool:
    return not isinstance(scale, Tensor) and scale == 0


def lift(x: Pair | Tensor | Number) -> Pair:
    """Anything a rule may get beside a pair.

    A number is split (`scales.split`), a 0-d float tensor too, at run time; a plain float tensor of any other shape
    stands under scale 1, as do integers and booleans.
    """
    if isinstance(x, Pair):
        return x
    if isinstance(x, Tensor):
        if x.dim() == 0 and x.is_floating_point():
            return Pair(*scales.split_tensor(x))
        return Pair(x, 1.0)
    return Pair(*scales.split(x))
