"""Powers and roots: the scale is raised too, and stays a power of two: what is left of it goes into the data first."""

from __future__ import annotations

from typing import Any

import torch

from isoscale.scalify import scales
from isoscale.scalify.pair import Pair, lift
from isoscale.scalify.registry import rule
from isoscale.scalify.rules.support import dtype_of, ops, power, real, stored, wide


@rule(*ops("sqrt"))
def sqrt(x: Pair) -> Pair:
    """s = sqrt(s_x); of an odd exponent a factor 2 goes into the data first. Assumes nothing."""
    f, root = scales.root(x.scale)
    return Pair(torch.sqrt(wide(x.data) * f).to(x.data.dtype), root)


@rule(*ops("rsqrt"))
def rsqrt(x: Pair) -> Pair:
    """s = 1 / sqrt(s_x); of an odd exponent a factor 2 goes into the data first. Assumes values away from 0."""
    f, root = scales.root(x.scale)
    return Pair(torch.rsqrt(wide(x.data) * f).to(x.data.dtype), scales.div(1.0, root))


@rule(*ops("square"))
def square(x: Pair) -> Pair:
    """s = s_x^2, within float32's range. Assumes nothing."""
    return pow_number(x, 2)


@rule(*ops("pow.Tensor_Scalar"))
def pow_number(x: Pair, p: float) -> Pair:
    """s = s_x^p, its exponent rounded down and within float32's range. Assumes values away from 0 if p < 0."""
    if p in (0.5, -0.5):
        return sqrt(x) if p > 0 else rsqrt(x)
    if float(p).is_integer():
        rest, s = power(x.scale, int(p))
        return Pair((torch.pow(wide(x.data), p) * rest).to(x.data.dtype), s)
    _, s = power(x.scale, float(p))
    return stored(torch.pow(real(x), p), s, x.data.dtype)


@rule(*ops("pow.Scalar"))
def number_pow(base: float, x: Any) -> Pair:
    """s = 1, like exp. Assumes exponents near 0."""
    return Pair(torch.pow(base, real(x)).to(dtype_of(x)), 1.0)


@rule(*ops("pow.Tensor_Tensor"))
def pow_tensor(x: Any, p: Any) -> Pair:
    """s = 1: every element of the result would have a scale of its own. Assumes bases near 1 or exponents near 0."""
    return Pair(torch.pow(real(lift(x)), real(lift(p))).to(dtype_of(x, p)), 1.0)
