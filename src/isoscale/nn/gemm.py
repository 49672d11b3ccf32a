"""One autograd Function per linear: every scale rides in the GEMM.

A unit-scaled linear has up to six factors: those of its output, its input gradient and its weight gradient, a factor
that the op before it left pending, and the two of the residual add behind it. Eager kernels apply them for nothing as
the `alpha` and `beta` of `addmm`. Under torch.compile they do so too, with an operand of the right shape in the place
of the ignored addend (beta = 0); only the residual add is `mm` and a pointwise op there, since that one fuses with the
norm behind it, while an addend inside the GEMM would be copied first.
What is lost: with bf16 operands and a float32 residual stream the add runs as its own pass, as it does in plain torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from isoscale.nn.factors import token_scale
from isoscale.nn.scale import autocast_operands, call, is_known, is_one, may_overwrite, times


def scaled_mm(left: Tensor, right: Tensor, alpha: float, like: Tensor | None = None) -> Tensor:
    """`alpha * left @ right` for `left [n, k]`, `right [k, m]`; `like` is any tensor that broadcasts to `[n, m]`."""
    if is_one(alpha):
        return left @ right
    if torch.compiler.is_compiling():
        if like is None or not is_known(alpha):  # the kernel would take a symbolic alpha for a constant
            return (left @ right) * alpha
        return torch.addmm(like, left, right, beta=0, alpha=alpha)
    return torch.addmm(left.new_zeros(()), left, right, beta=0, alpha=alpha)


class _Linear(Function):
    """out = alpha * x @ w.T + bias_scale * bias + beta * skip; dx = dx_scale * g @ w; dw = T^-1/2 * pending * g.T @ x.

    Products of factors are made outside: Dynamo refuses arithmetic on symbolic floats inside a Function.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        skip: Tensor | None,
        alpha: float,
        bias_scale: float,
        beta: float,
        dx_scale: float,
        pending: float,
        tokens: int | None,
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        shape = (*x.shape[:-1], weight.shape[0])
        eager = not torch.compiler.is_compiling()
        if eager and skip is not None and bias is None and skip.dtype == x.dtype:
            return torch.addmm(skip.reshape(-1, skip.shape[-1]), flat, weight.t(), beta=beta, alpha=alpha).view(shape)
        gap = 1 - beta if eager else 0.0
        wide = skip is not None and torch.promote_types(skip.dtype, x.dtype) == skip.dtype
        if wide and skip is not None and bias is None and gap > 1e-9:
            # A float32 stream beside a low-precision GEMM: with alpha / (1 - beta) the add is one lerp, in the memory
            # that the wider copy of the product needs in any case.
            out = scaled_mm(flat, weight.t(), alpha / gap).view(shape).to(skip.dtype)
            return torch.lerp(skip, out, gap, out=out) if may_overwrite() else torch.lerp(skip, out, gap)
        if eager and bias is not None:
            out = torch.addmm(bias, flat, weight.t(), beta=bias_scale, alpha=alpha).view(shape)
        else:
            like = weight[:, 0] if skip is None and bias is None else None
            out = scaled_mm(flat, weight.t(), alpha, like).view(shape)
            if bias is not None:
                out = out + times(bias, bias_scale)
        return out if skip is None else times(skip, beta) + out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, skip, *ctx.factors, ctx.tokens = inputs
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.skip_dtype = None if skip is None else skip.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        _, _, _, dx_scale, pending = ctx.factors
        need_x, need_weight, need_bias, need_skip = ctx.needs_input_grad[:4]
        token_factor = token_scale(ctx.tokens, x.numel() // x.shape[-1])
        low = grad.to(x.dtype)
        flat = low.reshape(-1, low.shape[-1])
        flat_x = x.reshape(-1, x.shape[-1])
        dx = dw = db = None
        if need_x:
            dx = scaled_mm(flat, weight, dx_scale, flat_x).view(x.shape)
        if need_weight:
            dw = scaled_mm(flat.t(), flat_x, token_factor * pending, weight)
        if need_bias and ctx.bias_dtype is not None:
            db = times(flat.sum(0), token_factor).to(ctx.bias_dtype)
        dskip = grad.to(ctx.skip_dtype) if need_skip and ctx.skip_dtype is not None else None
        return dx, dw, db, dskip, None, None, None, None, None, None


class _LinearJvp(_Linear):
    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _Linear.setup_context(ctx, inputs, output)
        ctx.save_for_forward(inputs[0], inputs[1])

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dw: Tensor | None, db: Tensor | None, dskip: Tensor | None, *_: Any) -> Tensor:
        x, weight = ctx.saved_tensors
        alpha, bias_scale, beta, _, _ = ctx.factors
        out: Tensor = x.new_zeros((*x.shape[:-1], weight.shape[0]))
        if dx is not None:
            out = out + alpha * (dx @ weight.t())
        if dw is not None:
            out = out + alpha * (x @ dw.t())
        if db is not None:
            out = out + bias_scale * db
        return out if dskip is None else out + beta * dskip


def scaled_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    forward: float,
    input_grad: float,
    tokens: int | None = None,
    pending: float = 1.0,
    skip: Tensor | None = None,
    branch_scale: float = 1.0,
    skip_scale: float = 1.0,
) -> Tensor:
    """A linear with all its scales in the GEMMs.

    With `z = pending * x` (in both directions) and `y = forward * (z @ weight.T + bias)` the result is
    `branch_scale * y + skip_scale * skip`. Gradients: `branch_scale` and `skip_scale` act forward only (the u-muP
    residual add passes factor 1 back), `dx = pending * input_grad * g @ weight`, `dweight = T^-1/2 * g.T @ z` and
    `dbias = T^-1/2 * sum(g)`, with `T = tokens`, or the local row count if that is None.

    Args:
        x: `[..., in]`.
        weight: `[out, in]`.
        bias: `[out]` or None.
        forward: output factor.
        input_grad: factor of the input gradient.
        tokens: global number of rows of the batch, over all ranks and accumulation steps.
        pending: the factor that the op before left for this one.
        skip: `[..., out]` or None.
        branch_scale: factor on the branch, forward only.
        skip_scale: factor on `skip`, forward only.

    Returns:
        `[..., out]`; under autocast in the autocast dtype, with a skip in the wider of the two.
    """
    x, weight, bias = autocast_operands(x, weight, bias)
    bias_scale = branch_scale * forward
    alpha, dx_scale = bias_scale * pending, input_grad * pending
    args = (x, weight, bias, skip, alpha, bias_scale, skip_scale, dx_scale, pending, tokens)
    result: Tensor = call(_Linear, _LinearJvp, *args)
    return result
