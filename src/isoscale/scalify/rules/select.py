"""Choosing, placing and masking: parts stand under the larger of their scales; a mask's constant has no say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from isoscale.scalify import scales
from isoscale.scalify.pair import Pair, lift, under
from isoscale.scalify.registry import rule
from isoscale.scalify.rules.support import beside, dtype_of, filler, ops, scale_of, under_wide, wide
from isoscale.scalify.scales import Scale

aten = torch.ops.aten


def _constant(x: Any) -> bool:
    return isinstance(x, (int, float)) or (x.data if isinstance(x, Pair) else x).dim() == 0


@rule(*ops("where.self", "where.ScalarOther", "where.ScalarSelf", "where.Scalar"))
def where(condition: Tensor, a: Any, b: Any) -> Pair:
    """s = max(s_a, s_b); beside a constant as for masked_fill. Assumes operands of like size."""
    if _constant(a) == _constant(b):
        a, b = lift(a), lift(b)
        s = scales.larger(a.scale, b.scale)
        return Pair(torch.where(condition, under(a, s), under(b, s)), s)
    of = lift(b if _constant(a) else a)
    s = beside(of.scale, scale_of(a if _constant(a) else b))
    data = under(of, s)
    parts = (filler(a, s, data), data) if _constant(a) else (data, filler(b, s, data))
    return Pair(torch.where(condition, *parts).to(data.dtype), s)


@rule(*ops("masked_fill.Scalar", "masked_fill.Tensor"))
def masked_fill(x: Any, mask: Tensor, value: Any) -> Pair:
    """s = s_x, or the value's where it is up to 2^10 larger. Assumes that a larger one is a mask; it stays finite."""
    x = lift(x)
    s = beside(x.scale, scale_of(value))
    data = under(x, s)
    return Pair(torch.where(mask, filler(value, s, data), data).to(data.dtype), s)


def _both(x: Any, source: Any) -> tuple[Tensor, Tensor, Scale, torch.dtype]:
    x, source = lift(x), lift(source)
    s = scales.larger(x.scale, source.scale)
    return under(x, s), under(source, s).to(x.data.dtype), s, x.data.dtype


@rule(*ops("masked_scatter"))
def masked_scatter(x: Any, mask: Tensor, source: Any) -> Pair:
    """s = max(s_x, s_source). Assumes operands of like size."""
    data, new, s, _ = _both(x, source)
    return Pair(torch.masked_scatter(data, mask, new), s)


@rule(*ops("masked_scatter_backward"))
def masked_scatter_backward(grad: Pair, mask: Tensor, sizes: Any) -> Pair:
    """s = s_g: elements move."""
    return Pair(aten.masked_scatter_backward.default(grad.data, mask, sizes), grad.scale)


@rule(*ops("scatter.src"))
def scatter(x: Any, dim: int, index: Tensor, source: Any) -> Pair:
    """s = max(s_x, s_source). Assumes operands of like size."""
    data, new, s, _ = _both(x, source)
    return Pair(torch.scatter(data, dim, index, new), s)


def _into(x: Any, value: Any, put: Callable[[Tensor], Tensor]) -> Pair:
    """A constant put into some places of x."""
    x = lift(x)
    s = beside(x.scale, scale_of(value))
    data = under(x, s)
    there = put(torch.zeros_like(data, dtype=torch.bool))
    return Pair(torch.where(there, filler(value, s, data), data).to(data.dtype), s)


@rule(*ops("scatter.value"))
def scatter_value(x: Any, dim: int, index: Tensor, value: float) -> Pair:
    """s = s_x, or the value's where it is up to 2^10 larger. Assumes that a larger one is a mask."""
    return _into(x, value, lambda there: torch.scatter(there, dim, index, True))


@rule(*ops("index_fill.int_Scalar", "index_fill.int_Tensor"))
def index_fill(x: Any, dim: int, index: Tensor, value: Any) -> Pair:
    """s = s_x, or the value's where it is up to 2^10 larger. Assumes that a larger one is a mask."""
    return _into(x, value, lambda there: torch.index_fill(there, dim, index, True))


