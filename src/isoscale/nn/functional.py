"""Unit-scaled ops, with torch's names and argument order.

Every op keeps unit-scale inputs, weights and output gradients at unit scale in its output, input gradients and weight
gradients (Unit Scaling, arXiv 2303.11257; factors of u-muP, arXiv 2407.17465). No op defers a factor: what it returns
is the logical value. Ops that sum a weight gradient over rows take `tokens`, the *global* number of rows of a batch
(over ranks and accumulation steps); None counts the rows at hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as torch_f
from torch import Tensor

from isoscale._base.errors import ConfigError
from isoscale.nn import factors as _factors
from isoscale.nn.attention import apply_rope, rope_tables, scaled_dot_product_attention
from isoscale.nn.constraints import apply_constraint
from isoscale.nn.convolution import conv1d, conv2d
from isoscale.nn.factors import transformer_residual_rule, transformer_residual_taus
from isoscale.nn.gemm import scaled_linear
from isoscale.nn.losses import cross_entropy, mse_loss
from isoscale.nn.norms import layer_norm, norm_split, rms_norm
from isoscale.nn.scale import residual_blend, scale, scale_bwd, scale_fwd, times

__all__ = [
    "add",
    "apply_rope",
    "conv1d",
    "conv2d",
    "cross_entropy",
    "dropout",
    "embedding",
    "gelu",
    "gelu_glu",
    "layer_norm",
    "linear",
    "linear_readout",
    "matmul",
    "mse_loss",
    "norm_split",
    "residual_add",
    "residual_apply",
    "residual_split",
    "rms_norm",
    "rope_tables",
    "scaled_dot_product_attention",
    "silu",
    "silu_glu",
    "softmax",
    "transformer_residual_rule",
    "transformer_residual_taus",
]


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    constraint: str | None = "to_output_scale",
    scale_power: tuple[float, float] = (0.5, 0.5),
    *,
    tokens: int | None = None,
) -> Tensor:
    """`fan_in^-p0 * (x @ weight.T + bias)`.

    Args:
        x: `[..., in]`.
        weight: `[out, in]`, unit scale.
        bias: `[out]` or None.
        constraint: merges the output factor and that of the input gradient (`out^-p1`).
        scale_power: `(p0, p1)`.
        tokens: global row count T; the gradients of weight and bias get `T^-1/2`.

    Returns:
        `[..., out]`.

    Raises:
        ConfigError: unknown constraint.
    """
    forward, input_grad = _factors.linear_factors(weight.shape[1], weight.shape[0], constraint, scale_power)
    return scaled_linear(x, weight, bias, forward=forward, input_grad=input_grad, tokens=tokens)


def linear_readout(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    constraint: str | None = None,
    scale_power: tuple[float, float] = (1.0, 0.5),
    *,
    tokens: int | None = None,
) -> Tensor:
    """The last linear: `1/fan_in` forward, `fan_out^-1/2` backward (no residual add follows). Else as `linear`."""
    return linear(x, weight, bias, constraint, scale_power, tokens=tokens)


def matmul(left: Tensor, right: Tensor, constraint: str | None = "to_output_scale") -> Tensor:
    """`left [..., a, k] @ right [..., k, b]` with factors `k^-1/2`, left gradient `b^-1/2`, right gradient `a^-1/2`.

    Raises:
        ConfigError: an operand with fewer than two dimensions, an unknown constraint.
    """
    if left.dim() < 2 or right.dim() < 2:
        raise ConfigError("matmul needs matrices", key="dim", value=(left.dim(), right.dim()), hint="unsqueeze vectors")
    sizes = (left.shape[-1], right.shape[-1], left.shape[-2])
    out, left_grad, right_grad = apply_constraint(constraint, *(size**-0.5 for size in sizes))
    return scale_fwd(scale_bwd(left, left_grad) @ scale_bwd(right, right_grad), out)


def gelu(x: Tensor, mult: float = 1.0, constraint: str | None = "to_output_scale", approximate: str = "none") -> Tensor:
    """`gelu(mult x) / mult`, any shape. `mult` > 0 sharpens it towards ReLU."""
    forward, backward = _factors.gelu_factors(mult, constraint)
    out = torch_f.gelu(times(x, mult), approximate=approximate)
    return scale(out, *_divide(forward, backward, mult))


def silu(x: Tensor, mult: float = 1.0, constraint: str | None = "to_output_scale") -> Tensor:
    """`x * sigmoid(mult x)`, any shape. `mult` > 0 sharpens it towards ReLU."""
    forward, backward = _factors.silu_factors(mult, constraint)
    return scale(torch_f.silu(times(x, mult)), *_divide(forward, backward, mult))


def _divide(forward: float, backward: float, mult: float) -> tuple[float, float]:
    if forward == backward:  # one object tells `scale` that an ordinary multiplication does
        both = forward / mult
        return both, both
    return forward / mult, backward / mult


def silu_glu(x: Tensor, gate: Tensor, mult: float = 1.0) -> Tensor:
    """SwiGLU: `x * gate * sigmoid(mult gate)`, equal shapes; one factor for the output and both gradients."""
    return (x * torch_f.silu(times(gate, mult))) * (_factors.silu_glu_factor(mult) / mult)


def gelu_glu(x: Tensor, gate: Tensor, mult: float = 1.0, approximate: str = "none") -> Tensor:
    """GEGLU: `x * gelu(mult gate) / mult`, equal shapes; one factor throughout (see `gelu_glu_factor`: derived)."""
    activated = torch_f.gelu(times(gate, mult), approximate=approximate)
    return (x * activated) * (_factors.gelu_glu_factor(mult) / mult)


def softmax(
    x: Tensor,
    dim: int,
    dtype: torch.dtype | None = None,
    constraint: str | None = "to_output_scale",
    mult: float = 1.0,
) -> Tensor:
    """`softmax(mult x)` over `dim`, scaled to unit rms."""
    forward, backward = _factors.softmax_factors(mult, x.shape[dim], constraint)
    out = torch_f.softmax(times(x, mult), dim=dim, dtype=dtype)
    return out * forward if constraint is not None else scale(out, forward, backward)


def dropout(x: Tensor, p: float = 0.5, training: bool = True) -> Tensor:
    """torch's dropout times `sqrt(1 - p)`, forward and backward; the identity when not training."""
    if not 0 <= p < 1:
        raise ConfigError("dropout must be in [0, 1)", key="p", value=p)
    return torch_f.dropout(x, p) * math.sqrt(1 - p) if training and p > 0 else x


