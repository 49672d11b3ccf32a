"""Activations x g(x) with a bounded gate g, and their gradients: both keep the scale (Scalify, its appendix C).

The RMS shrinks a little, and outliers are safe: data * g(value) never exceeds the data. Where f(c x) = c f(x) the
function runs on the data, otherwise it sees the value and the scale is divided out again. Gradients: f' is bounded, so
s_g stays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from isoscale.scalify import scales
from isoscale.scalify.pair import Pair, lift
from isoscale.scalify.registry import rule
from isoscale.scalify.rules.support import (
    beside,
    dtype_of,
    filler,
    known,
    number,
    ops,
    real,
    scale_of,
    smaller,
    stored,
    under_wide,
    wide,
)  # fmt: skip
from isoscale.scalify.scales import Scale

GATED = ("gelu", "silu", "mish", "hardswish", "softshrink", "hardshrink", "glu")
SAME = ("relu", "leaky_relu")
GRADIENTS = (
    "gelu_backward", "silu_backward", "mish_backward", "hardswish_backward", "softshrink_backward",
    "hardshrink_backward", "glu_backward", "hardtanh_backward",
)  # fmt: skip


def _gated(op: Callable[..., Any]) -> Any:
    def function(x: Pair, *args: Any, **kwargs: Any) -> Pair:
        """s = s_x. Assumes a gate of order 1."""
        return stored(op(real(x), *args, **kwargs), x.scale, x.data.dtype)

    return function


def _same(op: Callable[..., Any]) -> Any:
    def function(x: Pair, *args: Any, **kwargs: Any) -> Pair:
        """s = s_x. Assumes as many values above 0 as below."""
        return Pair(op(x.data, *args, **kwargs), x.scale)

    return function


def _gradient(op: Callable[..., Any]) -> Any:
    def function(grad: Any, x: Any, *args: Any, **kwargs: Any) -> Pair:
        """s = s_g. Assumes a derivative of order 1."""
        grad = lift(grad)
        return Pair(op(wide(grad.data), real(x), *args, **kwargs).to(grad.data.dtype), grad.scale)

    return function


for _name in GATED:
    for _op in ops(_name):
        rule(_op)(_gated(_op))
for _name in SAME:
    for _op in ops(_name):
        rule(_op)(_same(_op))
for _name in GRADIENTS:
    for _op in ops(_name):
        rule(_op)(_gradient(_op))


def relu_or_gelu(x: Pair, gelu: bool) -> Pair:
    """s = s_x, of a layer whose two activations torch tells apart by a flag."""
    op = torch.nn.functional.gelu if gelu else torch.relu
    return stored(op(real(x)), x.scale, x.data.dtype) if gelu else Pair(op(x.data), x.scale)


@rule(*ops("threshold_backward"))
def threshold_backward(grad: Any, x: Any, threshold: float) -> Pair:
    """s = s_g. Assumes as many values above the threshold as below."""
    grad = lift(grad)
    seen = real(x) if threshold else lift(x).data
    if seen.dtype == grad.data.dtype:
        return Pair(torch.ops.aten.threshold_backward.default(grad.data, seen, threshold), grad.scale)
    return Pair(torch.where(seen <= threshold, 0.0, grad.data).to(grad.data.dtype), grad.scale)


@rule(*ops("leaky_relu_backward"))
def leaky_relu_backward(grad: Any, x: Any, negative_slope: float, self_is_result: bool) -> Pair:
    """s = s_g. Assumes as many values above 0 as below."""
    grad, data = lift(grad), lift(x).data
    op = torch.ops.aten.leaky_relu_backward.default
    return Pair(op(grad.data, data.to(grad.data.dtype), negative_slope, self_is_result), grad.scale)


@rule(*ops("elu"))
def elu(x: Pair, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Pair:
    """s = s_x. Assumes values that are not all far below 0."""
    return stored(torch.ops.aten.elu.default(real(x), alpha, scale, input_scale), known(x.scale), x.data.dtype)


@rule(*ops("celu"))
def celu(x: Pair, alpha: float = 1.0) -> Pair:
    """s = s_x. Assumes values that are not all far below 0."""
    return stored(torch.celu(real(x), alpha), known(x.scale), x.data.dtype)


@rule(*ops("elu_backward"))
def elu_backward(
    grad: Any, alpha: float, scale: float, input_scale: float, is_result: bool, self_or_result: Any
) -> Pair:
    """s = s_g. Assumes a derivative of order 1."""
    grad = lift(grad)
    out = torch.ops.aten.elu_backward.default(
        wide(grad.data), alpha, scale, input_scale, is_result, real(self_or_result)
    )
    return Pair(out.to(grad.data.dtype), grad.scale)


@rule(*ops("_prelu_kernel"))
def prelu(x: Any, weight: Any) -> Pair:
    """s = s_x. Assumes slopes of order 1 or below."""
    x = lift(x)
    out = torch.where(x.data > 0, wide(x.data), wide(x.data) * real(weight))
    return Pair(out.to(x.data.dtype), x.scale)


@rule(*ops("_prelu_kernel_backward"))
def prelu_backward(grad: Any, x: Any, weight: Any) -> tuple[Pair, Pair]:
    """s = s_g, and s_g s_x for the slope. Assumes slopes of order 1 or below."""
    grad, x = lift(grad), lift(x)
    one, two = torch.ops.aten._prelu_kernel_backward.default(wide(grad.data), wide(x.data), real(weight))
    kind = grad.data.dtype
    return Pair(one.to(kind), grad.scale), Pair(two.to(kind), scales.mul(grad.scale, x.scale))


@rule(*ops("threshold"))
def threshold(x: Pair, threshold: float, value: float) -> Pair:
    """s = s_x, or the value's where it is up to 2^10 larger. Assumes that a larger one is a mask."""
    s = beside(x.scale, scale_of(value))
    low = real(x) <= threshold
    return Pair(torch.where(low, filler(value, s, x.data), under_wide(x, s)).to(x.data.dtype), s)


