"""What optimisers call beside sums and products: averages and fused products. Weights may be half, moments float32."""

from __future__ import annotations

import math
from typing import Any

import torch

from isoscale.scalify import scales
from isoscale.scalify.pair import Pair, lift
from isoscale.scalify.registry import rule
from isoscale.scalify.rules.arithmetic import fused
from isoscale.scalify.rules.support import dtype_of, ops, real, under_wide, wide


@rule(*ops("lerp.Scalar", "lerp.Tensor"))
def lerp(a: Any, b: Any, weight: Any) -> Pair:
    """s = max(s_a, s_b): a convex sum. Assumes operands of like size and a weight in [0, 1]."""
    a, b = lift(a), lift(b)
    s = scales.larger(a.scale, b.scale)
    left, right = under_wide(a, s), under_wide(b, s)
    if not isinstance(weight, (int, float)):
        weight = real(lift(weight)).to(left.dtype)
    return Pair(torch.lerp(left, right, weight).to(dtype_of(a)), s)


@rule(*ops("addcmul"))
def addcmul(x: Any, a: Any, b: Any, value: float = 1) -> Pair:
    """s = max(s_x, s_a s_b |v|); sqrt(|v|) for |v| < 1. Assumes that then x is an average: one term is v, all are 1."""
    x, a, b = lift(x), lift(a), lift(b)
    share = math.sqrt(abs(value)) if abs(value) < 1 else abs(value)
    power = scales.split(share)[1]
    product = wide(a.data) * wide(b.data)
    factor = value / power if power else value
    return fused(x, product, scales.mul(scales.mul(a.scale, b.scale), power), factor, dtype_of(x, a, b))


@rule(*ops("addcdiv"))
def addcdiv(x: Any, a: Any, b: Any, value: float = 1) -> Pair:
    """s = max(s_x, |v| s_a / s_b). Assumes independent terms and a denominator away from 0."""
    x, a, b = lift(x), lift(a), lift(b)
    factor, power = scales.split(value)
    quotient = wide(a.data) / wide(b.data)
    return fused(x, quotient, scales.mul(scales.div(a.scale, b.scale), power), factor, dtype_of(x, a, b))
