"""Softmax and its logarithm: on the value, in float32 where data are half, masks of -inf as torch has them."""

from __future__ import annotations

from typing import Any

import torch

from isoscale.scalify import scales
from isoscale.scalify.pair import Pair, lift
from isoscale.scalify.registry import rule
from isoscale.scalify.rules.support import ops, real, size, under_wide, wide

aten = torch.ops.aten


def _kind(x: Pair, half_to_float: bool) -> torch.dtype:
    return torch.float32 if half_to_float else x.data.dtype


def _probabilities(x: Pair, dim: int, op: Any, dtype: torch.dtype) -> Pair:
    r = float(scales.floor_root(size(x.data, dim)))
    out = op(real(x), dim)
    return Pair((out * r if r != 1 else out).to(dtype), 1.0 / r)


@rule(*ops("_softmax"))
def softmax(x: Pair, dim: int, half_to_float: bool = False) -> Pair:
    """s = 1 / r, r = floor2(sqrt(n)). Assumes rows whose RMS is that of one-hot rows of length n, 1 / sqrt(n)."""
    return _probabilities(x, dim, lambda v, d: aten._softmax.default(v, d, False), _kind(x, half_to_float))


@rule(*ops("_safe_softmax"))
def safe_softmax(x: Pair, dim: int, dtype: torch.dtype | None = None) -> Pair:
    """s = 1 / r, r = floor2(sqrt(n)); rows that are masked whole are 0. Assumes rows as for softmax."""
    return _probabilities(x, dim, aten._safe_softmax.default, dtype or x.data.dtype)


@rule(*ops("_softmax_backward_data"))
def softmax_backward(grad: Any, output: Any, dim: int, input_dtype: torch.dtype) -> Pair:
    """s = s_g s_y. Assumes a gradient that is independent of the probabilities y."""
    grad, output = lift(grad), lift(output)
    g, y = wide(grad.data), wide(output.data)
    mean = torch.sum(g * real(output), dim, keepdim=True)
    return Pair((y * (g - mean)).to(input_dtype), scales.mul(grad.scale, output.scale))


@rule(*ops("_log_softmax"))
def log_softmax(x: Pair, dim: int, half_to_float: bool = False) -> Pair:
    """s = max(s_x, 1). Assumes rows whose log n is of order 1."""
    s = scales.larger(x.scale, 1.0)
    out = aten._log_softmax.default(real(x), dim, False)
    return Pair(under_wide(Pair(out, 1.0), s).to(_kind(x, half_to_float)), s)


@rule(*ops("_log_softmax_backward_data"))
def log_softmax_backward(grad: Any, output: Any, dim: int, input_dtype: torch.dtype) -> Pair:
    """s = s_g. Assumes a gradient of a few targets: what each spreads over its row is small beside it."""
    grad = lift(grad)
    out = aten._log_softmax_backward_data.default(wide(grad.data), real(output), dim, wide(grad.data).dtype)
    return Pair(out.to(input_dtype), grad.scale)
