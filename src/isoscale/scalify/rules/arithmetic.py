"""Sums, products and quotients (Scalify, arXiv 2407.17353, its table of rules).

Sums stand under the larger scale: for powers of two this is what the paper's rounded-down Gaussian sum gives, since
sqrt(s_a^2 + s_b^2) lies in [m, sqrt(2) m]. Numbers are split to the nearest power of two.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from isoscale.scalify import scales
from isoscale.scalify.pair import Pair, lift
from isoscale.scalify.registry import rule
from isoscale.scalify.rules.support import (
    beside,
    dtype_of,
    filler,
    known,
    number,
    operand,
    ops,
    real,
    scale_of,
    stored,
    under_wide,
    wide,
)  # fmt: skip
from isoscale.scalify.scales import Scale

_NUMBER = (int, float)


def _sum(a: Any, b: Any, alpha: Any, sign: int) -> Pair:
    """a + sign alpha b."""
    alpha = sign * alpha
    if isinstance(b, _NUMBER):  # the number goes in whole: split into float32 factors it would lose digits of float64
        a, c = lift(a), b * alpha
        s = scales.larger(a.scale, scales.split(c)[1])
        return Pair(torch.add(operand(a, s, a.data), number(c, s, a.data)), s)
    a, b = lift(a), lift(b)
    mantissa, power = scales.split(alpha)
    b = Pair(b.data, scales.mul(b.scale, power))
    s = scales.larger(a.scale, b.scale)
    return Pair(torch.add(operand(a, s, a.data), operand(b, s, b.data), alpha=mantissa), s)


@rule(*ops("add.Tensor", "add.Scalar"))
def add(a: Any, b: Any, alpha: Any = 1) -> Pair:
    """s = max(s_a, s_b |alpha|), |alpha| to the nearest power of two. Assumes independent terms of zero mean."""
    return _sum(a, b, alpha, 1)


@rule(*ops("sub.Tensor", "sub.Scalar"))
def sub(a: Any, b: Any, alpha: Any = 1) -> Pair:
    """s = max(s_a, s_b |alpha|). Assumes independent terms of zero mean."""
    return _sum(a, b, alpha, -1)


@rule(*ops("rsub.Tensor", "rsub.Scalar"))
def rsub(a: Any, b: Any, alpha: Any = 1) -> Pair:
    """s = max(s_b, s_a |alpha|). Assumes independent terms of zero mean."""
    if not isinstance(b, _NUMBER):
        return _sum(b, a, alpha, -1)
    a = lift(a)
    mantissa, power = scales.split(alpha)
    a = Pair(a.data, scales.mul(a.scale, power))
    s = scales.larger(a.scale, scales.split(b)[1])
    return Pair(torch.rsub(operand(a, s, a.data), number(b, s, a.data), alpha=mantissa), s)


@rule(*ops("mul.Tensor", "mul.Scalar"))
def mul(a: Any, b: Any) -> Pair:
    """s = s_a s_b. Assumes independent factors."""
    a, b = lift(a), lift(b)
    return Pair(torch.mul(a.data, b.data), scales.mul(a.scale, b.scale))


@rule(*ops("div.Tensor", "div.Scalar"))
def div(a: Any, b: Any) -> Pair:
    """s = s_a / s_b, any where s_b is. Assumes a denominator away from 0."""
    a, b = lift(a), lift(b)
    return Pair(torch.div(a.data, b.data), scales.div(a.scale, b.scale))


@rule(*ops("reciprocal"))
def reciprocal(x: Pair) -> Pair:
    """s = 1 / s_x. Assumes values away from 0."""
    return Pair(torch.reciprocal(x.data), scales.div(1.0, x.scale))


@rule(*ops("div.Tensor_mode", "div.Scalar_mode"))
def div_mode(a: Any, b: Any, rounding_mode: str | None = None) -> Pair:
    """s = max(s_a / s_b, 1): whole numbers. Assumes a denominator away from 0."""
    if rounding_mode is None:
        return div(a, b)
    s = scales.larger(scales.div(lift(a).scale, lift(b).scale), 1.0)
    return stored(torch.div(real(a), real(b), rounding_mode=rounding_mode), s, dtype_of(a, b))


@rule(*ops("floor_divide", "floor_divide.Scalar"))
def floor_divide(a: Any, b: Any) -> Pair:
    """s = max(s_a / s_b, 1): whole numbers. Assumes a denominator away from 0."""
    return div_mode(a, b, "floor")


def _rest(op: Any, a: Any, b: Any) -> Pair:
    s = known(lift(b).scale)
    return stored(op(real(a), real(b)), s, dtype_of(a, b))


@rule(*ops("remainder.Tensor", "remainder.Scalar", "remainder.Scalar_Tensor"))
def remainder(a: Any, b: Any) -> Pair:
    """s = s_b. Assumes a remainder that is uniform below the divisor."""
    return _rest(torch.remainder, a, b)


@rule(*ops("fmod.Tensor", "fmod.Scalar"))
def fmod(a: Any, b: Any) -> Pair:
    """s = s_b. Assumes a remainder that is uniform below the divisor."""
    return _rest(torch.fmod, a, b)


def _whole(op: Any) -> Any:
    def to_whole(x: Pair, **kwargs: Any) -> Pair:
        """s = max(s_x, 1): whole numbers. Assumes values that are not all below 1."""
        return stored(op(real(x), **kwargs), scales.larger(x.scale, 1.0), x.data.dtype)

    return to_whole


for _name in ("floor", "ceil", "trunc", "round", "round.decimals"):
    for _op in ops(_name):
        rule(_op)(_whole(_op))


def _pick(op: Any) -> Any:
    def extreme(a: Any, b: Any) -> Pair:
        """s = max(s_a, s_b). Assumes operands of like size; 0 and infinities take the other's scale."""
        a, b = lift(a), lift(b)
        s = scales.larger(a.scale, b.scale)
        return Pair(op(operand(a, s, a.data), operand(b, s, b.data)), s)

    return extreme


