"""Normalisation sees the data only: the output stands under 1, and eps becomes eps / s^2 exactly.

Scalify (arXiv 2407.17353, appendix C) leaves eps relative to the data; here the function stays the same. What is saved
for the backward keeps the inputs' units: the mean under s_x, the inverse deviation under 1 / s_x.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from isoscale.scalify import scales
from isoscale.scalify.pair import Pair, lift, times
from isoscale.scalify.registry import rule
from isoscale.scalify.rules.support import inverse, known, ops, under_wide, wide
from isoscale.scalify.scales import Scale

aten = torch.ops.aten


def eps_under(eps: float, s: Scale, like: Tensor) -> Any:
    """eps / s^2, without s^2 leaving float32's range."""
    if not isinstance(s, Tensor):
        return eps / (s or 1.0) / (s or 1.0)
    s = known(s).to(torch.float64 if like.dtype == torch.float64 else torch.float32)  # type: ignore[union-attr]
    return eps / s / s


def _affine(unit: Tensor, weight: Any, bias: Any, dtype: torch.dtype) -> Pair:
    """unit * weight + bias: the larger of their scales, 1 without either; both broadcast already."""
    w, b = (None if p is None else lift(p) for p in (weight, bias))
    share: Scale = 1.0 if w is None else w.scale
    out = unit if w is None else unit * wide(w.data)
    if b is None:
        return Pair(out.to(dtype), share)
    s = scales.larger(share, b.scale)
    return Pair((under_wide(Pair(out, share), s) + under_wide(b, s)).to(dtype), s)


def _shaped(p: Any, shape: list[int]) -> Any:
    if p is None:
        return None
    p = lift(p)
    return Pair(p.data.reshape(shape), p.scale)


