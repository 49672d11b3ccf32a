"""Where the blocks of a tensor lie.

Every tensor is seen as a batch of matrices [L, R, n] whose blocks lie along the last dimension. Without a copy that is
possible for the last axis; for another axis the memory is [L, n, C], "strided", and R is C.

Padding: where a block size does not divide, the last block is filled up with +0, which changes no largest magnitude;
the filling is cut off again on decoding.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import pad

from isoscale._base.errors import ConfigError
from isoscale.formats.block import BlockFormat
from isoscale.formats.element import ElementFormat
from isoscale.kernels.spec import CastSpec


class View(NamedTuple):
    """How a tensor of some shape is cut into blocks.

    Args:
        axis: the blocked axis, not negative.
        shape: (L, R, n), or (L, n, C) if strided.
        strided: whether the blocks lie along the middle dimension of the memory.
        moved: whether the axis must be moved to the last place first (a copy).
        rows: extent of a block across the axis.
        cols: extent of a block along the axis.
    """

    axis: int
    shape: tuple[int, int, int]
    strided: bool
    moved: bool
    rows: int
    cols: int

    @property
    def matrix(self) -> tuple[int, int, int]:
        """(L, R, n) in either case."""
        batch, first, last = self.shape
        return (batch, last, first) if self.strided else self.shape


def axis_of(axis: int, ndim: int) -> int:
    """The axis, not negative.

    Raises:
        ConfigError: there is no such axis.
    """
    if isinstance(axis, bool) or not isinstance(axis, int) or not -max(ndim, 1) <= axis < max(ndim, 1):
        hint = f"{-max(ndim, 1)} to {max(ndim, 1) - 1}"
        raise ConfigError(f"a tensor of {ndim} dimensions has no such axis", key="axis", value=axis, hint=hint)
    return axis % max(ndim, 1)


def view_of(shape: tuple[int, ...], axis: int, block: tuple[int, int]) -> View:
    """Cuts a shape into blocks.

    Args:
        shape: any; a 0-d tensor counts as one of one element.
        axis: along which blocks lie; tiles lie across the last of the other dimensions.
        block: (across, along), 0 for the whole extent; (0, 0) is one block of the whole tensor.

    Raises:
        ConfigError: there is no such axis.
    """
    shape = shape or (1,)
    axis = axis_of(axis, len(shape))
    across, along = block
    last = len(shape) - 1
    n = shape[axis]
    others = shape[:axis] + shape[axis + 1 :]
    if across == along == 0:
        rows = math.prod(others)
        return View(axis, (1, rows, n), False, axis != last, max(rows, 1), max(n, 1))
    if across != 1:
        width = others[-1] if others else 1
        rows = min(across, max(width, 1)) if across else max(width, 1)
        return View(axis, (math.prod(others[:-1]), width, n), False, axis != last, rows, along or max(n, 1))
    if axis == last:
        return View(axis, (1, math.prod(others), n), False, False, 1, along or max(n, 1))
    outer, inner = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
    return View(axis, (outer, n, inner), True, False, 1, along or max(n, 1))


def spec_of(fmt: BlockFormat | ElementFormat, view: View) -> CastSpec:
    """The cast in plain numbers."""
    element = fmt if isinstance(fmt, ElementFormat) else fmt.element
    scale, rule = ("none", "none") if isinstance(fmt, ElementFormat) else (fmt.scale, fmt.scale_rule)
    return CastSpec(
        element.bits, element.mantissa_bits, element.bias, element.emin, element.emax, element.max,
        element.layout == "twos", scale, rule, view.rows, view.cols,
    )  # fmt: skip


def to_matrix(x: Tensor, view: View) -> Tensor:
    """The tensor as [L, R, n]; a view where the memory allows."""
    x = x.reshape(1) if x.dim() == 0 else x
    if view.strided:
        return x.reshape(view.shape).transpose(1, 2)
    return (x.movedim(view.axis, -1) if view.moved else x).reshape(view.shape)


def from_matrix(y: Tensor, view: View, shape: tuple[int, ...]) -> Tensor:
    """The tensor back from [L, R, n]."""
    if view.strided:
        return y.transpose(1, 2).reshape(shape)
    if view.moved:
        others = shape[: view.axis] + shape[view.axis + 1 :]
        return y.reshape(*others, shape[view.axis]).movedim(-1, view.axis)
    return y.reshape(shape)


def to_blocks(matrix: Tensor, rows: int, cols: int) -> Tensor:
    """[L, R, n] -> [L, Rb, rows, K, cols], padded with 0."""
    batch, height, width = matrix.shape
    below, right = -height % rows, -width % cols
    if below or right:
        matrix = pad(matrix, (0, right, 0, below))
    return matrix.reshape(batch, (height + below) // rows, rows, (width + right) // cols, cols)


def from_blocks(blocks: Tensor, height: int, width: int) -> Tensor:
    """[L, Rb, rows, K, cols] -> [L, R, n], the filling cut off."""
    matrix = blocks.flatten(3, 4).flatten(1, 2)
    return matrix[:, :height, :width]
