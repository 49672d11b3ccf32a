"""Operators that move or copy elements: the scale stays (Scalify, arXiv 2407.17353: reshape and its kin)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from isoscale.scalify import scales
from isoscale.scalify.pair import Pair, lift
from isoscale.scalify.registry import rule
from isoscale.scalify.rules.support import beside, filler, operand, ops, real, scale_of

VIEWS = ops(
    "alias", "detach", "view", "_unsafe_view", "t", "transpose.int", "permute", "expand", "unsqueeze", "squeeze",
    "squeeze.dim", "squeeze.dims", "select.int", "slice.Tensor", "as_strided", "diagonal", "unfold",
)  # fmt: skip
MANY = ops(
    "split.Tensor", "split_with_sizes", "unbind.int", "unsafe_split.Tensor", "unsafe_split_with_sizes",
)  # fmt: skip
COPIES = ops(
    "clone", "flip", "roll", "repeat", "tril", "triu", "view_copy", "lift_fresh", "lift_fresh_copy",
    "slice_backward", "select_backward", "unfold_backward", "diagonal_backward", "neg", "abs", "rot90", "diag_embed",
    "diagonal_copy", "expand_copy", "permute_copy", "transpose_copy.int", "t_copy", "squeeze_copy", "unsqueeze_copy",
    "select_copy.int", "slice_copy.Tensor", "alias_copy", "detach_copy", "as_strided_copy", "unfold_copy",
    "pixel_shuffle", "pixel_unshuffle", "im2col", "reflection_pad1d", "reflection_pad2d",
    "reflection_pad3d", "replication_pad1d", "replication_pad2d", "replication_pad3d", "upsample_nearest1d",
    "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d",
    "_upsample_nearest_exact3d", "index.Tensor", "_unsafe_index.Tensor", "index_select", "gather", "take",
    "masked_select", "embedding",
)  # fmt: skip


def _keeps(op: OpOverload) -> None:
    if op in MANY:

        def move(x: Pair, *args: Any, **kwargs: Any) -> Any:
            """s = s_x"""
            return [Pair(part, x.scale) for part in op(x.data, *args, **kwargs)]
    else:

        def move(x: Pair, *args: Any, **kwargs: Any) -> Any:
            """s = s_x"""
            return Pair(op(x.data, *args, **kwargs), x.scale)

    rule(op, kind="layout")(move)


for _op in VIEWS + MANY + COPIES:
    _keeps(_op)


def _turns(op: OpOverload) -> None:
    def turn(x: Pair, *args: Any, **kwargs: Any) -> Pair:
        """s = s_x; the tensor itself gets the new shape"""
        op(x.data, *args, **kwargs)
        return x

    rule(op, kind="layout")(turn)


for _op in ops("transpose_", "t_", "squeeze_", "squeeze_.dim", "squeeze_.dims", "unsqueeze_"):
    _turns(_op)


@rule(*ops("_to_copy"), kind="layout")
def to_copy(x: Pair, dtype: torch.dtype | None = None, **kwargs: Any) -> Pair | Tensor:
    """s = s_x: only the data are cast. Integers and booleans are made of the value and are plain."""
    copy = torch.ops.aten._to_copy.default
    if dtype is None or dtype.is_floating_point:
        return Pair(copy(x.data, dtype=dtype, **kwargs), x.scale)
    out: Tensor = copy(real(x), dtype=dtype, **kwargs)
    return out


@rule(*ops("copy"), kind="layout")
def copy(x: Any, source: Any, non_blocking: bool = False) -> Pair:
    """s = s_source: what was there goes, its scale too; a plain source gets the one nearest to its RMS."""
    target = x.data if isinstance(x, Pair) else x
    new = lift(source)
    if isinstance(source, Tensor) and source.is_floating_point() and source.dim():
        s = scales.rms2(source)
        new = Pair(scales.widened(source) / torch.where(s == 0, 1.0, s), s)
    return Pair(torch.ops.aten.copy.default(target, new.data), new.scale)


@rule(*ops("constant_pad_nd"))
def constant_pad_nd(x: Pair, pad: list[int], value: float = 0.0) -> Pair:
    """s = s_x, or the value's where it is up to 2^10 larger. Assumes that a larger one is a mask."""
    if value == 0:
        return Pair(torch.constant_pad_nd(x.data, pad, 0.0), x.scale)
    s = beside(x.scale, scale_of(value))
    inside = torch.constant_pad_nd(torch.ones_like(x.data, dtype=torch.bool), pad, False)
    framed = torch.constant_pad_nd(operand(x, s, x.data), pad, 0.0)
    return Pair(torch.where(inside, framed, filler(value, s, x.data)).to(x.data.dtype), s)
