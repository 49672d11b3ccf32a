"""Reductions: N summed terms give the scale floor2(sqrt(N)), divided out before half data are rounded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from isoscale.scalify import scales
from isoscale.scalify.pair import Pair, lift
from isoscale.scalify.registry import rule
from isoscale.scalify.rules.support import dtype_of, ops, power, real, size, stored, under_wide, wide


def summed(data: Tensor, dim: Any, keepdim: bool, r: float, nan: bool = False) -> Tensor:
    """The sum of wide data over r."""
    add = torch.nansum if nan else torch.sum
    out = add(wide(data)) if dim is None or dim == [] else add(wide(data), dim, keepdim)
    return out * (1.0 / r) if r != 1 else out


@rule(*ops("sum.dim_IntList"))
def sum_dim(x: Pair, dim: Any, keepdim: bool = False, dtype: torch.dtype | None = None) -> Pair:
    """s = s_x r, r = floor2(sqrt(N)). Assumes N independent terms of zero mean."""
    dim = list(range(x.data.dim())) if dim is None or dim == [] else dim
    r = float(scales.floor_root(size(x.data, dim)))
    return Pair(summed(x.data, dim, keepdim, r).to(dtype or x.data.dtype), scales.mul(x.scale, r))


@rule(*ops("sum"))
def sum_all(x: Pair, dtype: torch.dtype | None = None) -> Pair:
    """s = s_x r, r = floor2(sqrt(N)). Assumes N independent terms of zero mean."""
    return sum_dim(x, None, False, dtype)


@rule(*ops("nansum"))
def nansum(x: Pair, dim: Any = None, keepdim: bool = False, dtype: torch.dtype | None = None) -> Pair:
    """s = s_x r, r = floor2(sqrt(N)). Assumes N independent terms of zero mean, few of them NaN."""
    r = float(scales.floor_root(size(x.data, dim)))
    return Pair(summed(x.data, dim, keepdim, r, nan=True).to(dtype or x.data.dtype), scales.mul(x.scale, r))


@rule(*ops("mean.dim"))
def mean_dim(x: Pair, dim: Any, keepdim: bool = False, dtype: torch.dtype | None = None) -> Pair:
    """s = s_x / r, r = floor2(sqrt(N)). Assumes N independent terms of zero mean."""
    dim = list(range(x.data.dim())) if dim is None or dim == [] else dim
    r = float(scales.floor_root(size(x.data, dim)))
    out = torch.mean(wide(x.data), dim, keepdim)
    return Pair((out * r if r != 1 else out).to(dtype or x.data.dtype), scales.mul(x.scale, 1.0 / r))


@rule(*ops("mean"))
def mean_all(x: Pair, dtype: torch.dtype | None = None) -> Pair:
    """s = s_x / r, r = floor2(sqrt(N)). Assumes N independent terms of zero mean."""
    return mean_dim(x, None, False, dtype)


@rule(*ops("prod.dim_int"))
def prod_dim(x: Pair, dim: int, keepdim: bool = False, dtype: torch.dtype | None = None) -> Pair:
    """s = s_x^N, within float32's range. Assumes N independent factors."""
    rest, s = power(x.scale, size(x.data, dim))
    return Pair((torch.prod(wide(x.data), dim, keepdim) * rest).to(dtype or x.data.dtype), s)


@rule(*ops("prod"))
def prod_all(x: Pair, dtype: torch.dtype | None = None) -> Pair:
    """s = s_x^N, within float32's range. Assumes N independent factors."""
    rest, s = power(x.scale, x.data.numel())
    return Pair((torch.prod(wide(x.data)) * rest).to(dtype or x.data.dtype), s)


def _keeps(op: Any) -> Any:
    def extreme(x: Pair, *args: Any, **kwargs: Any) -> Any:
        """s = s_x; indices are plain. Assumes that an extreme is of the size of its inputs."""
        out = op(x.data, *args, **kwargs)
        if isinstance(out, Tensor):
            return Pair(out, x.scale)
        return tuple(Pair(part, x.scale) if part.is_floating_point() else part for part in out)

    return extreme


for _op in ops(
    "amax", "amin", "max", "min", "max.dim", "min.dim", "aminmax", "median", "median.dim", "nanmedian",
    "nanmedian.dim", "kthvalue", "mode", "cummax", "cummin", "sort", "sort.stable", "topk",
):  # fmt: skip
    rule(_op)(_keeps(_op))


def _spread(op: Any, power_of_scale: int, with_mean: bool) -> Any:
    def spread(x: Pair, dim: Any = None, correction: Any = None, keepdim: bool = False) -> Any:
        """s = s_x^2 of a variance, s_x of a deviation, s_x / floor2(sqrt(N)) of a mean. Assumes independent terms."""
        dims = list(range(x.data.dim())) if dim is None or dim == [] else dim
        out = op(wide(x.data), dims, correction=correction, keepdim=keepdim)
        kind = x.data.dtype
        rest, s = power(x.scale, power_of_scale)
        if not with_mean:
            return Pair((out * rest).to(kind), s)
        r = float(scales.floor_root(size(x.data, dims)))
        return Pair((out[0] * rest).to(kind), s), Pair((out[1] * r).to(kind), scales.mul(x.scale, 1.0 / r))

    return spread


