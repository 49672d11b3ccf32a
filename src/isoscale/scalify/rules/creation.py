"""New tensors like a scaled one. Zeros, and what is not filled yet, stand under any scale: that of the first write."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from isoscale.scalify import scales
from isoscale.scalify.pair import Pair, lift
from isoscale.scalify.registry import rule
from isoscale.scalify.rules.support import ops, real


def _made(out: Tensor, scale: scales.Scale) -> Pair | Tensor:
    return Pair(out, scale) if out.is_floating_point() else out


def _any(op: Any) -> Any:
    def make(x: Pair, *args: Any, **kwargs: Any) -> Pair | Tensor:
        """any scale"""
        return _made(op(x.data, *args, **kwargs), scales.ANY)

    return make


def _one(op: Any) -> Any:
    def make(x: Pair, *args: Any, **kwargs: Any) -> Pair | Tensor:
        """s = 1"""
        return _made(op(x.data, *args, **kwargs), 1.0)

    return make


def _plain(op: Any) -> Any:
    def make(x: Pair, *args: Any, **kwargs: Any) -> Any:
        """plain: random numbers under 1"""
        return op(x.data, *args, **kwargs)

    return make


for _op in ops("zeros_like", "new_zeros", "empty_like", "new_empty", "new_empty_strided", "zero"):
    rule(_op)(_any(_op))
for _op in ops("ones_like", "new_ones"):
    rule(_op)(_one(_op))
for _op in ops("rand_like", "randn_like", "bernoulli.p"):
    rule(_op)(_plain(_op))


def _full(x: Pair, value: Any, make: Any) -> Any:
    if isinstance(value, (int, float)):
        mantissa, scale = scales.split(value)
        return _made(make(mantissa), scale)
    pair = lift(value)
    return Pair(make(0.0) + pair.data.to(x.data.dtype), pair.scale)


@rule(*ops("full_like"))
def full_like(x: Pair, fill_value: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Any:
    """s = |value| to the nearest power of two: exact."""
    if dtype is not None and not dtype.is_floating_point:
        return torch.ops.aten.full_like.default(x.data, fill_value, dtype=dtype, **kwargs)
    return _full(x, fill_value, lambda v: torch.ops.aten.full_like.default(x.data, v, dtype=dtype, **kwargs))


@rule(*ops("new_full"))
def new_full(x: Pair, size: Any, fill_value: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Any:
    """s = |value| to the nearest power of two: exact."""
    if dtype is not None and not dtype.is_floating_point:
        return torch.ops.aten.new_full.default(x.data, size, fill_value, dtype=dtype, **kwargs)
    return _full(x, fill_value, lambda v: torch.ops.aten.new_full.default(x.data, size, v, dtype=dtype, **kwargs))


@rule(*ops("fill.Scalar", "fill.Tensor"))
def fill(x: Any, value: Any) -> Any:
    """s = |value| to the nearest power of two: exact."""
    data = lift(x).data
    return _full(Pair(data, 1.0), value, lambda v: torch.full_like(data, v))


@rule(*ops("bernoulli"))
def bernoulli(x: Pair, generator: Any = None) -> Any:
    """plain: zeros and ones, drawn with the values as probabilities"""
    return torch.bernoulli(real(x), generator=generator).to(x.data.dtype)


@rule(*ops("multinomial"))
def multinomial(x: Pair, num_samples: int, replacement: bool = False, generator: Any = None) -> Any:
    """plain: indices; weights need no scale"""
    return torch.multinomial(x.data, num_samples, replacement, generator=generator)


def _widest(*numbers: float) -> float:
    return scales.split(max(abs(x) for x in numbers))[1] or 1.0


@rule(*ops("uniform"))
def uniform(x: Any, low: float = 0.0, high: float = 1.0, generator: Any = None, **named: Any) -> Pair:
    """s = max(|low|, |high|) to the nearest power of two."""
    low, high = named.get("from", low), named.get("to", high)
    s = _widest(low, high)
    return Pair(torch.ops.aten.uniform.default(lift(x).data, low / s, high / s, generator=generator), s)


@rule(*ops("normal_functional"))
def normal(x: Any, mean: float = 0.0, std: float = 1.0, generator: Any = None) -> Pair:
    """s = max(|mean|, std) to the nearest power of two."""
    s = _widest(mean, std)
    return Pair(torch.empty_like(lift(x).data).normal_(mean / s, std / s, generator=generator), s)


def _drawn(x: Any, new: Tensor, s: float) -> Any:
    """Random numbers under s written into x: a scale that is there stays, for x may be a part of something."""
    if not isinstance(x, Pair):
        return x.copy_(new * s)
    if not isinstance(x.scale, Tensor):
        x.data.copy_(new * (s / (x.scale or s)))
        return x
    x.scale.copy_(torch.where(x.scale == 0, s, x.scale))
    x.data.copy_(new * (s / x.scale))
    return x


@rule(*ops("bernoulli_.float"))
def bernoulli_(x: Any, p: float = 0.5, generator: Any = None) -> Any:
    """s = s_x, 1 where it was any. It writes: the operator has no other form."""
    data = x.data if isinstance(x, Pair) else x
    return _drawn(x, torch.empty_like(data).bernoulli_(p, generator=generator), 1.0)


@rule(*ops("normal_"))
def normal_(x: Any, mean: float = 0.0, std: float = 1.0, generator: Any = None) -> Any:
    """s = s_x, that of max(|mean|, std) where it was any. It writes: the operator has no other form."""
    new = normal(x, mean, std, generator)
    assert isinstance(new.scale, float)
    return _drawn(x, new.data, new.scale)


@rule(*ops("native_dropout"))
def native_dropout(x: Pair, p: float, train: bool | None) -> tuple[Pair, Any]:
    """s = s_x. Assumes that few elements are dropped."""
    out, mask = torch.ops.aten.native_dropout.default(x.data, p, train)
    return Pair(out, x.scale), mask


@rule(*ops("native_dropout_backward"))
def native_dropout_backward(grad: Pair, mask: Any, scale: float) -> Pair:
    """s = s_g. Assumes that few elements are dropped."""
    return Pair(torch.ops.aten.native_dropout_backward.default(grad.data, mask, scale), grad.scale)