def _unit(x: Pair, dims: list[int], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    data = wide(x.data)
    mean = torch.mean(data, dims, keepdim=True)
    centred = data - mean
    rstd = torch.rsqrt(torch.mean(centred * centred, dims, keepdim=True) + eps_under(eps, x.scale, data))
    return centred * rstd, mean, rstd


def _gradient(
    g: Tensor, unit: Tensor, rstd: Tensor, dims: list[int], s: Scale, s_x: Scale, dtype: torch.dtype
) -> Pair:
    """Of the input, g being the gradient of the unit output under s: rstd (g - mean g - unit mean(g unit))."""
    inner = g - torch.mean(g, dims, keepdim=True) - unit * torch.mean(g * unit, dims, keepdim=True)
    return Pair((rstd * inner).to(dtype), scales.mul(s, inverse(s_x)))


def _summed(g: Tensor, dims: list[int], s: Scale, shape: Any, dtype: torch.dtype) -> Pair:
    """A parameter's gradient: a sum over n places."""
    n: Any = 1
    for d in dims:
        n = n * g.shape[d]
    r = float(scales.floor_root(n))
    out = torch.sum(g, dims) if dims else g
    return Pair((out * (1.0 / r)).reshape(shape).to(dtype), scales.mul(s, r))


def _saved(x: Any, mean: Any, rstd: Any) -> tuple[Tensor, Tensor]:
    """Mean and inverse deviation as data beside x's, whatever they were saved under."""
    mean, rstd = lift(mean), lift(rstd)
    return under_wide(mean, known(x.scale)), under_wide(rstd, inverse(x.scale))


@rule(*ops("native_layer_norm"))
def layer_norm(x: Any, shape: list[int], weight: Any, bias: Any, eps: float) -> tuple[Pair, Pair, Pair]:
    """s = max(s_w, s_b), 1 without them: the data are normalised. Assumes rows of which eps is a small part."""
    x = lift(x)
    dims = list(range(x.data.dim() - len(shape), x.data.dim()))
    unit, mean, rstd = _unit(x, dims, eps)
    return _affine(unit, weight, bias, x.data.dtype), Pair(mean, known(x.scale)), Pair(rstd, inverse(x.scale))


@rule(*ops("native_layer_norm_backward"))
def layer_norm_backward(
    grad: Any, x: Any, shape: list[int], mean: Any, rstd: Any, weight: Any, bias: Any, output_mask: list[bool]
) -> tuple[Any, Any, Any]:
    """s = s_g s_w / s_x; of weight and bias s_g r, r = floor2(sqrt(rows)). Assumes a gradient independent of x."""
    g, x = lift(grad), lift(x)
    dims = list(range(x.data.dim() - len(shape), x.data.dim()))
    rows = list(range(x.data.dim() - len(shape)))
    mean_data, rstd_data = _saved(x, mean, rstd)
    unit = (wide(x.data) - mean_data) * rstd_data
    w = lift(1.0 if weight is None else weight)
    out: list[Any] = [None, None, None]
    gd, kind = wide(g.data), g.data.dtype
    if output_mask[0]:
        gw = gd * wide(w.data)
        out[0] = _gradient(gw, unit, rstd_data, dims, scales.mul(g.scale, w.scale), x.scale, kind)
    if output_mask[1]:
        out[1] = _summed(gd * unit, rows, g.scale, shape, kind)
    if output_mask[2]:
        out[2] = _summed(gd, rows, g.scale, shape, kind)
    return out[0], out[1], out[2]


@rule(*ops("_fused_rms_norm"))
def rms_norm(x: Any, shape: list[int], weight: Any, eps: float | None) -> tuple[Pair, Pair]:
    """s = s_w, 1 without: the data are normalised. Assumes rows of which eps is a small part."""
    x = lift(x)
    dims = list(range(x.data.dim() - len(shape), x.data.dim()))
    data = wide(x.data)
    eps = torch.finfo(x.data.dtype).eps if eps is None else eps
    rstd = torch.rsqrt(torch.mean(data * data, dims, keepdim=True) + eps_under(eps, x.scale, data))
    return _affine(data * rstd, weight, None, x.data.dtype), Pair(rstd, inverse(x.scale))


@rule(*ops("_fused_rms_norm_backward"))
def rms_norm_backward(
    grad: Any, x: Any, shape: list[int], rstd: Any, weight: Any, output_mask: list[bool]
) -> tuple[Any, Any]:
    """s = s_g s_w / s_x; of the weight s_g r, r = floor2(sqrt(rows)). Assumes a gradient independent of x."""
    g, x = lift(grad), lift(x)
    dims = list(range(x.data.dim() - len(shape), x.data.dim()))
    rstd_data = under_wide(lift(rstd), inverse(x.scale))
    unit = wide(x.data) * rstd_data
    w = lift(1.0 if weight is None else weight)
    gd, kind = wide(g.data), g.data.dtype
    gw = gd * wide(w.data)
    inner = rstd_data * (gw - unit * torch.mean(gw * unit, dims, keepdim=True))
    s = scales.mul(scales.mul(g.scale, w.scale), inverse(x.scale))
    rows = list(range(x.data.dim() - len(shape)))
    return (
        Pair(inner.to(kind), s) if output_mask[0] else None,
        _summed(gd * unit, rows, g.scale, shape, kind) if output_mask[1] and weight is not None else None,
    )


@rule(*ops("native_group_norm"))
def group_norm(
    x: Any, weight: Any, bias: Any, n: int, channels: int, inner: int, group: int, eps: float
) -> tuple[Pair, Pair, Pair]:
    """s = max(s_w, s_b), 1 without them: the data are normalised. Assumes groups of which eps is a small part."""
    x = lift(x)
    grouped = Pair(x.data.reshape(n, group, -1), x.scale)
    unit, mean, rstd = _unit(grouped, [2], eps)
    shape = [1, channels, *[1] * (x.data.dim() - 2)]
    out = _affine(unit.reshape(x.data.shape), _shaped(weight, shape), _shaped(bias, shape), x.data.dtype)
    return out, Pair(mean.reshape(n, group), known(x.scale)), Pair(rstd.reshape(n, group), inverse(x.scale))


@rule(*ops("native_group_norm_backward"))
def group_norm_backward(
    grad: Any, x: Any, mean: Any, rstd: Any, weight: Any, n: int, channels: int, inner: int, group: int,
    output_mask: list[bool],
) -> tuple[Any, Any, Any]:  # fmt: skip
    """s = s_g s_w / s_x; of weight and bias s_g r, r = floor2(sqrt(places)). Assumes a gradient independent of x."""
    g, x = lift(grad), lift(x)
    mean_data, rstd_data = (part.reshape(n, group, 1) for part in _saved(x, mean, rstd))
    unit = (wide(x.data).reshape(n, group, -1) - mean_data) * rstd_data
    w = lift(1.0 if weight is None else weight)
    w_data = wide(w.data) if weight is None else wide(w.data).reshape(1, channels, 1)
    gd, kind = wide(g.data).reshape(n, channels, -1), g.data.dtype
    out: list[Any] = [None, None, None]
    if output_mask[0]:
        gw = (gd * w_data).reshape(n, group, -1)
        found = _gradient(gw, unit, rstd_data, [2], scales.mul(g.scale, w.scale), x.scale, kind)
        out[0] = Pair(found.data.reshape(x.data.shape), found.scale)
    if output_mask[1]:
        out[1] = _summed(gd * unit.reshape(gd.shape), [0, 2], g.scale, (channels,), kind)
    if output_mask[2]:
        out[2] = _summed(gd, [0, 2], g.scale, (channels,), kind)
    return out[0], out[1], out[2]


def keep(target: Any, new: Pair) -> None:
    """Write a running statistic where it lives: data and scale, or the value of a plain tensor."""
    if not isinstance(target, Pair):
        target.copy_(wide(new.data) * known(new.scale))
    elif isinstance(target.scale, Tensor):
        target.data.copy_(new.data)
        target.scale.copy_(scales.as_tensor(new.scale, new.data))
    else:
        target.data.copy_(under_wide(new, known(target.scale)))


def _moved(old: Any, new: Pair, momentum: float) -> Pair:
    """old + momentum (new - old) under the larger scale."""
    old = lift(old)
    s = scales.larger(old.scale, new.scale)
    return Pair(torch.lerp(under_wide(old, s), under_wide(new, s), momentum).to(old.data.dtype), s)


def _running(x: Pair, mean: Any, var: Any, eps: float) -> tuple[Tensor, Tensor]:
    """Running mean and inverse deviation as data beside x's."""
    s = known(x.scale)
    spread = times(under_wide(lift(var), s), inverse(s))  # in two steps: s^2 may leave float32's range
    return under_wide(lift(mean), s), torch.rsqrt(spread + eps_under(eps, s, wide(x.data)))


def _batch(
    x: Any, weight: Any, bias: Any, mean: Any, var: Any, training: bool, momentum: float, eps: float
) -> tuple[Pair, Pair, Pair, Pair | None, Pair | None]:
    """The output, what is saved, and the new running statistics (None without)."""
    x = lift(x)
    dims = [0, *range(2, x.data.dim())]
    shape = [1, -1, *[1] * (x.data.dim() - 2)]
    new_mean = new_var = None
    if training:
        unit, m, rstd = _unit(x, dims, eps)
        saved = Pair(m.reshape(-1), known(x.scale)), Pair(rstd.reshape(-1), inverse(x.scale))
        if mean is not None:
            n = x.data.numel() / x.data.shape[1]
            spread = torch.var(wide(x.data), dims, correction=0) * (n / (n - 1))
            new_mean = _moved(mean, saved[0], momentum)
            new_var = _moved(var, Pair(spread, scales.mul(x.scale, x.scale)), momentum)
    else:
        m, rstd = _running(x, mean, var, eps)
        unit = (wide(x.data) - m.reshape(shape)) * rstd.reshape(shape)
        empty = wide(x.data).new_zeros(0)
        saved = Pair(empty, 1.0), Pair(empty, 1.0)
    out = _affine(unit, _shaped(weight, shape), _shaped(bias, shape), x.data.dtype)
    return out, saved[0], saved[1], new_mean, new_var


@rule(*ops("native_batch_norm"))
def batch_norm(
    x: Any, weight: Any, bias: Any, mean: Any, var: Any, training: bool, momentum: float, eps: float
) -> tuple[Pair, Pair, Pair]:
    """s = max(s_w, s_b), 1 without them: the data are normalised. Assumes channels of which eps is a small part.

    Like the operator, it moves the running statistics, though its schema does not say so: under the larger scale.
    """
    out, m, rstd, new_mean, new_var = _batch(x, weight, bias, mean, var, training, momentum, eps)
    if new_mean is not None and new_var is not None:
        keep(mean, new_mean)
        keep(var, new_var)
    return out, m, rstd


for _op in ops("_native_batch_norm_legit"):
    rule(_op)(batch_norm)


@rule(*ops("_native_batch_norm_legit.no_stats"))
def batch_norm_no_stats(
    x: Any, weight: Any, bias: Any, training: bool, momentum: float, eps: float
) -> tuple[Pair, Pair, Pair]:
    """s = max(s_w, s_b), 1 without them: the data are normalised. Assumes channels of which eps is a small part."""
    return _batch(x, weight, bias, None, None, True, momentum, eps)[:3]


@rule(*ops("_native_batch_norm_legit_functional"))
def batch_norm_functional(
    x: Any, weight: Any, bias: Any, mean: Any, var: Any, training: bool, momentum: float, eps: float
) -> tuple[Any, ...]:
    """s = max(s_w, s_b), 1 without them: the data are normalised; running statistics under the larger scale."""
    out, m, rstd, new_mean, new_var = _batch(x, weight, bias, mean, var, training, momentum, eps)
    return out, m, rstd, new_mean or lift(mean), new_var or lift(var)


@rule(*ops("native_batch_norm_backward"))
def batch_norm_backward(
    grad: Any, x: Any, weight: Any, mean: Any, var: Any, save_mean: Any, save_rstd: Any, train: bool, eps: float,
    output_mask: list[bool],
) -> tuple[Any, Any, Any]:  # fmt: skip
    """s = s_g s_w / s_x; of weight and bias s_g r, r = floor2(sqrt(places)). Assumes a gradient independent of x."""
    g, x = lift(grad), lift(x)
    dims = [0, *range(2, x.data.dim())]
    shape = [1, -1, *[1] * (x.data.dim() - 2)]
    if train:
        m, rstd = _saved(x, save_mean, save_rstd)
    else:
        m, rstd = _running(x, mean, var, eps)
    unit = (wide(x.data) - m.reshape(shape)) * rstd.reshape(shape)
    w = lift(1.0 if weight is None else _shaped(weight, shape))
    gd, kind = wide(g.data), g.data.dtype
    s = scales.mul(g.scale, w.scale)
    out: list[Any] = [None, None, None]
    if output_mask[0]:
        gw = gd * wide(w.data)
        if train:
            out[0] = _gradient(gw, unit, rstd.reshape(shape), dims, s, x.scale, kind)
        else:
            out[0] = Pair((gw * rstd.reshape(shape)).to(kind), scales.mul(s, inverse(x.scale)))
    if output_mask[1]:
        out[1] = _summed(gd * unit, dims, g.scale, (-1,), kind)
    if output_mask[2]:
        out[2] = _summed(gd, dims, g.scale, (-1,), kind)
    return out[0], out[1], out[2]


@rule(*ops("cudnn_batch_norm"))
def cudnn_batch_norm(
    x: Any, weight: Any, bias: Any, mean: Any, var: Any, training: bool, momentum: float, eps: float
) -> tuple[Any, ...]:
    """s = max(s_w, s_b): the data are normalised. Assumes channels of which eps is a small part.

    It moves the running statistics, as `batch_norm` does; nothing is reserved for the backward.
    """
    out = batch_norm(x, weight, bias, mean, var, training, momentum, eps)
    return *out, torch.empty(0, dtype=torch.uint8, device=lift(x).data.device)


@rule(*ops("cudnn_batch_norm_backward"))
def cudnn_batch_norm_backward(
    x: Any, grad: Any, weight: Any, mean: Any, var: Any, save_mean: Any, save_rstd: Any, eps: float, reserve: Any
) -> tuple[Any, Any, Any]:
    """s = s_g s_w / s_x; of weight and bias s_g r, r = floor2(sqrt(places)). Assumes a gradient independent of x."""
    mask = [True, True, True]
    return batch_norm_backward(grad, x, weight, mean, var, save_mean, save_rstd, True, eps, mask)