for _name, _power in (("var", 2), ("std", 1), ("var_mean", 2), ("std_mean", 1)):
    for _op in ops(f"{_name}.correction"):
        rule(_op)(_spread(getattr(torch, _name), _power, _name.endswith("mean")))


@rule(*ops("linalg_vector_norm"))
def vector_norm(
    x: Pair, ord: float = 2, dim: Any = None, keepdim: bool = False, dtype: torch.dtype | None = None
) -> Pair:
    """s = s_x r for order 2, s_x r^2 for 1, else s_x; r = floor2(sqrt(N)). Assumes N elements of like size."""
    r = float(scales.floor_root(size(x.data, dim)))
    factor = r if ord == 2 else r * r if ord in (0, 1) else 1.0
    out = torch.linalg.vector_norm(wide(x.data), ord, dim, keepdim)
    s = scales.mul(x.scale, factor) if ord != 0 else factor
    return Pair((out * (1.0 / factor)).to(dtype or x.data.dtype), s)


@rule(*ops("norm.Scalar", "norm.ScalarOpt_dim", "norm.ScalarOpt_dtype", "norm.ScalarOpt_dim_dtype"))
def norm(x: Pair, p: Any = 2, dim: Any = None, keepdim: bool = False, dtype: torch.dtype | None = None) -> Pair:
    """s = s_x r for order 2, s_x r^2 for 1, else s_x. Assumes N elements of like size."""
    return vector_norm(x, 2 if p is None else p, dim, keepdim, dtype)


@rule(*ops("dist"))
def dist(a: Any, b: Any, p: float = 2) -> Pair:
    """s = max(s_a, s_b) r for order 2. Assumes N independent differences."""
    a, b = lift(a), lift(b)
    s = scales.larger(a.scale, b.scale)
    out = vector_norm(Pair(under_wide(a, s) - under_wide(b, s), s), p)
    return Pair(out.data.to(dtype_of(a, b)), out.scale)


@rule(*ops("trace"))
def trace(x: Pair) -> Pair:
    """s = s_x r, r = floor2(sqrt(N)). Assumes N independent terms of zero mean."""
    return sum_all(Pair(torch.diagonal(x.data), x.scale))


@rule(*ops("cumsum"))
def cumsum(x: Pair, dim: int, dtype: torch.dtype | None = None) -> Pair:
    """s = s_x r, r = floor2(sqrt(N)) of the last sum. Assumes N independent terms of zero mean."""
    r = float(scales.floor_root(size(x.data, dim)))
    return Pair((torch.cumsum(wide(x.data), dim) * (1.0 / r)).to(dtype or x.data.dtype), scales.mul(x.scale, r))


@rule(*ops("cumprod"))
def cumprod(x: Pair, dim: int, dtype: torch.dtype | None = None) -> Pair:
    """s = 1: every element of the result would have a scale of its own. Assumes factors near 1."""
    return Pair(torch.cumprod(real(x), dim).to(dtype or x.data.dtype), 1.0)


@rule(*ops("logsumexp"))
def logsumexp(x: Pair, dim: Any, keepdim: bool = False) -> Pair:
    """s = max(s_x, 1): near the largest element, log N where all are near 0."""
    return stored(torch.logsumexp(real(x), dim, keepdim), scales.larger(x.scale, 1.0), x.data.dtype)


@rule(*ops("logcumsumexp"))
def logcumsumexp(x: Pair, dim: int) -> Pair:
    """s = max(s_x, 1): near the largest element so far, log N where all are near 0."""
    return stored(torch.logcumsumexp(real(x), dim), scales.larger(x.scale, 1.0), x.data.dtype)


@rule(*ops("_cdist_forward"))
def cdist(a: Any, b: Any, p: float, compute_mode: int | None = None) -> Pair:
    """s = max(s_a, s_b) r for order 2, r = floor2(sqrt(k)) of k coordinates. Assumes independent differences."""
    a, b = lift(a), lift(b)
    s = scales.larger(a.scale, b.scale)
    r = float(scales.floor_root(a.data.shape[-1])) if p == 2 else 1.0
    out = torch.ops.aten._cdist_forward.default(under_wide(a, s), under_wide(b, s), p, compute_mode)
    return Pair((out * (1.0 / r)).to(dtype_of(a, b)), scales.mul(s, r))


@rule(*ops("_cdist_backward"))
def cdist_backward(grad: Any, a: Any, b: Any, p: float, dist: Any) -> Pair:
    """s = s_g r, r = floor2(sqrt(N)), N the rows of b. Assumes order 1 or more, and N independent directions."""
    g, a, b, dist = lift(grad), lift(a), lift(b), lift(dist)
    s = scales.larger(a.scale, b.scale)
    # for order p the gradient is of degree 0 in (a, b, dist) together
    out = torch.ops.aten._cdist_backward.default(
        wide(g.data), under_wide(a, s), under_wide(b, s), p, under_wide(dist, s)
    )
    r = float(scales.floor_root(b.data.shape[-2]))
    return Pair((out * (1.0 / r)).to(dtype_of(a)), scales.mul(g.scale, r))
