"""Normal numbers as a function of (keys, place of the element), so that nothing random is stored: the reference.

A 32-bit word is made of the element's index in the whole tensor. 16 indices are a line. Its number is hashed by the
finaliser of C. Wellons' hash-prospector search, one key added before it and one between its rounds, so that the streams
of two keys are not shifted copies of each other; each place in a line then makes a word of its own of that hash by two
keys and two products. So a hash serves 16 words: over 2^24 lines no pair of places, in one stream or in two, shows a
correlation of normals, squares, cubes or fourth powers (Hermite; 4.7 standard errors are the largest of 32 000). A
normal number is the sum of the word's four bytes (Irwin-Hall), bent by a cubic so that variance and
kurtosis are those of a normal: within 0.0021 of its distribution function, and at most 4.04 in size.

Bit-equal everywhere: integers modulo 2^32, and then s (s^2 + K) C, where s^2 + K is an exact float32 (fused or
not) and both products round once. Not a cryptographic generator.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
FIRST, SECOND, HIGH, GOLDEN = 0x21F0AAAD, 0x735A2D97, 0x9E3779B1, 0x9E3779B9
CUBIC = 1112070.0  # K: kurtosis 3
UNIT = float.fromhex("0x1.8cc878p-28")  # C: variance 1
LARGEST = 4.040652

Number = TypeVar("Number", int, Tensor)


class Place(NamedTuple):
    """Where a piece lies in its whole tensor: element i has the index start + (i // inner) stride + i % inner.

    A plain tensor of n elements is (0, n, n).
    """

    start: int
    inner: int
    stride: int


def mix(h: Number) -> Number:
    """A bijection of 32 bits: of a Python int, or of int64 tensors that hold them."""
    h = h ^ (h >> 16)
    h = (h * FIRST) & WORD
    h = h ^ (h >> 15)
    h = (h * SECOND) & WORD
    return h ^ (h >> 15)


def base_keys(seed: int, tensor: int, word: int) -> tuple[int, int]:
    """Two 32-bit keys of one stream of one tensor.

    Args:
        seed: 64 bits; negative ones wrap.
        tensor: its number.
        word: which stream.
    """
    h = mix(((seed & WORD) + GOLDEN) & WORD)
    h = mix(((((seed >> 32) & WORD) ^ h) + GOLDEN) & WORD)
    first = mix((h + tensor * HIGH + word * GOLDEN) & WORD)
    return first, mix((first ^ (tensor + GOLDEN)) & WORD)


def step_keys(base: tuple[int, int], step: Number) -> tuple[Number, Number]:
    """The keys of one step: Python ints of an int, 0-d int64 tensors of one (no synchronisation)."""
    first = mix((step * GOLDEN + base[0]) & WORD)
    return first, mix((first + (step ^ base[1])) & WORD)


def _signed(value: int) -> int:
    return ((value + 0x80000000) & WORD) - 0x80000000


def _int32(key: int | Tensor) -> int | Tensor:
    return key.to(torch.int32) if isinstance(key, Tensor) else _signed(key)


def indices(shape: torch.Size, place: Place, device: torch.device) -> Tensor:
    """int64 [*shape]: each element's index in the whole tensor."""
    flat = torch.arange(shape.numel(), dtype=torch.int64, device=device)
    if place.inner != place.stride:
        flat = flat // place.inner * place.stride + flat % place.inner
    return (flat + place.start).view(shape)


def words(keys: tuple[int | Tensor, int | Tensor], index: Tensor) -> Tensor:
    """int32, 32 random bits an element.

    Args:
        keys: of `step_keys`.
        index: of `indices`.
    """
    line = index >> 4
    h = line.to(torch.int32) + _int32(keys[0])
    h = h ^ ((line >> 32).to(torch.int32) * _signed(HIGH))
    h = _rounds(h, _int32(keys[1]))
    flip = _rounds((index & 15).to(torch.int32) * _signed(GOLDEN) + _int32(keys[1]), 0)
    h = (h ^ flip) * (((flip >> 16) & 0xFFFF) | (flip << 16) | 1)
    return (h ^ ((h >> 16) & 0xFFFF)) * _signed(SECOND)


def _rounds(h: Tensor, key: int | Tensor) -> Tensor:
    """`mix` of int32 numbers, with a key between its rounds."""
    h = (h ^ ((h >> 16) & 0xFFFF)) * _signed(FIRST)
    h = ((h ^ ((h >> 15) & 0x1FFFF)) + key) * _signed(SECOND)
    return h ^ ((h >> 15) & 0x1FFFF)


def normals(bits: Tensor) -> Tensor:
    """float32 normal numbers of `words`."""
    total = (bits & 255) + ((bits >> 8) & 255) + ((bits >> 16) & 255) + ((bits >> 24) & 255)
    s = (total - 510).to(torch.float32)
    return (s * (s * s + CUBIC)) * UNIT


def uniform(bits: Tensor, half: int) -> Tensor:
    """float32 in [0, 1) of 16 of the bits: half 0 or 1, so that one word serves two roundings."""
    return ((bits >> (16 * half)) & 0xFFFF).to(torch.float32) * 2.0**-16
