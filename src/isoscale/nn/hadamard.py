"""A random Hadamard transform of blocks along one axis: outliers are spread over their block, products stay.

With the orthonormal H = diag(signs) Hadamard / sqrt(size), (x H)(w H)^T = x w^T. The signs are one fixed draw per size,
as NVFP4's recipe has it (arXiv 2509.25149): the same in every layer, step and run, so nothing of it has to be saved.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from isoscale._base.rng import words


def rotation(size: int) -> Tensor:
    """The matrix, float64 [size, size]; its rows are orthonormal.

    Args:
        size: a power of two.
    """
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    signs = torch.tensor([1.0 - 2.0 * (int(word) & 1) for word in words(size, 0, "hadamard", size)], dtype=matrix.dtype)
    out: Tensor = signs[:, None] * matrix / size**0.5
    return out


def rotate(x: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """Each block of `size` values along an axis times the matrix; the axis is filled up with zeros to whole blocks.

    Args:
        x: [..., rows, k] for axis -1, [..., k, rows] for -2.
        matrix: of `rotation`.
        axis: -1 or -2.

    Returns:
        As x, with k rounded up to a multiple of the size.
    """
    size = len(matrix)
    matrix = matrix.to(x.device, x.dtype)
    missing = -x.shape[axis] % size
    if missing:
        x = pad(x, (0, missing) if axis == -1 else (0, 0, 0, missing))
    blocks = x.shape[axis] // size  # said, not -1: a tensor may be empty
    if axis == -1:
        return torch.matmul(x.reshape(*x.shape[:-1], blocks, size), matrix).flatten(-2)
    return torch.matmul(matrix.t(), x.reshape(*x.shape[:-2], blocks, size, x.shape[-1])).flatten(-3, -2)