for _name in ("maximum", "minimum", "fmax", "fmin", "hypot", "max.other", "min.other"):
    for _op in ops(_name):
        rule(_op)(_pick(_op))


@rule(*ops("sign", "sgn"))
def sign(x: Pair) -> Pair:
    """s = 1: values are -1, 0 and 1."""
    return Pair(torch.sign(x.data), 1.0)


@rule(*ops("copysign.Tensor", "copysign.Scalar"))
def copysign(a: Any, b: Any) -> Pair:
    """s = s_a: only signs change."""
    a = lift(a)
    sign_of = b.data if isinstance(b, Pair) else b
    return Pair(torch.copysign(a.data, sign_of), a.scale)


@rule(*ops("atan2"))
def atan2(a: Any, b: Any) -> Pair:
    """s = 1: angles. Assumes operands of like size."""
    a, b = lift(a), lift(b)
    s = scales.larger(a.scale, b.scale)
    return Pair(torch.atan2(under_wide(a, s), under_wide(b, s)).to(dtype_of(a, b)), 1.0)


@rule(*ops("nan_to_num"))
def nan_to_num(x: Pair, nan: float | None = None, posinf: float | None = None, neginf: float | None = None) -> Pair:
    """s = s_x, or that of what replaces NaN. Assumes few of them; infinities become the data's largest unless told."""
    data, top = x.data, torch.finfo(x.data.dtype).max
    given = [c for c in (nan, posinf, neginf) if c]
    s = x.scale
    for c in given:
        s = beside(s, scale_of(c))
    data = operand(x, s, data)
    high, low = top if posinf is None else filler(posinf, s, data), -top if neginf is None else filler(neginf, s, data)
    out = torch.where(torch.isnan(data), filler(nan or 0.0, s, data), data)
    out = torch.where(data == float("inf"), high, out)
    return Pair(torch.where(data == -float("inf"), low, out).to(data.dtype), s)


@rule(*ops("logaddexp"))
def logaddexp(a: Any, b: Any) -> Pair:
    """s = max(s_a, s_b, 1): near the larger of the two, and log 2 where both are 0."""
    s = scales.larger(lift(a).scale, lift(b).scale, 1.0)
    return stored(torch.logaddexp(real(a), real(b)), s, dtype_of(a, b))


@rule(*ops("logaddexp2"))
def logaddexp2(a: Any, b: Any) -> Pair:
    """s = max(s_a, s_b, 1): near the larger of the two, and 1 where both are 0."""
    s = scales.larger(lift(a).scale, lift(b).scale, 1.0)
    return stored(torch.logaddexp2(real(a), real(b)), s, dtype_of(a, b))


def fused(base: Pair, product: Tensor, share: Scale, factor: float, dtype: torch.dtype) -> Pair:
    """base + factor product under the larger of base.scale and share, in wide data, rounded once.

    Args:
        base: the summand with a scale of its own.
        product: wide data under `share`.
        share: scale of the product.
        factor: a number.
        dtype: of the result.
    """
    s = scales.larger(base.scale, share)
    moved = product if share is s else product * scales.ratio(share, s)
    return Pair(torch.add(under_wide(base, s), moved, alpha=factor).to(dtype), s)


@rule("prims::fma")  # compiled optimisers reach a tensor subclass through it
def fma(a: Any, b: Any, c: Any) -> Pair:
    """s = max(s_a s_b, s_c). Assumes independent terms of zero mean."""
    a, b, c = lift(a), lift(b), lift(c)
    return fused(c, wide(a.data) * wide(b.data), scales.mul(a.scale, b.scale), 1.0, dtype_of(a, b, c))
