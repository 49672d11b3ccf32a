"""Functions that are linear in no sense: they see the value; the result stands under what they level off at.

Three kinds: those that tend to a constant or grow without measure stand under a fixed scale; odd ones that are the
identity near 0 keep a small scale, min(s_x, 1), and with it the small values; those that follow the larger of x and a
constant take max(s_x, 1). Each sees half data in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from isoscale.scalify import scales
from isoscale.scalify.pair import Pair, lift
from isoscale.scalify.registry import rule
from isoscale.scalify.rules.support import capped, dtype_of, known, ops, real, stored, wide
from isoscale.scalify.scales import Scale

FIXED = {
    "exp": 1.0, "exp2": 1.0, "cos": 1.0, "cosh": 1.0, "acos": 1.0, "acosh": 1.0, "erfc": 1.0, "log": 1.0, "log2": 1.0,
    "log10": 1.0, "logit": 1.0, "lgamma": 1.0, "digamma": 1.0, "sinc": 1.0, "sigmoid": 0.5, "hardsigmoid": 0.5,
    "special_entr": 1.0, "special_ndtr": 0.5, "special_log_ndtr": 1.0,
}  # fmt: skip
ODD = (
    "tanh", "erf", "erfinv", "sin", "tan", "atan", "asin", "sinh", "asinh", "atanh", "expm1", "log1p", "frac",
)  # fmt: skip


def _through(op: Callable[..., Any], scale: Callable[[Scale], Scale], text: str) -> Any:
    def function(x: Pair, *args: Any, **kwargs: Any) -> Pair:
        return stored(op(real(x), *args, **kwargs), scale(x.scale), x.data.dtype)

    function.__doc__ = text
    return function


for _name, _scale in FIXED.items():
    for _op in ops(_name):
        _text = f"s = {_scale:g}. Assumes values near 1 or below."
        rule(_op)(_through(_op, lambda s, fixed=_scale: fixed, _text))  # type: ignore[misc]
for _name in ODD:
    for _op in ops(_name):
        rule(_op)(_through(_op, capped, "s = min(s_x, 1): the identity near 0. Assumes values that do not blow up."))


@rule(*ops("xlogy.Tensor", "xlogy.Scalar_Other", "xlogy.Scalar_Self"))
def xlogy(x: Any, y: Any) -> Pair:
    """s = s_x. Assumes logarithms near 1."""
    s = known(x.scale) if isinstance(x, Pair) else 1.0
    return stored(torch.xlogy(real(x), real(y)), s, dtype_of(x, y))


@rule(*ops("polygamma"))
def polygamma(n: int, x: Pair) -> Pair:
    """s = 1. Assumes values near 1."""
    return Pair(torch.polygamma(n, real(x)).to(x.data.dtype), 1.0)


@rule(*ops("softplus"))
def softplus(x: Pair, beta: float = 1, threshold: float = 20) -> Pair:
    """s = max(s_x, 1): x where it is large, log 2 near 0."""
    out = torch.nn.functional.softplus(real(x), beta, threshold)
    return stored(out, scales.larger(x.scale, 1.0), x.data.dtype)


@rule(*ops("log_sigmoid_forward"))
def log_sigmoid(x: Pair) -> tuple[Pair, Any]:
    """s = max(s_x, 1): x where it is far below 0, log 2 near 0."""
    out, buffer = torch.ops.aten.log_sigmoid_forward.default(real(x))
    return stored(out, scales.larger(x.scale, 1.0), x.data.dtype), buffer


@rule(*ops("log_sigmoid_backward"))
def log_sigmoid_backward(grad: Any, x: Any, buffer: Any) -> Pair:
    """s = s_g. Assumes a derivative of order 1."""
    grad = lift(grad)
    out = torch.ops.aten.log_sigmoid_backward.default(wide(grad.data), real(x), real(buffer))
    return Pair(out.to(grad.data.dtype), grad.scale)


def _gradient(op: Callable[..., Any], bound: float, text: str) -> Any:
    """Of a function whose derivative is given through its result y: linear in the gradient, y as a value."""

    def function(grad: Any, y: Any, *args: Any, **kwargs: Any) -> Pair:
        grad = lift(grad)
        out = op(wide(grad.data), real(y), *args, **kwargs)
        return Pair((out * (1.0 / bound) if bound != 1 else out).to(grad.data.dtype), scales.mul(grad.scale, bound))

    function.__doc__ = text
    return function


for _op in ops("sigmoid_backward"):
    rule(_op)(_gradient(_op, 0.25, "s = s_g / 4: the largest derivative. Assumes values near 0."))
for _op in ops("hardsigmoid_backward"):
    rule(_op)(_gradient(_op, 0.125, "s = s_g / 8: below the derivative 1 / 6. Assumes values near 0."))
for _name in ("tanh_backward", "softplus_backward"):
    for _op in ops(_name):
        rule(_op)(_gradient(_op, 1.0, "s = s_g. Assumes a derivative of order 1."))
