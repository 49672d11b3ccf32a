"""RMSNorm as one operator, so that its rule is met before torch takes it apart.

On a CPU torch composes RMSNorm of pow, mean, rsqrt and mul above every dispatch; squares of fp16 data overflow at 256,
and a mean of squares is no sum of independent terms. `ScaledTensor.__torch_function__` sends `rms_norm` here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from isoscale.scalify.pair import Pair
from isoscale.scalify.registry import rule
from isoscale.scalify.rules import norm


@torch.library.custom_op("isoscale::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor | None, axes: int, eps: float) -> Tensor:
    return torch.nn.functional.rms_norm(x, x.shape[-axes:], weight, eps)


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor | None, axes: int, eps: float) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("isoscale::rms_norm_backward", mutates_args=())
def _backward(grad: Tensor, x: Tensor, weight: Tensor | None, axes: int, eps: float) -> list[Tensor]:
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (x, weight) if t is not None]
        y = torch.nn.functional.rms_norm(leaves[0], x.shape[-axes:], leaves[1] if weight is not None else None, eps)
        return [g.clone() for g in torch.autograd.grad(y, leaves, grad)]


@_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor | None, axes: int, eps: float) -> list[Tensor]:
    return [torch.empty_like(t) for t in (x, weight) if t is not None]


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, ctx.axes, ctx.eps = inputs
    ctx.has_weight = weight is not None
    ctx.save_for_backward(x, *(() if weight is None else (weight,)))


def _gradient(ctx: Any, grad: Tensor) -> Any:
    x, *rest = ctx.saved_tensors
    found = torch.ops.isoscale.rms_norm_backward(grad, x, rest[0] if rest else None, ctx.axes, ctx.eps)
    return found[0], found[1] if ctx.has_weight else None, None, None


_rms_norm.register_autograd(_gradient, setup_context=_keep)


def _shape(x: Any, axes: int) -> list[int]:
    return list((x.data if isinstance(x, Pair) else x).shape[-axes:])


@rule(torch.ops.isoscale.rms_norm.default)
def rms_norm_rule(x: Any, weight: Any, axes: int, eps: float) -> Pair:
    """s = s_w, 1 without: the data are normalised. Assumes rows of which eps is a small part."""
    return norm.rms_norm(x, _shape(x, axes), weight, eps)[0]


@rule(torch.ops.isoscale.rms_norm_backward.default)
def rms_norm_backward_rule(grad: Any, x: Any, weight: Any, axes: int, eps: float) -> list[Any]:
    """s = s_g s_w / s_x; of the weight s_g r, r = floor2(sqrt(rows)). Assumes a gradient independent of x."""
    shape = _shape(x, axes)
    _, rstd = norm.rms_norm(x, shape, None, eps)
    found = norm.rms_norm_backward(grad, x, shape, rstd, weight, [True, weight is not None])
    return [pair for pair in found if pair is not None]


def rms_norm(x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """As `torch.nn.functional.rms_norm`, for scaled tensors."""
    small = torch.finfo(torch.float32 if x.dtype.itemsize < 4 else x.dtype).eps if eps is None else eps
    result: Tensor = torch.ops.isoscale.rms_norm(x, weight, len(shape), small)
    return result
