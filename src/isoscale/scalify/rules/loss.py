"""Losses and their gradients. A mean's 1 / N goes into the scale: this is why no loss scale is needed.

N is rounded down to a power of two by comparisons, so a symbolic batch size costs one range guard an octave.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from isoscale.scalify import scales
from isoscale.scalify.pair import Pair, lift
from isoscale.scalify.registry import rule
from isoscale.scalify.rules.support import (
    below,
    dtype_of,
    inverse,
    known,
    ops,
    real,
    scale_of,
    smaller,
    stored,
    under_wide,
    wide,
)  # fmt: skip
from isoscale.scalify.scales import Scale

aten = torch.ops.aten
NONE, MEAN, SUM = 0, 1, 2


def _count(n: int, reduction: int) -> float:
    """What a reduced loss is divided by so that its terms, all of one sign, stay of order 1."""
    return float(below(n)) if reduction == SUM else 1.0


def _share(n: int, reduction: int) -> float:
    """The factor of each term's gradient."""
    return 1.0 / below(n) if reduction == MEAN else 1.0


def _nll(op: Any, x: Any, target: Tensor, weight: Any, reduction: int, ignore_index: int) -> tuple[Pair, Pair]:
    x = lift(x)
    w = None if weight is None else lift(weight)
    out, total = op(wide(x.data), target, None if w is None else wide(w.data), reduction, ignore_index)
    s_w: Scale = 1.0 if w is None else w.scale
    n, kind = float(below(target.numel())), x.data.dtype
    count = _count(target.numel(), reduction)
    s = x.scale if reduction == MEAN else scales.mul(x.scale, s_w)
    return (
        Pair((out * (1.0 / count) if count != 1 else out).to(kind), scales.mul(s, count)),
        Pair((total * (1.0 / n)).to(kind), scales.mul(s_w, n)),
    )


@rule(*ops("nll_loss_forward"))
def nll_loss(x: Any, target: Tensor, weight: Any, reduction: int, ignore_index: int) -> tuple[Pair, Pair]:
    """s = s_x of a mean, s_x s_w N of a sum (terms of one sign), s_x s_w of none. Assumes losses of order 1."""
    return _nll(aten.nll_loss_forward.default, x, target, weight, reduction, ignore_index)


@rule(*ops("nll_loss2d_forward"))
def nll_loss2d(x: Any, target: Tensor, weight: Any, reduction: int, ignore_index: int) -> tuple[Pair, Pair]:
    """s = s_x of a mean, s_x s_w N of a sum (terms of one sign), s_x s_w of none. Assumes losses of order 1."""
    return _nll(aten.nll_loss2d_forward.default, x, target, weight, reduction, ignore_index)


def _nll_backward(
    op: Any, grad: Pair, x: Any, target: Tensor, weight: Any, reduction: int, ignore_index: int, total: Any
) -> Pair:
    data = lift(x).data
    w = None if weight is None else lift(weight)
    s_w: Scale = 1.0 if w is None else w.scale
    share = _share(target.numel(), reduction)
    r = float(scales.floor_root(data.shape[1] if data.dim() > 1 else data.shape[0]))
    weights = None if w is None else wide(w.data)
    # of a mean: weights over their total, so that s_w is in both
    norm = wide(real(total)) * inverse(s_w) if reduction == MEAN else wide(lift(total).data)
    out = op(wide(grad.data), wide(data), target, weights, reduction, ignore_index, norm.to(wide(data).dtype))
    s = grad.scale if reduction == MEAN else scales.mul(grad.scale, s_w)
    return Pair((out * (r / share)).to(data.dtype), scales.mul(s, share / r))


@rule(*ops("nll_loss_backward"))
def nll_loss_backward(
    grad_output: Any, x: Any, target: Tensor, weight: Any, reduction: int, ignore_index: int, total_weight: Any
) -> Pair:
    """s = s_g / (N r), r = floor2(sqrt(V)); N only of a mean. Assumes one-hot rows of V classes."""
    op = aten.nll_loss_backward.default
    return _nll_backward(op, lift(grad_output), x, target, weight, reduction, ignore_index, total_weight)


