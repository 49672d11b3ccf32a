"""Comparisons and tests: plain booleans. Both sides are brought under the larger scale, half data in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from isoscale.scalify import scales
from isoscale.scalify.pair import Pair, lift
from isoscale.scalify.registry import rule
from isoscale.scalify.rules.support import number, ops, real, under_wide


def _side(x: Any, s: scales.Scale, like: Tensor) -> Any:
    return number(x, s, like) if isinstance(x, (int, float)) else under_wide(lift(x), s)


def _compared(op: Callable[..., Any]) -> Any:
    def compare(a: Any, b: Any) -> Any:
        """plain booleans: both under max(s_a, s_b)"""
        s = scales.larger(lift(a).scale, lift(b).scale)
        tensors = [lift(x).data for x in (a, b) if not isinstance(x, (int, float))]
        like = max(tensors, key=lambda t: t.dtype.itemsize)
        return op(_side(a, s, like), _side(b, s, like))

    return compare


for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    for _overload in ("Tensor", "Scalar"):
        for _op in ops(f"{_name}.{_overload}"):
            rule(_op)(_compared(getattr(torch, _name)))
for _op in ops("equal"):
    rule(_op)(_compared(torch.equal))


def _of_data(op: Callable[..., Any]) -> Any:
    def of_data(x: Pair, *args: Any, **kwargs: Any) -> Any:
        """plain: the data tell"""
        return op(x.data, *args, **kwargs)

    return of_data


for _name in (
    "isnan", "isinf", "isposinf", "isneginf", "signbit", "logical_not", "argmax", "argmin", "argsort", "argsort.stable",
    "any", "any.dim", "any.dims", "all", "all.dim", "all.dims", "count_nonzero", "count_nonzero.dim_IntList", "nonzero",
    "is_nonzero",
):  # fmt: skip
    for _op in ops(_name):
        rule(_op)(_of_data(_op))


def _logical(op: Callable[..., Any]) -> Any:
    def logical(a: Any, b: Any) -> Any:
        """plain booleans: the data tell"""
        return op(*(x.data if isinstance(x, Pair) else x for x in (a, b)))

    return logical


for _name in ("logical_and", "logical_or", "logical_xor"):
    for _op in ops(_name):
        rule(_op)(_logical(_op))


@rule(*ops("allclose"))
def allclose(a: Any, b: Any, rtol: float = 1e-05, atol: float = 1e-08, equal_nan: bool = False) -> bool:
    """plain: of the values"""
    return torch.allclose(real(lift(a)), real(lift(b)), rtol, atol, equal_nan)


@rule(*ops("_local_scalar_dense"))
def item(x: Pair) -> Any:
    """plain: the value, a number"""
    return real(x).item()


@rule(*ops("heaviside"))
def heaviside(x: Pair, at_zero: Any) -> Pair:
    """s = 1: values are 0, 1 and what is given for 0."""
    x = lift(x)
    return Pair(torch.heaviside(x.data, real(lift(at_zero)).to(x.data.dtype)), 1.0)
