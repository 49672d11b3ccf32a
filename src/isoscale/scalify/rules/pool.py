"""Pools and resampling. A maximum keeps the scale; an average is a mean of k; their gradients spread over k places."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from isoscale.scalify import scales
from isoscale.scalify.pair import Pair, lift
from isoscale.scalify.registry import rule
from isoscale.scalify.rules.support import below, ops, wide


def _product(xs: Any) -> Any:
    out: Any = 1
    for x in xs:
        out = out * x
    return out


def _with_indices(op: Any) -> Any:
    def pool(x: Pair, *args: Any, **kwargs: Any) -> tuple[Pair, Tensor]:
        """s = s_x; indices are plain. Assumes that a maximum is of the size of its inputs."""
        out, indices = op(x.data, *args, **kwargs)
        return Pair(out, x.scale), indices

    return pool


def _gradient_keeps(op: Any) -> Any:
    def backward(grad: Any, *args: Any, **kwargs: Any) -> Pair:
        """s = s_g. Assumes that few windows meet in one place; half data are added in float32."""
        grad = lift(grad)
        given = [wide(a.data) if isinstance(a, Pair) else a for a in args]
        return Pair(op(wide(grad.data), *given, **kwargs).to(grad.data.dtype), grad.scale)

    return backward


def _keeps(op: Any) -> Any:
    def sample(x: Pair, *args: Any, **kwargs: Any) -> Pair:
        """s = s_x. Assumes neighbours of like size."""
        return Pair(op(wide(x.data), *args, **kwargs).to(x.data.dtype), x.scale)

    return sample


for _op in ops("max_pool2d_with_indices", "max_pool3d_with_indices", "adaptive_max_pool2d", "adaptive_max_pool3d"):
    rule(_op)(_with_indices(_op))
for _op in ops(
    "max_pool2d_with_indices_backward", "max_pool3d_with_indices_backward", "adaptive_max_pool2d_backward",
    "adaptive_max_pool3d_backward", "reflection_pad1d_backward", "reflection_pad2d_backward",
    "reflection_pad3d_backward", "replication_pad1d_backward", "replication_pad2d_backward",
    "replication_pad3d_backward",
):  # fmt: skip
    rule(_op)(_gradient_keeps(_op))
for _op in ops(
    "upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d", "_upsample_bilinear2d_aa",
    "col2im",
):  # fmt: skip
    rule(_op)(_keeps(_op))


def _spread(op: Any) -> Any:
    def backward(grad: Pair, output_size: Any, input_size: Any, *args: Any, **kwargs: Any) -> Pair:
        """s = s_g r, r = floor2(sqrt(k)), k outputs of an input. Assumes independent gradients."""
        k = max(1, _product(output_size) // _product(input_size[2:]))
        r = float(scales.floor_root(k))
        out = op(wide(grad.data), output_size, input_size, *args, **kwargs)
        return Pair((out * (1.0 / r) if r != 1 else out).to(grad.data.dtype), scales.mul(grad.scale, r))

    return backward


for _op in ops(
    "upsample_nearest1d_backward", "upsample_nearest2d_backward", "upsample_nearest3d_backward",
    "_upsample_nearest_exact1d_backward", "_upsample_nearest_exact2d_backward", "_upsample_nearest_exact3d_backward",
    "upsample_linear1d_backward", "upsample_bilinear2d_backward", "upsample_trilinear3d_backward",
    "upsample_bicubic2d_backward",
):  # fmt: skip
    rule(_op)(_spread(_op))


def _average(op: Any, dims: int) -> Any:
    def pool(x: Pair, kernel_size: Any, *args: Any, **kwargs: Any) -> Pair:
        """s = s_x r / d, r = floor2(sqrt(k)) of k places, d their divisor. Assumes independent neighbours."""
        k = _product(kernel_size) if len(kernel_size) > 1 else kernel_size[0] ** dims
        divisor = (args[4] if len(args) > 4 else kwargs.get("divisor_override")) or None
        r = float(scales.floor_root(k))
        factor = 1.0 / r if divisor is None else r / below(divisor)
        out = op(wide(x.data), kernel_size, *args, **kwargs)
        return Pair((out * (1.0 / factor)).to(x.data.dtype), scales.mul(x.scale, factor))

    return pool


def _average_backward(op: Any, dims: int) -> Any:
    def backward(grad: Any, x: Any, kernel_size: Any, *args: Any, **kwargs: Any) -> Pair:
        """s = s_g / d, d the divisor of the average. Assumes that few windows meet in one place."""
        grad = lift(grad)
        k = _product(kernel_size) if len(kernel_size) > 1 else kernel_size[0] ** dims
        share = float(below(args[4] or k))
        out = op(wide(grad.data), wide(lift(x).data), kernel_size, *args, **kwargs)
        return Pair((out * share).to(grad.data.dtype), scales.mul(grad.scale, 1.0 / share))

    return backward


for _dims in (2, 3):
    for _op in ops(f"avg_pool{_dims}d"):
        rule(_op)(_average(_op, _dims))
    for _op in ops(f"avg_pool{_dims}d_backward"):
        rule(_op)(_average_backward(_op, _dims))


def _adaptive(op: Any) -> Any:
    def pool(x: Pair, output_size: Any) -> Pair:
        """s = s_x / r, r = floor2(sqrt(k)) of k = inputs for each output. Assumes independent neighbours."""
        k = max(1, _product(x.data.shape[-len(output_size) :]) // max(1, _product(output_size)))
        r = float(scales.floor_root(k))
        out = op(wide(x.data), output_size)
        return Pair((out * r if r != 1 else out).to(x.data.dtype), scales.mul(x.scale, 1.0 / r))

    return pool


def _adaptive_backward(op: Any, dims: int) -> Any:
    def backward(grad: Any, x: Any) -> Pair:
        """s = s_g / k, k = inputs for each output, rounded down to a power of two. Assumes nothing."""
        grad = lift(grad)
        data = lift(x).data
        k = max(1, _product(data.shape[-dims:]) // max(1, _product(grad.data.shape[-dims:])))
        share = float(below(k))
        out = op(wide(grad.data), wide(data))
        return Pair((out * share).to(grad.data.dtype), scales.mul(grad.scale, 1.0 / share))

    return backward


for _dims in (2, 3):
    for _op in ops(f"_adaptive_avg_pool{_dims}d"):
        rule(_op)(_adaptive(_op))
    for _op in ops(f"_adaptive_avg_pool{_dims}d_backward"):
        rule(_op)(_adaptive_backward(_op, _dims))