@rule(*ops("scatter_add"))
def scatter_add(x: Any, dim: int, index: Tensor, source: Any) -> Pair:
    """s = max(s_x, s_source). Assumes that few meet in one place; half data are added in float32."""
    data, new, s, kind = _both(x, source)
    return Pair(torch.scatter_add(wide(data), dim, index, wide(new)).to(kind), s)


@rule(*ops("scatter_reduce.two"))
def scatter_reduce(x: Any, dim: int, index: Tensor, source: Any, reduce: str, include_self: bool = True) -> Pair:
    """s = max(s_x, s_source); 1 for products. Assumes that few meet in one place."""
    data, new, s, kind = _both(x, source)
    if reduce == "prod":
        data, new, s = under_wide(Pair(data, s), 1.0), under_wide(Pair(new, s), 1.0), 1.0
    return Pair(torch.scatter_reduce(wide(data), dim, index, wide(new), reduce, include_self=include_self).to(kind), s)


@rule(*ops("index_add"))
def index_add(x: Any, dim: int, index: Tensor, source: Any, alpha: float = 1) -> Pair:
    """s = max(s_x, s_source |alpha|). Assumes that few meet in one place; half data are added in float32."""
    mantissa, power = scales.split(alpha)
    source = lift(source)
    data, new, s, kind = _both(x, Pair(source.data, scales.mul(source.scale, power)))
    return Pair(torch.index_add(wide(data), dim, index, wide(new), alpha=mantissa).to(kind), s)


@rule(*ops("index_copy"))
def index_copy(x: Any, dim: int, index: Tensor, source: Any) -> Pair:
    """s = max(s_x, s_source). Assumes operands of like size."""
    data, new, s, _ = _both(x, source)
    return Pair(torch.index_copy(data, dim, index, new), s)


@rule(*ops("index_put", "_unsafe_index_put"))
def index_put(x: Any, indices: Any, values: Any, accumulate: bool = False) -> Pair:
    """s = max(s_x, s_values). Assumes that few meet in one place; half data are added in float32."""
    data, new, s, kind = _both(x, values)
    if not accumulate:
        return Pair(aten.index_put.default(data, indices, new), s)
    return Pair(aten.index_put.default(wide(data), indices, wide(new), True).to(kind), s)


@rule(*ops("put"))
def put(x: Any, index: Tensor, source: Any, accumulate: bool = False) -> Pair:
    """s = max(s_x, s_source). Assumes that few meet in one place; half data are added in float32."""
    data, new, s, kind = _both(x, source)
    return Pair(torch.put(wide(data), index, wide(new), accumulate).to(kind), s)


def _placed(op: Any) -> Any:
    def place(x: Any, source: Any, *args: Any, **kwargs: Any) -> Pair:
        """s = max(s_x, s_source). Assumes operands of like size."""
        data, new, s, _ = _both(x, source)
        return Pair(op(data, new, *args, **kwargs), s)

    return place


for _op in ops("slice_scatter", "select_scatter", "diagonal_scatter", "as_strided_scatter"):
    rule(_op)(_placed(_op))


def _joined(op: Any) -> Any:
    def join(tensors: Any, dim: int = 0) -> Pair:
        """s = max of all. Assumes parts of like size; empty ones have no say."""
        pairs = [lift(x) for x in tensors]
        s = scales.larger(*(p.scale for p in pairs if p.data.numel()), scales.ANY)
        return Pair(op([under(p, s) if p.data.numel() else p.data for p in pairs], dim), s)

    return join


for _op in ops("cat", "stack"):
    rule(_op)(_joined(_op))


@rule(*ops("embedding_dense_backward"))
def embedding_backward(
    grad: Pair, indices: Tensor, num_weights: int, padding_idx: int, scale_grad_by_freq: bool
) -> Pair:
    """s = s_g r, r = floor2(sqrt(max(1, N / V))) of N tokens and V rows. Assumes tokens that are spread evenly."""
    n = indices.numel() // num_weights
    r = float(scales.floor_root(n))
    op = aten.embedding_dense_backward.default
    out = op(wide(grad.data), indices, num_weights, padding_idx, scale_grad_by_freq)
    return Pair((out * (1.0 / r)).to(dtype_of(grad)), scales.mul(grad.scale, r))
