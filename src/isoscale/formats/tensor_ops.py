"""What can be done with a `BlockTensor` without decoding it: the operations that are exact on codes.

Matrix products decode their operand first, so that an encoded weight can be used where a plain one can.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from isoscale._base.errors import ConfigError
from isoscale.formats.block import BlockFormat
from isoscale.formats.codes import GROUP, row_bytes
from isoscale.formats.tensor import BlockTensor

aten = torch.ops.aten


def _like(
    x: BlockTensor, codes: Tensor, scales: Tensor | None, *, axis: int | None = None,
    shape: Sequence[int] | None = None, dtype: torch.dtype | None = None, tensor_scale: Tensor | None = None,
) -> BlockTensor:  # fmt: skip
    return BlockTensor(
        codes, scales, x.tensor_scale if tensor_scale is None else tensor_scale, x.format,
        x.axis if axis is None else axis, x.shape if shape is None else shape, x.dtype if dtype is None else dtype,
    )  # fmt: skip


def _each(x: BlockTensor, change: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> BlockTensor:
    tensor = None if x.tensor_scale is None else change(x.tensor_scale)
    scales = None if x.scales is None else change(x.scales)
    return _like(x, change(x.codes), scales, tensor_scale=tensor, dtype=dtype)


def _detach(x: BlockTensor) -> BlockTensor:
    return _each(x, lambda part: part.detach())


def _clone(x: BlockTensor, *, memory_format: Any = None) -> BlockTensor:
    return _each(x, lambda part: part.clone())


def _to(x: BlockTensor, *, dtype: Any = None, device: Any = None, non_blocking: bool = False, **_: Any) -> BlockTensor:
    """Codes move to a device; a dtype is what `decode` gives later."""
    return _each(x, lambda part: part.to(device=device, non_blocking=non_blocking), dtype or x.dtype)


def _permute(x: BlockTensor, dims: Sequence[int]) -> BlockTensor:
    order = [dim % x.dim() for dim in dims]
    axis = order.index(x.axis)
    old = [dim for dim in range(x.dim()) if dim != x.axis]
    others = [old.index(dim) for dim in order if dim != x.axis]
    across = isinstance(x.format, BlockFormat) and x.format.block[0] > 1
    if across and others and others[-1] != len(others) - 1:
        raise ConfigError("tiles lie across another dimension then", key="permute", value=tuple(dims), hint=".decode()")
    order_of_parts = [*others, len(others)]
    scales = None if x.scales is None else x.scales.permute(order_of_parts)
    shape = [x.shape[dim] for dim in order]
    return _like(x, x.codes.permute(order_of_parts), scales, axis=axis, shape=shape)


def _transpose(x: BlockTensor, first: int, second: int) -> BlockTensor:
    order = list(range(x.dim()))
    first, second = first % x.dim(), second % x.dim()
    order[first], order[second] = second, first
    return _permute(x, order)


def _t(x: BlockTensor) -> BlockTensor:
    return _transpose(x, 0, 1) if x.dim() == 2 else x


def _refuse_start(x: BlockTensor, dim: int, start: int, block: int) -> None:
    raise ConfigError(
        f"a slice of {x.format} along dimension {dim} starts where a block starts", key="start", value=start,
        hint=f"a multiple of {block}, or .decode() first",
    )  # fmt: skip


def _slice(
    x: BlockTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> BlockTensor:  # fmt: skip
    dim = dim % x.dim()
    start, end, step = slice(start, end, step).indices(x.shape[dim])
    count = len(range(start, end, step))
    shape = [*x.shape[:dim], count, *x.shape[dim + 1 :]]
    across, along = x.format.block if isinstance(x.format, BlockFormat) else (1, 0)
    place = dim - (dim > x.axis)  # among the other dimensions
    lead = x.codes.dim() - 1
    scales = x.scales
    if dim == x.axis:
        unit = along or GROUP[x.element.bits]  # one block of the whole extent may start anywhere between bytes
        if step != 1 or start % unit or (unit * x.element.bits) % 8:
            _refuse_start(x, dim, start, unit)
        first = start * x.element.bits // 8
        width = -(-count // along) * along if along else count
        codes = x.codes.narrow(-1, first, min(row_bytes(width, x.element.bits), x.codes.shape[-1] - first))
        if scales is not None and along:
            scales = scales.narrow(-1, start // along, -(-count // along))
        return _like(x, codes, scales, shape=shape)
    index = (slice(None),) * place + (slice(start, end, step),)
    codes = x.codes[index]
    if scales is not None and place == lead - 1 and across > 1:
        if step != 1 or start % across:
            _refuse_start(x, dim, start, across)
        scales = scales.narrow(place, start // across, -(-count // across))
    elif scales is not None and not (place == lead - 1 and across == 0) and (across, along) != (0, 0):
        scales = scales[index]
    return _like(x, codes, scales, shape=shape)


def _select(x: BlockTensor, dim: int, index: int) -> BlockTensor:
    dim = dim % x.dim()
    if dim == x.axis:
        raise ConfigError("one index along the blocked axis is no block", key="index", value=index, hint=".decode()")
    if isinstance(x.format, BlockFormat) and x.format.block[0] != 1:
        message = f"{x.format} shares scales across dimension {dim}"
        raise ConfigError(message, key="index", value=index, hint=".decode()")
    place = dim - (dim > x.axis)
    scales = None if x.scales is None else x.scales.select(place, index)
    shape = [*x.shape[:dim], *x.shape[dim + 1 :]]
    return _like(x, x.codes.select(place, index), scales, axis=x.axis - (dim < x.axis), shape=shape)


def _same_shape(x: BlockTensor, shape: Sequence[int]) -> BlockTensor:
    if list(shape) not in ([*x.shape], [-1]) or (list(shape) == [-1] and x.dim() != 1):
        raise ConfigError("a view would tear blocks apart", key="view", value=tuple(shape), hint=".decode().view(...)")
    return _detach(x)


def _decoding(op: Any) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        plain = [arg.decode() if isinstance(arg, BlockTensor) else arg for arg in args]
        return op(*plain, **kwargs)

    return run


def _copy_(into: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if not isinstance(into, BlockTensor):
        return into.copy_(source.decode() if isinstance(source, BlockTensor) else source)
    same = isinstance(source, BlockTensor) and (source.format, source.axis) == (into.format, into.axis)
    if not same or source.shape != into.shape:
        raise ConfigError("only codes of the same format, axis and shape are copied", key="copy_", hint="encode(...)")
    assert isinstance(source, BlockTensor)
    into.codes.copy_(source.codes)
    for name in ("scales", "tensor_scale"):
        if getattr(into, name) is not None:
            getattr(into, name).copy_(getattr(source, name))
    return into


_PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten.linear.default,
             aten.mv.default, aten.matmul.default)  # fmt: skip

OPS: dict[Any, Callable[..., Any]] = {
    aten.detach.default: _detach,
    aten.alias.default: _detach,
    aten.clone.default: _clone,
    aten._to_copy.default: _to,
    aten.t.default: _t,
    aten.transpose.int: _transpose,
    aten.permute.default: _permute,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.view.default: _same_shape,
    aten._unsafe_view.default: _same_shape,
    aten.copy_.default: _copy_,
    **{op: _decoding(op) for op in _PRODUCTS},
}
