"""Random bits as a function of (seed, position of the element), so that nothing random is stored.

The same bits on any device, in eager and compiled code, and for any way of splitting the tensor: an element's bits
depend on its index in the whole tensor alone. A keyed integer hash (two rounds of a 32-bit finaliser, constants found
by C. Wellons' hash-prospector search), not a cryptographic generator. Every product stays below 2^63, so that int64
arithmetic is exact everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from isoscale.kernels.normals import WORD, mix


def keys(seed: int) -> tuple[int, int]:
    """Two 32-bit keys from a 64-bit seed (negative seeds wrap)."""
    first = mix(((seed & WORD) + 0x9E3779B9) & WORD)
    return first, mix(((((seed >> 32) & WORD) ^ first) + 0x85EBCA6B) & WORD)


def tensor_keys(seed: Tensor) -> tuple[Tensor, Tensor]:
    """As `keys`, of a 0-d int64 tensor; no synchronisation with the device."""
    seed = seed.to(torch.int64)
    first = mix(((seed & WORD) + 0x9E3779B9) & WORD)
    return first, mix(((((seed >> 32) & WORD) ^ first) + 0x85EBCA6B) & WORD)


def bits32(key: tuple[int, int] | tuple[Tensor, Tensor], index: Tensor) -> Tensor:
    """32 random bits for each element.

    Args:
        key: of `keys` or `tensor_keys`.
        index: int64, not negative; any shape.

    Returns:
        int64 in [0, 2^32), of the shape of `index`.
    """
    h = mix(((index & WORD) + key[0]) & WORD)
    return mix(((h ^ (index >> 32)) + key[1]) & WORD)


def index_of(shape: Sequence[int], whole: Sequence[int], start: Sequence[int], device: torch.device) -> Tensor:
    """Row-major index, in a tensor of shape `whole`, of every element of a piece that starts at `start`.

    Returns:
        int64 of shape `shape`.
    """
    index = torch.zeros((), dtype=torch.int64, device=device)
    stride = 1
    for dim in range(len(shape) - 1, -1, -1):
        along = (torch.arange(shape[dim], device=device) + start[dim]) * stride
        index = index + along.view(-1, *(1,) * (len(shape) - 1 - dim))
        stride *= whole[dim]
    return index.expand(tuple(shape))