def add(left: Tensor | float, right: Tensor | float, constraint: str | None = "to_output_scale") -> Tensor:
    """`(left + right) / sqrt(2)` with broadcasting; adding a number or a one-element tensor keeps the scale.

    Under `constraint=None` the gradient of a broadcast operand gets `count^-1/2`, the count being its copies.
    """
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return torch.add(left, right)
    shape = torch.broadcast_shapes(left.shape, right.shape)  # type: ignore[no-untyped-call]
    total = math.prod(shape)
    single = left.numel() == 1 or right.numel() == 1
    grads = ((total // operand.numel()) ** -0.5 if operand.numel() else 1.0 for operand in (left, right))
    out, left_grad, right_grad = apply_constraint(constraint, 1.0 if single else 2**-0.5, *grads)
    return scale_fwd(scale_bwd(left, left_grad) + scale_bwd(right, right_grad), out)


def residual_split(x: Tensor, tau: float = 1.0) -> tuple[Tensor, Tensor]:
    """Open a residual branch: `(branch, skip)`, both equal to `x`.

    Gradients of the branch get `tau/sqrt(1+tau^2)`, of the skip `1/sqrt(1+tau^2)`: inside the branch they stay at unit
    scale (arXiv 2407.17465, section 1.3 rule). A larger tau favours the *branch*.
    """
    branch, skip = _factors.residual_scales(tau)
    return scale_bwd(x, branch), scale_bwd(x, skip)


def residual_add(branch: Tensor, skip: Tensor, tau: float = 1.0) -> Tensor:
    """Close a residual branch: `(tau branch + skip) / sqrt(1 + tau^2)`, both gradients passing with factor 1."""
    return residual_blend(branch, skip, *_factors.residual_scales(tau))


def residual_apply(fn: Callable[[Tensor], Tensor], x: Tensor, tau: float = 1.0) -> Tensor:
    """`residual_add(fn(branch), skip)` of `residual_split(x)`."""
    branch, skip = residual_split(x, tau)
    return residual_add(fn(branch), skip, tau)


def embedding(ids: Tensor, weight: Tensor, padding_idx: int | None = None, *, tokens: int | None = None) -> Tensor:
    """Rows of `weight [vocab, width]`; its gradient gets `sqrt(vocab / T)`, which assumes uniform token use.

    Args:
        ids: integers, any shape.
        weight: `[vocab, width]`, unit scale.
        padding_idx: a row that gets no gradient.
        tokens: global token count T; None counts `ids`.

    Returns:
        `[*ids.shape, width]`.
    """
    count = tokens if tokens is not None else (ids.numel() or 1)
    return torch_f.embedding(ids, scale_bwd(weight, (weight.shape[0] / count) ** 0.5), padding_idx)