def _band(x: Scale, low: float | None, high: float | None) -> Scale:
    """The scale of x clamped by numbers: no larger than a two-sided band, no smaller than a band that leaves out 0."""
    s = x
    if low is not None and high is not None and abs(low) != float("inf") and abs(high) != float("inf"):
        s = smaller(x, scales.larger(scale_of(low), scale_of(high)))
    if low is not None and 0 < low < float("inf"):
        s = scales.larger(s, scale_of(low))
    if high is not None and 0 > high > -float("inf"):
        s = scales.larger(s, scale_of(high))
    return s


def _clamped(x: Pair, low: float | None, high: float | None) -> Pair:
    x = Pair(x.data, known(x.scale))  # an infinity under any scale becomes a number
    s = _band(x.scale, low, high)
    data = under_wide(x, s)
    bounds = [None if b is None else torch.as_tensor(number(b, s, data), dtype=data.dtype) for b in (low, high)]
    out = torch.clamp(data, *(None if b is None else b.to(data.device) for b in bounds))
    if out.dim() == 0 and isinstance(s, torch.Tensor):
        mantissa, power = scales.split_tensor(out)
        return Pair(mantissa.to(x.data.dtype), scales.mul(power, s))
    return Pair(out.to(x.data.dtype), s)


@rule(*ops("clamp"))
def clamp(x: Pair, min: float | None = None, max: float | None = None) -> Pair:
    """s = s_x, at most that of a band [low, high], at least that of a band without 0. Assumes values on both sides.

    A single number (such as a clipping factor) is split anew at run time instead: it is far on one side.
    """
    return _clamped(x, min, max)


@rule(*ops("clamp_min"))
def clamp_min(x: Pair, min: float) -> Pair:
    """s = s_x, at least that of a bound above 0. Assumes values on both sides."""
    return _clamped(x, min, None)


@rule(*ops("clamp_max"))
def clamp_max(x: Pair, max: float) -> Pair:
    """s = s_x, at least that of a bound below 0. Assumes values on both sides."""
    return _clamped(x, None, max)


@rule(*ops("hardtanh"))
def hardtanh(x: Pair, min_val: float = -1, max_val: float = 1) -> Pair:
    """s = min(s_x, that of the band), at least that of a band without 0. Assumes values on both sides."""
    return _clamped(x, min_val, max_val)


@rule(*ops("clamp.Tensor", "clamp_min.Tensor", "clamp_max.Tensor"))
def clamp_tensor(x: Any, min: Any = None, max: Any = None) -> Pair:
    """s = max(s_x, s_bounds). Assumes bounds of the size of the values."""
    x = lift(x)
    bounds = [None if bound is None else lift(bound) for bound in (min, max)]
    s = scales.larger(x.scale, *(bound.scale for bound in bounds if bound is not None))
    low, high = (None if bound is None else under_wide(bound, s) for bound in bounds)
    return Pair(torch.clamp(under_wide(x, s), low, high).to(dtype_of(x, min, max)), s)
