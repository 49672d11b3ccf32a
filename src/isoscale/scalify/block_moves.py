"""Block scales that move with their data: layout operators, views that cut blocks, joins of whole blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from isoscale._base.errors import ConfigError
from isoscale.scalify.pair import Pair
from isoscale.scalify.rules.support import ops

Move = Callable[..., "Tensor | None"]
_MOVES: dict[OpOverload, Move] = {}


def is_blocked(x: Any) -> bool:
    """Whether this is a pair with block scales."""
    return isinstance(x, Pair) and isinstance(x.scale, Tensor) and x.scale.dim() > 0


def spread(scale: Tensor, shape: Sequence[int]) -> Tensor:
    """Block scales as one number per element; a 0-d scale stays as it is."""
    if not scale.dim():
        return scale
    pairs = [(b, n // b if b else 1) for b, n in zip(scale.shape, shape)]
    split = scale.reshape([size for b, _ in pairs for size in (b, 1)])
    return split.expand([size for pair in pairs for size in pair]).reshape(shape)


def factor(scale: Tensor) -> Tensor:
    """Block scales as factors: 0 counts as 1. Under one scale it would mean that the data are zeros, by a promise that
    writes through views do not keep."""
    return torch.where(scale == 0, 1.0, scale)


def _runs(data: Tensor, scale: Tensor) -> list[int]:
    """Elements of a block along each dimension."""
    return [n // b if b else 1 for n, b in zip(data.shape, scale.shape)]


def _move(*names: str) -> Callable[[Move], Move]:
    def add(function: Move) -> Move:
        _MOVES.update(dict.fromkeys(ops(*names), function))
        return function

    return add


@_move("alias", "detach", "neg", "abs", "clone", "lift_fresh", "alias_copy", "detach_copy")
def _same(data: Tensor, scale: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return scale


def _with(op: OpOverload) -> None:
    def also(data: Tensor, scale: Tensor, *args: Any) -> Tensor:
        out: Tensor = op(scale, *args)
        return out

    _MOVES[op] = also


for _op in ops("t", "transpose.int", "permute", "unsqueeze", "t_copy", "transpose_copy.int", "permute_copy",
               "unsqueeze_copy"):  # fmt: skip
    _with(_op)


@_move("squeeze", "squeeze.dim", "squeeze.dims")
def _squeeze(data: Tensor, scale: Tensor, dims: Any = None) -> Tensor:
    every = range(data.dim()) if dims is None else [dims] if isinstance(dims, int) else dims
    return scale.squeeze([d for d in every if data.shape[d] == 1])


@_move("select.int")
def _select(data: Tensor, scale: Tensor, dim: int, index: int) -> Tensor:
    n = data.shape[dim]
    return scale.select(dim, (index + n if index < 0 else index) // _runs(data, scale)[dim])


@_move("slice.Tensor")
def _slice(
    data: Tensor, scale: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Tensor | None:
    n, run = data.shape[dim], _runs(data, scale)[dim]
    first, last, _ = slice(start, end).indices(n)
    if last <= first:
        return None
    if scale.shape[dim] == 1:
        return scale
    if run == 1:
        return scale[(slice(None),) * (dim % data.dim()) + (slice(first, last, step),)]
    if step != 1 or first % run or last % run:
        return None
    return scale.narrow(dim, first // run, (last - first) // run)


@_move("expand")
def _expand(data: Tensor, scale: Tensor, size: Sequence[int], implicit: bool = False) -> Tensor:
    return scale.reshape([1] * (len(size) - scale.dim()) + list(scale.shape))


@_move("view", "_unsafe_view", "view_copy")
def _view(data: Tensor, scale: Tensor, size: Sequence[int]) -> Tensor | None:
    """Groups of dimensions that are merged or split: a block survives if it is a run of elements in both shapes."""
    known = math.prod(size)
    shape = [data.numel() // -known if n == -1 else n for n in size]
    if not data.numel():
        return None
    old, new, out = list(data.shape), shape, []
    i = j = 0
    while i < len(old) or j < len(new):
        first_i, first_j = i, j
        a = b = 1
        while (i == first_i and j == first_j) or a != b:
            if a <= b and i < len(old):
                a, i = a * old[i], i + 1
            else:
                b, j = b * new[j], j + 1
        run = _flat_run(old[first_i:i], list(scale.shape)[first_i:i])
        if run is None:
            return None
        for n in reversed(new[first_j:j]):
            block = math.gcd(n, run)
            if block not in (n, run):
                return None
            out.append(n // block)
            run //= block
        out[len(out) - (j - first_j) :] = out[len(out) - (j - first_j) :][::-1]
        if run != 1:
            return None
    return scale.reshape(out)


def _flat_run(sizes: Sequence[int], blocks: Sequence[int]) -> int | None:
    """How many elements in a row a block of a merged group has; None if they are not in a row."""
    run, whole = 1, True
    for n, b in zip(reversed(sizes), reversed(blocks)):
        if whole:
            run *= n // b
            whole = b == 1
        elif n != b:
            return None
    return run


def move(op: OpOverload, pair: Pair, *args: Any, **kwargs: Any) -> list[Pair] | Pair | None:
    """A layout operator on data with block scales; None if it cuts blocks, or is not known here.

    Args:
        op: whose rule is of the kind layout.
        pair: its first argument.
        args: the others.
        kwargs: by name.
    """
    data, scale = pair.data, pair.scale
    assert isinstance(scale, Tensor)
    if op in _PARTS:
        dim, places = _PARTS[op](data, *args, **kwargs)
        moved = [_select(data, scale, dim, at) if op == _UNBIND else _slice(data, scale, dim, at, end)
                 for at, end in places]  # fmt: skip
        if any(part is None for part in moved):
            return None
        return [Pair(part, m) for part, m in zip(op(data, *args, **kwargs), moved) if m is not None]
    if op == _TO_COPY:
        if not (kwargs.get("dtype") or data.dtype).is_floating_point:
            return None
        return Pair(op(data, *args, **kwargs), scale.to(kwargs.get("device") or scale.device))
    if op not in _MOVES:
        return None
    at = _MOVES[op](data, scale, *args, **({} if op in _CLONES else kwargs))
    if at is None:
        return None
    return Pair(op(data, *args, **kwargs), at if at.dim() else factor(at))


_UNBIND, _TO_COPY = torch.ops.aten.unbind.int, torch.ops.aten._to_copy.default
_CLONES = frozenset(ops("clone"))


Places = tuple[int, list[tuple[int, int]]]
"""A dimension, and where its parts begin and end."""


def _even(data: Tensor, size: int, dim: int = 0) -> Places:
    n = data.shape[dim]
    return dim, [(at, min(at + size, n)) for at in range(0, n, max(size, 1))]


def _given(data: Tensor, sizes: Sequence[int], dim: int = 0) -> Places:
    ends = list(accumulate(sizes))
    return dim, list(zip([0, *ends], ends))


def _single(data: Tensor, dim: int = 0) -> Places:
    return dim, [(at, at + 1) for at in range(data.shape[dim])]


_PARTS: dict[OpOverload, Callable[..., Places]] = {
    **dict.fromkeys(ops("split.Tensor", "unsafe_split.Tensor"), _even),
    **dict.fromkeys(ops("split_with_sizes", "unsafe_split_with_sizes"), _given),
    _UNBIND: _single,
}


def cut(op: OpOverload, pair: Pair, *args: Any, **kwargs: Any) -> list[Pair] | Pair:
    """A view that cuts blocks: of the data, with one scale per element.

    Raises:
        ConfigError: a view by strides, which scales cannot follow.
    """
    if op in _STRIDED:
        raise ConfigError(f"{op} cannot follow block scales", key="x", value=tuple(pair.data.shape),
                          hint="iso.scalify.as_scaled(iso.scalify.as_plain(x))")  # fmt: skip
    assert isinstance(pair.scale, Tensor)
    data = op(pair.data, *args, **kwargs)
    scale = op(factor(spread(pair.scale, pair.data.shape)), *args, **kwargs)
    return [Pair(d, s) for d, s in zip(data, scale)] if isinstance(data, (list, tuple)) else Pair(data, scale)


_STRIDED = frozenset(ops("as_strided"))


def cat(parts: Sequence[Any], dim: int = 0) -> Pair | None:
    """Along whole blocks of one shape; None where there are others.

    Args:
        parts: pairs, and what else the operator was given.
        dim: along which.
    """
    blocked = [part for part in parts if is_blocked(part)]
    run = _runs(blocked[0].data, blocked[0].scale)
    if len(blocked) < len(parts) or any(_runs(part.data, part.scale) != run for part in blocked):
        return None
    return Pair(torch.cat([part.data for part in parts], dim), torch.cat([part.scale for part in parts], dim))
