"""The cast itself in plain torch: slow in eager mode, exact, the same bits on every device, and what a compiler traces.

Blocks are seen as [L, Rb, rows, K, cols] (see `layout`). In eager mode on a CPU large tensors go through in pieces that
stay in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from isoscale.formats import noise as noise_
from isoscale.formats.grid import LAYOUT, Grid, round_to_grid
from isoscale.formats.layout import View, from_blocks, from_matrix, to_blocks, to_matrix
from isoscale.formats.rounding import Noise
from isoscale.formats.scales import Scales, block_scales
from isoscale.kernels.spec import CastSpec

PIECE = 1 << 18
"""Elements of a piece: small enough for the outer caches, large enough that the fixed cost of an operation is small."""


class Cast(NamedTuple):
    """A cast with all its settings resolved to numbers.

    Args:
        spec: the format in numbers.
        grid: the element's values.
        view: how the tensor is cut into blocks.
        rounding: its name.
        noise: for stochastic rounding.
    """

    spec: CastSpec
    grid: Grid
    view: View
    rounding: str
    noise: Noise | None


class Rounded(NamedTuple):
    """Blocks after rounding: the elements on their grid, and the scales (None for a bare element format)."""

    values: Tensor
    scales: Scales | None


def magnitudes(blocks: Tensor) -> Tensor:
    """Bits of the largest magnitude of each block: [L, Rb, 1, K, 1] integers; inf and NaN count as larger than all.

    The maximum is taken of floats, which compilers vectorise; `amax` hands NaN on.
    """
    _, word, field, bias = LAYOUT[blocks.dtype == torch.float64]
    mask = (2 * bias + 2 << field) - 1
    return blocks.abs().amax((2, 4), keepdim=True).view(word) & mask


def round_blocks(blocks: Tensor, cast: Cast, random: Tensor | None, tensor_amax: Tensor | None) -> Rounded:
    """Scales and rounds blocks.

    Args:
        blocks: [L, Rb, rows, K, cols], float32 or float64.
        cast: its settings.
        random: int64 of the same shape, in [0, 2^bits), for stochastic rounding.
        tensor_amax: 0-d, for formats with a scale of the whole tensor.
    """
    bits = cast.noise.bits if cast.noise else 0
    if cast.spec.scale == "none":
        return Rounded(round_to_grid(blocks, cast.grid, cast.rounding, random, bits), None)
    scales = block_scales(magnitudes(blocks), cast.spec, tensor_amax)
    return Rounded(round_to_grid(blocks * scales.shrink, cast.grid, cast.rounding, random, bits), scales)


def random_of(x: Tensor, cast: Cast) -> Tensor | None:
    """Random numbers of the elements of x, in the shape of x."""
    if cast.noise is None:
        return None
    index = noise_.index_of(x.shape, cast.noise.whole, cast.noise.start, x.device)
    return noise_.bits32(cast.noise.key, index) >> (32 - cast.noise.bits)


def _blocks(x: Tensor, cast: Cast) -> Tensor:
    return to_blocks(to_matrix(x, cast.view), cast.spec.rows, cast.spec.cols)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def grown(rounded: Rounded, cast: Cast) -> Tensor:
    """Values of rounded blocks. Scales that are no powers of two multiply in float32, as in `BlockTensor.decode`."""
    if rounded.scales is None:
        return rounded.values
    if cast.spec.scale == "e8m0" or rounded.values.dtype == torch.float32:
        return rounded.values * rounded.scales.grow
    return rounded.values.to(torch.float32) * rounded.scales.grow.to(torch.float32)


def cast_values(x: Tensor, cast: Cast, tensor_amax: Tensor | None) -> Tensor:
    """Values after a round trip, in the dtype of x."""
    random = random_of(x, cast)
    noise = None if random is None else _blocks(random, cast)
    rounded = round_blocks(_blocks(_wide(x), cast), cast, noise, tensor_amax)
    values = grown(rounded, cast)
    _, height, width = cast.view.matrix
    return from_matrix(from_blocks(values, height, width), cast.view, tuple(x.shape)).to(x.dtype)


def pieces(x: Tensor, cast: Cast) -> Iterator[tuple[slice, slice]]:
    """Slices of [L, R] that keep blocks whole, each of about `PIECE` elements."""
    batch, height, width = cast.view.matrix
    rows = cast.spec.rows
    step = max(PIECE // max(width * rows, 1), 1) * rows
    group = max(PIECE // max(width * height, 1), 1)
    for first in range(0, batch, group):
        for top in range(0, height, step):
            yield slice(first, first + group), slice(top, top + step)


def tensor_amax_of(x: Tensor, cast: Cast) -> Tensor:
    """The largest magnitude of the blocks that hold neither inf nor NaN, 0-d float32; 0 where there is none."""
    matrix = to_matrix(x, cast.view)
    best = torch.zeros((), device=x.device)
    for where in pieces(x, cast):
        blocks = to_blocks(_wide(matrix[where]), cast.spec.rows, cast.spec.cols)
        words = magnitudes(blocks)
        words = torch.where(words >= _infinity(words), 0, words)
        best = torch.maximum(best, words.view(blocks.dtype).amax().to(torch.float32))
    return best


def _infinity(words: Tensor) -> int:
    _, _, field, bias = LAYOUT[words.dtype == torch.int64]
    return (2 * bias + 1) << field


def cast_values_in_pieces(x: Tensor, cast: Cast, tensor_amax: Tensor | None) -> Tensor:
    """The same as `cast_values`, bit for bit, with temporaries that stay in the cache. Eager mode only."""
    if cast.spec.scale == "e4m3" and tensor_amax is None:
        tensor_amax = tensor_amax_of(x, cast)
    matrix = to_matrix(x, cast.view)
    random = random_of(x, cast)
    noise = None if random is None else to_matrix(random, cast.view)
    out = torch.empty_like(matrix)
    for where in pieces(x, cast):
        part = to_blocks(_wide(matrix[where]), cast.spec.rows, cast.spec.cols)
        some = None if noise is None else to_blocks(noise[where], cast.spec.rows, cast.spec.cols)
        rounded = round_blocks(part, cast, some, tensor_amax)
        values = grown(rounded, cast)
        out[where] = from_blocks(values, out[where].shape[1], out.shape[2])
    return from_matrix(out, cast.view, tuple(x.shape))


def cast_codes(x: Tensor, cast: Cast, tensor_amax: Tensor | None) -> Rounded:
    """Elements on their grid as [L, R, K x cols] (the last block filled up), and the scales as [L, Rb, K]."""
    random = random_of(x, cast)
    noise = None if random is None else _blocks(random, cast)
    rounded = round_blocks(_blocks(_wide(x), cast), cast, noise, tensor_amax)
    values = rounded.values.flatten(3, 4).flatten(1, 2)[:, : cast.view.matrix[1]]
    scales = rounded.scales
    if scales is not None:
        flat = [part.squeeze(4).squeeze(2) for part in scales[:3]]
        scales = Scales(flat[0], flat[1], flat[2], scales.tensor)
    return Rounded(values, scales)


def kept(x: Tensor, cast: Cast, tensor_amax: Tensor | None, *, top: bool = False) -> Tensor:
    """Which elements the cast does not clip: bool, in the shape of x. True in blocks with an inf or a NaN.

    Args:
        x: any shape.
        cast: its settings.
        tensor_amax: as in `round_blocks`.
        top: measure against the format's largest value, not against what the dtype of x holds of it.
    """
    blocks = _blocks(_wide(x), cast)
    bound = cast.grid.top if top else cast.grid.bound
    if cast.spec.scale == "none":
        inside = ~(blocks.abs() > bound)
    else:
        scales = block_scales(magnitudes(blocks), cast.spec, tensor_amax)
        if cast.spec.scale == "fp32" and cast.spec.rule == "amax":
            bound *= 1 + 2.0**-20  # amax x (1 / (amax / max)) may be an ulp above max
        inside = ~((blocks * scales.shrink).abs() > bound) | scales.grow.isnan()
    _, height, width = cast.view.matrix
    return from_matrix(from_blocks(inside, height, width), cast.view, tuple(x.shape))
