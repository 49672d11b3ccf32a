"""Attention, SwiGLU and RMSNorm of small models on a CPU as one pass each, for a model that asks for it.

Results agree with the plain ops within rounding, not to the bit, which is why nobody gets them unasked. `covers` says
where they can run: not on another device or dtype, under autocast, torch.func, torch.compile or forward-mode AD, nor
with odd sizes. What is lost: no second derivatives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from isoscale.kernels import cpu_step


def covers(x: Tensor, width: int, head_size: int, hidden: int) -> bool:
    """Whether the kernels can run a model of these sizes whose first activation is `x`.

    Args:
        x: the residual stream.
        width: its size.
        head_size: of attention.
        hidden: of SwiGLU.
    """
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype != torch.float32 or not x.numel():
        return False
    if type(x) is not Tensor or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    if torch.is_autocast_enabled("cpu") or head_size not in cpu_step.HEAD_SIZES:
        return False
    return width % cpu_step.LANES == hidden % cpu_step.LANES == 0


class _Attend(Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, groups: int, scale: float, causal: bool
    ) -> Tensor:
        qkv = qkv.contiguous()
        out, log = cpu_step.attend(qkv, cos, sin, heads, groups, scale, causal)
        ctx.save_for_backward(qkv, log, cos, sin)
        ctx.settings = heads, groups, scale, causal
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return cpu_step.attend_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.settings), *[None] * 6


def attend(
    qkv: Tensor, cos: Tensor, sin: Tensor, *, heads: int, groups: int, scale: float, causal: bool
) -> Tensor:
    """Rotary attention from a fused projection.

    Args:
        qkv: `[batch, length, (heads + 2 groups) size]`.
        cos: as `rope_tables` gives them, `[length, size]`.
        sin: the same.
        heads: query heads.
        groups: key and value heads.
        scale: the full factor on q.k.
        causal: query i sees keys 0..i.

    Returns:
        `[batch, length, heads size]`, without a unit factor.
    """
    half = cos.shape[-1] // 2
    out: Tensor = _Attend.apply(  # type: ignore[no-untyped-call]
        qkv, cos[:, :half].contiguous(), sin[:, :half].contiguous(), heads, groups, scale, causal
    )
    return out


class _Glu(Function):
    @staticmethod
    def forward(ctx: Any, both: Tensor, mult: float) -> Tensor:
        both = both.contiguous()
        ctx.save_for_backward(both)
        ctx.mult = mult
        return cpu_step.glu(both, mult)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return cpu_step.glu_backward(grad.contiguous(), ctx.saved_tensors[0], ctx.mult), None


def glu(both: Tensor, mult: float) -> Tensor:
    """`silu(mult gate) up` of `[gate | up]`, `[..., 2 h]` to `[..., h]`."""
    out: Tensor = _Glu.apply(both, mult)  # type: ignore[no-untyped-call]
    return out


class _NormSplit(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, branch_scale: float, skip_scale: float) -> Any:
        x = x.contiguous()
        normed, reciprocal = cpu_step.rms(x, eps)
        ctx.scales = branch_scale, skip_scale
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(normed, reciprocal)
        return normed, x.view_as(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_skip: Tensor | None) -> Any:
        (normed, reciprocal), (a, b) = ctx.saved_tensors, ctx.scales
        if grad is None:
            return (None if grad_skip is None else grad_skip * b), None, None, None
        skip = None if grad_skip is None else grad_skip.contiguous()
        return cpu_step.rms_backward(grad.contiguous(), normed, reciprocal, a, skip, b), None, None, None


def norm_split(x: Tensor, branch_scale: float, skip_scale: float, eps: float) -> tuple[Tensor, Tensor]:
    """`isoscale.nn.functional.norm_split` without a gain."""
    normed, skip = _NormSplit.apply(x, eps, branch_scale, skip_scale)  # type: ignore[no-untyped-call]
    return normed, skip
