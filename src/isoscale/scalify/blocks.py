"""Scales of blocks: a scale tensor of the data's rank, each of whose sizes divides the data's.

[1, n] is a scale per channel, [m, 1] one per row, [m, k / 32] MX blocks, [m / 128, k / 128] tiles. What moves whole
blocks moves the scales along. Matrix products fold the scales into float32 operands, which is exact. Every other
operator first gets the data under one scale, the largest: exact in float32, a rounding in half. So no rule knows of
blocks, and results of rules stand under one scale.

Block scales never change after they are made, because a view may hold a copy of them: a write brings new data under the
scales that are there, and it is for the caller to know that they fit. A scale of 0 counts as 1 here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves, tree_map

from isoscale._base.errors import ConfigError
from isoscale.scalify import block_moves, registry, scales
from isoscale.scalify.block_moves import factor, is_blocked, spread
from isoscale.scalify.errors import missing_rule
from isoscale.scalify.pair import Pair, times
from isoscale.scalify.rules.support import ops

PRODUCTS = frozenset(ops("mm", "bmm", "addmm", "baddbmm", "linear", "matmul"))
_FP8 = {torch.float8_e4m3fn: (2.0**8, 448.0), torch.float8_e5m2: (2.0**15, 57344.0)}  # largest power of two, largest


def check(data: Tensor, scale: Tensor) -> None:
    """Refuse scales that are no blocks of the data.

    Raises:
        ConfigError: another rank, or a size that does not divide the data's.
    """
    shape, blocks = tuple(data.shape), tuple(scale.shape)
    if len(shape) != len(blocks) or any(n % b if b else n for n, b in zip(shape, blocks)):
        raise ConfigError("block scales have the rank of the data, and sizes that divide theirs", key="scale",
                          value=blocks, hint=f"the data are {shape}")  # fmt: skip


def exact(pair: Pair) -> Pair:
    """The same value with a scale that broadcasts: for `value`."""
    if not is_blocked(pair):
        return pair
    assert isinstance(pair.scale, Tensor)
    return Pair(pair.data, factor(spread(pair.scale, pair.data.shape)))


def together(pair: Pair, wide: bool = False) -> Pair:
    """The same value under one scale, the largest of the blocks'.

    Args:
        pair: with block scales.
        wide: keep float32 data; otherwise they are rounded to their dtype, fp8 to bf16, which holds them exactly.
    """
    data, scale = scales.widened(pair.data), pair.scale
    assert isinstance(scale, Tensor)
    top = scale.amax() if scale.numel() else torch.zeros((), device=data.device)
    top = torch.where(top == 0, (data != 0).any().float(), top)
    out = data * spread(factor(scale) / factor(top), data.shape)
    return Pair(out if wide else out.to(_kept(pair.data.dtype)), top)


def _kept(dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if dtype.itemsize == 1 else dtype


def put(data: Tensor, scale: Tensor, new: Pair) -> None:
    """Write a value into data under the block scales that are there."""
    source = new.scale if isinstance(new.scale, Tensor) else torch.tensor(float(new.scale), device=data.device)
    moved = torch.where(source == 0, 1.0, source / factor(spread(scale, data.shape)))
    data.copy_(times(new.data if isinstance(new.data, Tensor) else torch.tensor(new.data), moved))


def block_scale(x: Tensor, block: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A power of two per block, not above its largest element; for fp8 data as MX has it (`encode`); 0 for zeros.

    Args:
        x: plain.
        block: sizes along the last dimensions, -1 for the whole of one; 1 along those before.
        dtype: of the data that the scales are for.

    Raises:
        ConfigError: more sizes than dimensions, or one that does not divide.
    """
    if not 0 < len(block) <= x.dim() or any(size < 1 and size != -1 for size in block):
        raise ConfigError("a block has a size, or -1, for each of the last dimensions", key="block", value=tuple(block),
                          hint=f"x is {tuple(x.shape)}")  # fmt: skip
    sizes = [1] * (x.dim() - len(block)) + [n if size == -1 else size for n, size in zip(x.shape[-len(block) :], block)]
    if any(n % size for n, size in zip(x.shape, sizes) if size):
        raise ConfigError("the block does not divide the tensor", key="block", value=tuple(block),
                          hint=f"x is {tuple(x.shape)}; pad it with zeros")  # fmt: skip
    parts = [(n // size if size else 0, size) for n, size in zip(x.shape, sizes)]
    top = x.detach().abs().reshape([s for part in parts for s in part])
    if x.numel():
        top = top.amax([2 * i + 1 for i in range(x.dim())])
    found = scales.floor2(top.reshape([count for count, _ in parts]))
    assert isinstance(found, Tensor)
    found = torch.where(torch.isfinite(found), found, 0.0)
    return torch.where(found == 0, found, (found / _FP8.get(dtype, (1.0,))[0]).clamp(min=2.0**-126))


def encode(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Plain values as data under block scales.

    In fp8 the largest element of a block comes between the format's largest power of two and its double; what is beyond
    the format saturates (OCP MX, the floor rule), infinities and NaN apart.
    """
    data = scales.widened(x) / factor(spread(scale, x.shape))
    if dtype in _FP8:
        limit = _FP8[dtype][1]
        data = torch.where(torch.isfinite(data), data.clamp(-limit, limit), data)
    return data.to(dtype)


def run(op: OpOverload, args: Any, kwargs: Any) -> Any:
    """What an operator makes of block scales: pairs; None if the data are to be brought under one scale first.

    Args:
        op: the operator.
        args: its arguments, pairs where they are scaled.
        kwargs: by name.

    Raises:
        RuleError: it would write into a copy of the data.
        ConfigError: a view by strides.
    """
    row = registry.TABLE.get(op)
    if row is None:
        return None
    if registry.writes(op):
        if any(a.alias_info and a.alias_info.is_write and is_blocked(x) for a, x in zip(op._schema.arguments, args)):
            raise missing_rule(op, writes=True)
        return None
    if op in PRODUCTS:
        out = row.function(*tree_map(_wide, args), **tree_map(_wide, kwargs))
        return Pair(out.data.to(_product_dtype((args, kwargs))), out.scale)
    if op == _CAT:
        return block_moves.cat(*args, **kwargs)
    if row.kind != "layout" or not is_blocked(args[0]):
        return None
    moved = block_moves.move(op, *args, **kwargs)
    return block_moves.cut(op, *args, **kwargs) if moved is None and op.is_view else moved


def _wide(x: Any) -> Any:
    """For a product: float32 data under one scale, without a rounding."""
    if isinstance(x, Pair):
        return together(x, wide=True) if is_blocked(x) else Pair(scales.widened(x.data), x.scale)
    return scales.widened(x) if isinstance(x, Tensor) and x.is_floating_point() else x


def _product_dtype(given: Any) -> torch.dtype:
    """What torch promotes a product's operands to, fp8 giving way; bf16 where all are that."""
    found = [x.data if isinstance(x, Pair) else x for x in tree_leaves(given, is_leaf=lambda x: isinstance(x, Pair))]
    wide = [x.dtype for x in found if isinstance(x, Tensor) and x.is_floating_point() and x.dtype.itemsize > 1]
    return reduce(torch.promote_types, wide, wide[0]) if wide else torch.bfloat16


_CAT = torch.ops.aten.cat.default
