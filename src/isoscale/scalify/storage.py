"""How optimiser state and weights are kept between steps: wide or fp16 under one scale, or fp8 under one per block.

Each step works in float32 data and stores the result rounded. Stochastically by default: an average with beta2 = 0.999
moves by less than half an ulp of fp16 most of the time, and rounding to nearest then stalls it, with a bias. (The first
average, with beta1 = 0.9, is in no such danger but in fp8.) The random bits are a hash of (seed, element): nothing is
stored, a resumed run draws the same ones, and the compiler makes one pointwise kernel of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from isoscale.scalify import scales
from isoscale.scalify.pair import Pair, under

BLOCK = 128
"""Elements of one fp8 block."""


@dataclass(frozen=True)
class Kind:
    """A way to keep numbers.

    Attributes:
        dtype: of the data.
        mantissa_bits: explicit ones.
        emin: exponent of the smallest normal number.
        top: the largest number.
        block: elements under one scale; 0 for one scale in all.
    """

    dtype: torch.dtype
    mantissa_bits: int
    emin: int
    top: float
    block: int = 0

    @property
    def bytes_per_element(self) -> float:
        """Including block scales."""
        return self.dtype.itemsize + (4.0 / self.block if self.block else 0.0)


KINDS = {
    "fp32": Kind(torch.float32, 23, -126, 3.4028234663852886e38),
    "bf16": Kind(torch.bfloat16, 7, -126, 3.3895313892515355e38),
    "fp16": Kind(torch.float16, 10, -14, 65504.0),
    "fp8": Kind(torch.float8_e4m3fn, 3, -6, 448.0, BLOCK),
}


def random_bits(shape: torch.Size, seed: Tensor, device: torch.device) -> Tensor:
    """32 bits for each element, int32: a hash of (seed, place).

    Args:
        shape: of the result.
        seed: 0-d int32.
        device: of the result.
    """
    n = 1
    for size in shape:
        n *= size
    h = torch.arange(n, dtype=torch.int32, device=device) * -1640531527 + seed
    for shift, factor in ((16, -2048144789), (13, -1028477387)):  # the finaliser of MurmurHash3
        h = (h ^ ((h >> shift) & ((1 << (32 - shift)) - 1))) * factor
    return (h ^ ((h >> 16) & 0xFFFF)).view(shape)


def uniform(bits: Tensor, half: int) -> Tensor:
    """Numbers in [0, 1) of 16 of the bits: half 0 or 1, so that one hash serves two roundings."""
    return ((bits >> (16 * half)) & 0xFFFF).to(torch.float32) * 2.0**-16


def rounded(x: Tensor, kind: Kind, u: Tensor | None) -> Tensor:
    """float32 to the kind's dtype, saturating; stochastically with u in [0, 1), else to nearest, ties to even."""
    if kind.dtype == torch.float32:
        return x
    if u is not None:
        size = scales.floor2(x.abs())
        assert isinstance(size, Tensor)
        quantum = size.clamp(min=2.0**kind.emin) * 2.0**-kind.mantissa_bits
        x = torch.floor(x / quantum + u) * quantum
    return x.clamp(-kind.top, kind.top).to(kind.dtype)


def _blocks(x: Tensor, size: int) -> Tensor:
    flat = x.reshape(-1)
    return torch.nn.functional.pad(flat, (0, -flat.numel() % size)).view(-1, size)


def store(pair: Pair, kind: Kind, u: Tensor | None) -> Pair:
    """A pair with float32 data as it is kept: fp8 data become [blocks, 128], padded with zeros, scales [blocks, 1]."""
    if not kind.block:
        return Pair(rounded(pair.data, kind, u), pair.scale)
    rows = _blocks(pair.data, kind.block)
    top = rows.abs().amax(1, keepdim=True)
    block = scales.floor2(top * (2.0 / kind.top))  # the largest comes to lie in [224, 448)
    assert isinstance(block, Tensor)
    data = rounded(
        rows / torch.where(block == 0, 1.0, block), kind, None if u is None else _blocks(u, kind.block)
    )  # fmt: skip
    return Pair(data, block * pair.scale)


def load(pair: Pair, shape: torch.Size) -> Pair:
    """What `store` kept, as float32 data of the tensor's shape under one scale."""
    if pair.data.shape == shape and not (isinstance(pair.scale, Tensor) and pair.scale.dim()):
        return Pair(pair.data.float(), pair.scale)
    s = pair.scale.amax()  # type: ignore[union-attr]
    flat = under(Pair(pair.data.float(), pair.scale), torch.where(s == 0, 1.0, s)).reshape(-1)
    return Pair(flat[: shape.numel()].view(shape), s)


def empty(shape: torch.Size, kind: Kind, device: torch.device) -> Pair:
    """State of zeros, under any scale."""
    if not kind.block:
        return Pair(torch.zeros(shape, dtype=kind.dtype, device=device), torch.zeros((), device=device))
    blocks = -(-shape.numel() // kind.block)
    data = torch.zeros(blocks, kind.block, device=device).to(kind.dtype)
    return Pair(data, torch.zeros(blocks, 1, device=device))


def bytes_of(value: Any) -> int:
    """Bytes of a stored pair, its scales included."""
    return int(value.data.nbytes + (value.scale.nbytes if isinstance(value.scale, Tensor) else 0))