@rule(*ops("nll_loss2d_backward"))
def nll_loss2d_backward(
    grad_output: Any, x: Any, target: Tensor, weight: Any, reduction: int, ignore_index: int, total_weight: Any
) -> Pair:
    """s = s_g / (N r), r = floor2(sqrt(V)); N only of a mean. Assumes one-hot rows of V classes."""
    op = aten.nll_loss2d_backward.default
    return _nll_backward(op, lift(grad_output), x, target, weight, reduction, ignore_index, total_weight)


def _common(a: Any, b: Any) -> tuple[Tensor, Tensor, Scale]:
    a, b = lift(a), lift(b)
    s = scales.larger(a.scale, b.scale)
    return under_wide(a, s), under_wide(b, s), s


@rule(*ops("mse_loss"))
def mse_loss(x: Any, y: Any, reduction: int = MEAN) -> Pair:
    """s = max(s_x, s_y)^2, times N of a sum. Assumes independent x and y."""
    a, b, s = _common(x, y)
    count = _count(a.numel(), reduction)
    out = aten.mse_loss.default(a, b, reduction)
    return Pair((out * (1.0 / count)).to(dtype_of(x, y)), scales.mul(scales.mul(s, s), count))


@rule(*ops("mse_loss_backward"))
def mse_loss_backward(grad: Any, x: Any, y: Any, reduction: int) -> Pair:
    """s = 2 s_g max(s_x, s_y) / N, N only of a mean. Assumes independent x and y."""
    g = lift(grad)
    a, b, s = _common(x, y)
    share = 2.0 * _share(a.numel(), reduction)
    out = aten.mse_loss_backward.default(wide(g.data), a, b, reduction)
    return Pair((out * (1.0 / share)).to(dtype_of(x)), scales.mul(scales.mul(g.scale, s), share))


def _knee(s: Scale, at: float) -> Scale:
    """min(1, s / at): how far inside its quadratic part a loss is."""
    return smaller(scales.mul(known(s), scales.div(1.0, scale_of(at))), 1.0) if at else 1.0


@rule(*ops("smooth_l1_loss"))
def smooth_l1_loss(x: Any, y: Any, reduction: int = MEAN, beta: float = 1.0) -> Pair:
    """s = s_d min(1, s_d / beta), s_d = max(s_x, s_y), times N of a sum. Assumes independent x and y."""
    d = known(scales.larger(scale_of(x), scale_of(y)))
    out = aten.smooth_l1_loss.default(real(x), real(y), reduction, beta)
    s = scales.mul(scales.mul(d, _knee(d, beta)), _count(real(x).numel(), reduction))
    return stored(out, s, dtype_of(x, y))


@rule(*ops("smooth_l1_loss_backward"))
def smooth_l1_loss_backward(grad: Any, x: Any, y: Any, reduction: int, beta: float) -> Pair:
    """s = s_g min(1, s_d / beta) / N, N only of a mean. Assumes independent x and y."""
    g = lift(grad)
    s = scales.mul(_knee(scales.larger(scale_of(x), scale_of(y)), beta), _share(lift(x).data.numel(), reduction))
    out = aten.smooth_l1_loss_backward.default(wide(g.data), real(x), real(y), reduction, beta)
    return Pair(stored(out, s, dtype_of(x)).data, scales.mul(g.scale, s))


@rule(*ops("huber_loss"))
def huber_loss(x: Any, y: Any, reduction: int = MEAN, delta: float = 1.0) -> Pair:
    """s = s_d min(delta, s_d), s_d = max(s_x, s_y), times N of a sum. Assumes independent x and y."""
    d = known(scales.larger(scale_of(x), scale_of(y)))
    out = aten.huber_loss.default(real(x), real(y), reduction, delta)
    s = scales.mul(scales.mul(d, smaller(d, scale_of(delta))), _count(real(x).numel(), reduction))
    return stored(out, s, dtype_of(x, y))


