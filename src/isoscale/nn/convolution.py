"""Unit-scaled convolutions (arXiv 2303.11257, Table A.2, for one or two spatial dimensions)."""

from __future__ import annotations

import math

import torch.nn.functional as torch_f
from torch import Tensor

from isoscale.nn.constraints import apply_constraint
from isoscale.nn.factors import token_scale
from isoscale.nn.scale import autocast_operands, scale, scale_bwd


def conv_factors(
    weight_shape: tuple[int, ...],
    stride: tuple[int, ...],
    groups: int,
    constraint: str | None,
    scale_power: tuple[float, float] = (0.5, 0.5),
) -> tuple[float, float]:
    """Output factor `(in/groups * kernel)^-p0`, input-gradient factor `(stride * groups / (out * kernel))^p1`."""
    kernel = math.prod(weight_shape[2:])
    forward = (weight_shape[1] * kernel) ** -scale_power[0]
    # An input element is read by out/groups channels at kernel/stride positions.
    backward = (math.prod(stride) * groups / (weight_shape[0] * kernel)) ** scale_power[1]
    first, second = apply_constraint(constraint, forward, backward)
    return first, second


def _tuple(value: int | tuple[int, ...], dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value)


def _conv(
    dims: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | tuple[int, ...],
    padding: int | tuple[int, ...] | str,
    dilation: int | tuple[int, ...],
    groups: int,
    constraint: str | None,
    scale_power: tuple[float, float],
    tokens: int | None,
) -> Tensor:
    x, weight, bias = autocast_operands(x, weight, bias)
    steps = _tuple(stride, dims)
    forward, backward = conv_factors(tuple(weight.shape), steps, groups, constraint, scale_power)
    spread = _tuple(dilation, dims)
    length = 1
    for dim in range(dims):  # the output size, needed before the op: it fixes the weight-gradient factor
        size, reach = x.shape[x.dim() - dims + dim], spread[dim] * (weight.shape[2 + dim] - 1)
        if padding == "same":
            length = length * size
        else:
            pad = 0 if isinstance(padding, str) else _tuple(padding, dims)[dim]
            length = length * ((size + 2 * pad - reach - 1) // steps[dim] + 1)
    batch = x.shape[0] if x.dim() == dims + 2 else 1
    factor = token_scale(tokens, batch * length)
    x, weight = scale_bwd(x, backward / forward), scale_bwd(weight, factor / forward)
    bias = None if bias is None else scale_bwd(bias, factor / forward)
    op = torch_f.conv1d if dims == 1 else torch_f.conv2d
    out = op(x, weight, bias, steps, padding, spread, groups)
    both = forward
    return scale(out, both, both)


def conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] | str = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
    constraint: str | None = "to_output_scale",
    scale_power: tuple[float, float] = (0.5, 0.5),
    *,
    tokens: int | None = None,
) -> Tensor:
    """1-D convolution times `(in/groups * kernel)^-p0`.

    Args:
        x: `[batch, in, length]` or `[in, length]`.
        weight: `[out, in/groups, kernel]`, unit scale.
        bias: `[out]` or None.
        stride: as in torch, like `padding`, `dilation` and `groups`.
        padding: see `stride`.
        dilation: see `stride`.
        groups: see `stride`.
        constraint: merges the factors of output and input gradient.
        scale_power: `(p0, p1)`.
        tokens: global number of output positions T; gradients of weight and bias get `T^-1/2`.

    Returns:
        `[batch, out, new length]`.
    """
    return _conv(1, x, weight, bias, stride, padding, dilation, groups, constraint, scale_power, tokens)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] | str = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
    constraint: str | None = "to_output_scale",
    scale_power: tuple[float, float] = (0.5, 0.5),
    *,
    tokens: int | None = None,
) -> Tensor:
    """2-D convolution: `x [batch, in, height, width]`, `weight [out, in/groups, kh, kw]`; else as `conv1d`."""
    return _conv(2, x, weight, bias, stride, padding, dilation, groups, constraint, scale_power, tokens)
