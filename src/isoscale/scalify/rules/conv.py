"""Convolutions: a sum over k = fan-in terms gets the scale r = floor2(sqrt(k)); so do the two gradients.

1 / r goes into the operand that is summed over (exact for powers of two), before half results are rounded; fp16 on a
CPU is convolved in float32. The authors' package leaves r out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from isoscale.scalify import scales
from isoscale.scalify.pair import Pair, lift, times
from isoscale.scalify.registry import rule
from isoscale.scalify.rules.support import dtype_of, ops, under_wide, wide

aten = torch.ops.aten


def _operands(*xs: Tensor) -> tuple[Tensor, ...]:
    if any(x.dtype == torch.float16 and x.device.type == "cpu" for x in xs):
        return tuple(x.float() for x in xs)
    return xs


def _product(shape: Any) -> Any:
    out: Any = 1
    for n in shape:
        out = out * n
    return out


def _terms(weight: Tensor, groups: int, stride: list[int], transposed: bool) -> tuple[Any, Any]:
    """How many terms an output and an input gradient sum: (channels of a group) x (places of the kernel)."""
    places = _product(weight.shape[2:])
    strided = max(1, places // max(1, _product(stride)))  # a strided step shares a kernel out among several outputs
    if transposed:
        return weight.shape[0] // groups * strided, weight.shape[1] * places
    return weight.shape[1] * places, weight.shape[0] // groups * strided


@rule(*ops("convolution", "_convolution"))
def convolution(
    x: Any, weight: Any, bias: Any, stride: list[int], padding: list[int], dilation: list[int], transposed: bool,
    output_padding: list[int], groups: int, *flags: Any,
) -> Pair:  # fmt: skip
    """s = max(s_x s_w r, s_b), r = floor2(sqrt(k)), k the fan-in. Assumes k independent terms of zero mean."""
    x, weight = lift(x), lift(weight)
    k, _ = _terms(weight.data, groups, stride, transposed)
    r = float(scales.floor_root(k))
    data, w = _operands(x.data, weight.data)
    args = (stride, padding, dilation, transposed, output_padding, groups)
    out = aten.convolution.default(data, times(w, 1.0 / r), None, *args)
    share = scales.mul(scales.mul(x.scale, weight.scale), r)
    kind = dtype_of(x, weight)
    if bias is None:
        return Pair(out.to(kind), share)
    bias = lift(bias)
    s = scales.larger(share, bias.scale)
    shape = [-1, *[1] * (weight.data.dim() - 2)]
    return Pair((under_wide(Pair(out, share), s) + under_wide(bias, s).reshape(shape)).to(kind), s)


@rule(*ops("convolution_backward"))
def convolution_backward(
    grad: Any, x: Any, weight: Any, bias_sizes: Any, stride: list[int], padding: list[int], dilation: list[int],
    transposed: bool, output_padding: list[int], groups: int, output_mask: list[bool],
) -> tuple[Any, Any, Any]:  # fmt: skip
    """s = s_g s_w r (input), s_g s_x r (weight), s_g r (bias), each r of what is summed. Assumes zero means."""
    g, x, weight = lift(grad), lift(x), lift(weight)
    _, k = _terms(weight.data, groups, stride, transposed)
    places = g.data.shape[0] * _product((x if transposed else g).data.shape[2:])
    r_x, r_w = float(scales.floor_root(k)), float(scales.floor_root(places))
    gd, xd, wd = _operands(g.data, x.data, weight.data)
    mask = [output_mask[0], output_mask[1], False]
    to_x, to_w, _ = aten.convolution_backward.default(
        gd, times(xd, 1.0 / r_w), times(wd, 1.0 / r_x), None, stride, padding, dilation, transposed, output_padding,
        groups, mask,
    )  # fmt: skip
    kind = g.data.dtype
    out: list[Any] = [None, None, None]
    if output_mask[0]:
        out[0] = Pair(to_x.to(kind), scales.mul(scales.mul(g.scale, weight.scale), r_x))
    if output_mask[1]:
        out[1] = Pair(to_w.to(kind), scales.mul(scales.mul(g.scale, x.scale), r_w))
    if output_mask[2]:
        dims = [0, *range(2, g.data.dim())]
        r = float(scales.floor_root(g.data.shape[0] * _product(g.data.shape[2:])))
        out[2] = Pair((torch.sum(wide(g.data), dims) * (1.0 / r)).to(kind), scales.mul(g.scale, r))
    return out[0], out[1], out[2]
