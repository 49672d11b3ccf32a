"""RMSNorm and LayerNorm, and the norm that opens a residual branch.

Both norms put their output at unit scale by themselves, so only the gradient of a trainable gain has a factor. Low
precision inputs are normalised in float32. On a CPU torch's `rms_norm` is a chain of seven elementwise ops whose
backward is longer still; the closed form here does the same in three passes each way. On CUDA its fused kernel runs.

`norm_split` is `residual_split` and `rms_norm` in one: a block reads its input twice (norm and skip), and autograd
would add the two scaled gradients in three passes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as torch_f
from torch import Tensor
from torch.autograd import Function

from isoscale._base.errors import ConfigError
from isoscale.nn.factors import token_scale
from isoscale.nn.scale import add, call, may_overwrite, scale_bwd, times


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _normalise(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`x / rms(x)` over the last dimension and the reciprocal rms `[..., 1]`, both at least float32."""
    x = _wide(x)
    if torch.compiler.is_compiling():
        square = x.square().mean(-1, keepdim=True)
    else:
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1]
    reciprocal = torch.rsqrt(square + eps)
    return x * reciprocal, reciprocal


def _normalise_backward(grad: Tensor, normed: Tensor, reciprocal: Tensor, scale: float) -> Tensor:
    """`scale * dL/dx` for `normed = x * reciprocal`: `reciprocal * (grad - normed * mean(grad * normed))`."""
    mean = (grad * normed).sum(-1, keepdim=True) * (-1 / normed.shape[-1])
    out = torch.addcmul(grad, normed, mean)
    row = times(reciprocal, scale)
    return out.mul_(row) if may_overwrite() else out * row


class _NormSplit(Function):
    """x -> (x / rms(x), x); dx = skip_scale * dskip + branch_scale * d(norm)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, eps: float, branch_scale: float, skip_scale: float) -> tuple[Tensor, Tensor, Tensor]:
        normed, reciprocal = _normalise(x, eps)
        return normed.to(x.dtype), x.view_as(x), reciprocal

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, ctx.eps, ctx.branch_scale, ctx.skip_scale = inputs
        normed, _, reciprocal = output
        ctx.mark_non_differentiable(reciprocal)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(normed, reciprocal)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_skip: Tensor | None, _: Any) -> Any:
        normed, reciprocal = ctx.saved_tensors
        if grad is None:
            return (None if grad_skip is None else times(grad_skip, ctx.skip_scale)), None, None, None
        dx = _normalise_backward(_wide(grad), _wide(normed), reciprocal, ctx.branch_scale)
        if grad_skip is not None:
            dx = add(dx, grad_skip, ctx.skip_scale, fresh=True)
        return dx.to(normed.dtype), None, None, None


class _NormSplitJvp(_NormSplit):
    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _NormSplit.setup_context(ctx, inputs, output)
        ctx.save_for_forward(output[0], output[2])

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> tuple[Tensor, Tensor, None]:
        normed, reciprocal = ctx.saved_tensors
        moved = _normalise_backward(_wide(tangent), _wide(normed), reciprocal, 1.0)  # the Jacobian is symmetric
        return moved.to(normed.dtype), tangent.view_as(tangent), None


def norm_split(
    x: Tensor,
    *,
    branch_scale: float = 1.0,
    skip_scale: float = 1.0,
    weight: Tensor | None = None,
    eps: float = 1e-5,
    tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Open a residual branch with an RMSNorm: `(rms_norm(x), x)`.

    Backward the branch's gradient is multiplied by `branch_scale` and the skip's by `skip_scale`, which is
    `residual_split` of u-muP followed by `rms_norm`, in one pass.

    Args:
        x: `[..., width]`.
        branch_scale: `tau / sqrt(1 + tau^2)`.
        skip_scale: `1 / sqrt(1 + tau^2)`.
        weight: gain `[width]` or None.
        eps: added to the mean square.
        tokens: global row count for the gain's gradient; None counts the local rows.

    Returns:
        The normed tensor and the skip, both of the shape and dtype of `x`.
    """
    normed, skip, _ = call(_NormSplit, _NormSplitJvp, x, eps, branch_scale, skip_scale)
    return _gain(normed, weight, tokens), skip


def _gain(normed: Tensor, weight: Tensor | None, tokens: int | None) -> Tensor:
    if weight is None:
        return normed
    return normed * scale_bwd(weight, token_scale(tokens, normed.numel() // weight.numel())).to(normed.dtype)


def _shape(shape: int | tuple[int, ...], x: Tensor) -> tuple[int, ...]:
    wanted = (shape,) if isinstance(shape, int) else tuple(shape)
    if tuple(x.shape[len(x.shape) - len(wanted) :]) != wanted:
        raise ConfigError(
            "the trailing dimensions of the input are not the normalised shape",
            key="normalized_shape",
            value=wanted,
            hint=f"the input has shape {tuple(x.shape)}",
        )
    return wanted


def rms_norm(
    x: Tensor,
    normalized_shape: int | tuple[int, ...],
    weight: Tensor | None = None,
    eps: float = 1e-5,
    *,
    tokens: int | None = None,
) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight`, the mean over `normalized_shape`, at least in float32.

    Args:
        x: `[..., *normalized_shape]`.
        normalized_shape: trailing dimensions to normalise over.
        weight: gain of `normalized_shape`, or None. Its gradient gets `T^-1/2`.
        eps: added to the mean square.
        tokens: global row count T; None counts the local rows.

    Raises:
        ConfigError: the trailing dimensions of `x` differ from `normalized_shape`.
    """
    shape = _shape(normalized_shape, x)
    if len(shape) > 1:
        normed = torch_f.rms_norm(_wide(x), list(shape), eps=eps).to(x.dtype)
        return _gain(normed, weight, tokens)
    if x.is_cuda and not torch.compiler.is_compiling():
        return _gain(torch_f.rms_norm(x, list(shape), eps=eps), weight, tokens)
    return norm_split(x, weight=weight, eps=eps, tokens=tokens)[0]


def layer_norm(
    x: Tensor,
    normalized_shape: int | tuple[int, ...],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    tokens: int | None = None,
) -> Tensor:
    """`torch.nn.functional.layer_norm`; the gradients of gain and bias get `T^-1/2`. Arguments as `rms_norm`."""
    shape = _shape(normalized_shape, x)
    size = 1
    for dim in shape:
        size *= dim
    factor = token_scale(tokens, x.numel() // size)
    gain = None if weight is None else scale_bwd(weight, factor)
    shift = None if bias is None else scale_bwd(bias, factor)
    return torch_f.layer_norm(x, list(shape), gain, shift, eps)