@rule(*ops("huber_loss_backward"))
def huber_loss_backward(grad: Any, x: Any, y: Any, reduction: int, delta: float) -> Pair:
    """s = s_g min(delta, s_d) / N, N only of a mean. Assumes independent x and y."""
    g = lift(grad)
    d = known(scales.larger(scale_of(x), scale_of(y)))
    s = scales.mul(smaller(d, scale_of(delta)), _share(lift(x).data.numel(), reduction))
    out = aten.huber_loss_backward.default(wide(g.data), real(x), real(y), reduction, delta)
    return Pair(stored(out, s, dtype_of(x)).data, scales.mul(g.scale, s))


def _weighted(weight: Any) -> tuple[Any, Scale]:
    if weight is None:
        return None, 1.0
    w = lift(weight)
    return wide(w.data), w.scale


@rule(*ops("binary_cross_entropy"))
def bce(x: Any, y: Any, weight: Any = None, reduction: int = MEAN) -> Pair:
    """s = s_w, times N of a sum. Assumes losses of order 1."""
    w, s_w = _weighted(weight)
    count = _count(lift(x).data.numel(), reduction)
    out = aten.binary_cross_entropy.default(real(x), real(y), w, reduction)
    return Pair((out * (1.0 / count)).to(dtype_of(x)), scales.mul(s_w, count))


@rule(*ops("binary_cross_entropy_backward"))
def bce_backward(grad: Any, x: Any, y: Any, weight: Any = None, reduction: int = MEAN) -> Pair:
    """s = s_g s_w / N, N only of a mean. Assumes probabilities away from 0 and 1."""
    g = lift(grad)
    w, s_w = _weighted(weight)
    share = _share(lift(x).data.numel(), reduction)
    out = aten.binary_cross_entropy_backward.default(wide(g.data), real(x), real(y), w, reduction)
    return Pair((out * (1.0 / share)).to(dtype_of(x)), scales.mul(scales.mul(g.scale, s_w), share))


@rule(*ops("binary_cross_entropy_with_logits"))
def bce_with_logits(x: Any, y: Any, weight: Any = None, pos_weight: Any = None, reduction: int = MEAN) -> Pair:
    """s = max(s_x, 1) s_w, times N of a sum. Assumes losses of order 1 at small logits and of their size at large."""
    w, s_w = _weighted(weight)
    s = scales.larger(scale_of(x), 1.0)
    out = aten.binary_cross_entropy_with_logits.default(
        real(x), real(y), w, None if pos_weight is None else real(pos_weight), reduction
    )
    inner = scales.mul(s, _count(lift(x).data.numel(), reduction))
    return Pair(stored(out, inner, dtype_of(x)).data, scales.mul(inner, s_w))


@rule(*ops("soft_margin_loss"))
def soft_margin_loss(x: Any, y: Any, reduction: int = MEAN) -> Pair:
    """s = max(s_x, 1), times N of a sum. Assumes labels of size 1."""
    s = scales.mul(scales.larger(scale_of(x), 1.0), _count(lift(x).data.numel(), reduction))
    return stored(aten.soft_margin_loss.default(real(x), real(y), reduction), s, dtype_of(x))


@rule(*ops("soft_margin_loss_backward"))
def soft_margin_loss_backward(grad: Any, x: Any, y: Any, reduction: int) -> Pair:
    """s = s_g / N, N only of a mean. Assumes labels of size 1."""
    g = lift(grad)
    share = _share(lift(x).data.numel(), reduction)
    out = aten.soft_margin_loss_backward.default(wide(g.data), real(x), real(y), reduction)
    return Pair((out * (1.0 / share)).to(dtype_of(x)), scales.mul(g.scale, share))
