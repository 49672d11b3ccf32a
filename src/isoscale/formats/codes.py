"""Values on a format's grid to codes and back, and codes packed into bytes.

Two 4-bit codes make a byte, the first in the low half. Four 6-bit codes make a little-endian word of 24 bits, the first
lowest, in three bytes. Codes of a row are padded with 0 to whole groups.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from isoscale.formats.element import ElementFormat
from isoscale.formats.grid import LAYOUT

GROUP = {4: 2, 6: 4, 8: 1}


def to_codes(values: Tensor, fmt: ElementFormat) -> Tensor:
    """Codes of values.

    Args:
        values: float32 or float64, each a finite value of the format or (becoming the format's NaN, or 0 where it has
            none) NaN.
        fmt: of at most 16 bits.

    Returns:
        int32 codes of the same shape.
    """
    wide, word, field, bias = LAYOUT[values.dtype == torch.float64]
    m = fmt.mantissa_bits
    words = values.view(word)
    magnitude = values.abs()
    if fmt.layout == "scale":
        codes = torch.where(values < 2.0**-126, 0, (words >> field) - bias + fmt.bias)
        return torch.where(values.isnan(), 255, codes).to(torch.int32)
    nan = fmt.nan_code or 0
    if fmt.layout == "twos":
        codes = (torch.nan_to_num(values) * 2.0**m).to(torch.int32) & (fmt.code_count - 1)
        return torch.where(values.isnan(), nan, codes)
    if fmt.emin > 1 - bias:
        small = (torch.nan_to_num(magnitude).clamp(max=fmt.min_normal) * 2.0 ** (m - fmt.emin)).to(torch.int32)
        unsigned = words & ~(-1 << (8 * wide.itemsize - 1))
        normal = ((unsigned >> (field - m)) - ((bias - fmt.bias) << m)).to(torch.int32)
        codes = torch.where(magnitude < fmt.min_normal, small, normal)
    else:  # bf16: the top of the word
        codes = ((words >> (field - m)) & (fmt.code_count // 2 - 1)).to(torch.int32)
    codes = codes + (words < 0).to(torch.int32) * (fmt.code_count // 2)
    if not fmt.has_negative_zero:
        codes = torch.where(values == 0, 0, codes)
    return torch.where(values.isnan(), nan, codes)


def from_codes(codes: Tensor, fmt: ElementFormat) -> Tensor:
    """Values of codes, float32.

    Args:
        codes: integers in [0, code_count).
        fmt: of at most 16 bits.
    """
    codes = codes.to(torch.int32)
    m, half = fmt.mantissa_bits, fmt.code_count // 2
    if fmt.layout == "scale":
        bits = torch.where(codes == 0, 1 << 22, codes << 23)
        return torch.where(codes == 255, math.nan, bits.view(torch.float32))
    if fmt.layout == "twos":
        return (codes - (codes >= half).to(torch.int32) * fmt.code_count).to(torch.float32) * 2.0**-m
    low = codes & (half - 1)
    if fmt.emin > -126:
        normal = ((low << (23 - m)) + ((127 - fmt.bias) << 23)).view(torch.float32)
        value = torch.where(low < (1 << m), low.to(torch.float32) * fmt.min_subnormal, normal)
    else:
        value = (low << (23 - m)).view(torch.float32)
    if fmt.specials == "ieee":
        top = half - (1 << m)
        value = torch.where(low > top, math.nan, torch.where(low == top, math.inf, value))
    elif fmt.specials == "fn":
        value = torch.where(low == half - 1, math.nan, value)
    elif fmt.specials == "fnuz":
        value = torch.where(codes == half, math.nan, value)
    return torch.where(codes >= half, -value, value)


def row_bytes(count: int, bits: int) -> int:
    """Bytes that a row of `count` codes of `bits` bits takes."""
    group = GROUP[bits]
    return -(-count // group) * group * bits // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Packs codes along the last dimension.

    Args:
        codes: [..., n] integers below 2^bits.
        bits: 4, 6 or 8.

    Returns:
        uint8 [..., row_bytes(n, bits)].
    """
    if bits == 8:
        return codes.to(torch.uint8)
    codes = codes.to(torch.int32)
    extra = -codes.shape[-1] % GROUP[bits]
    if extra:
        codes = torch.nn.functional.pad(codes, (0, extra))
    part = codes.reshape(*codes.shape[:-1], codes.shape[-1] // GROUP[bits], GROUP[bits])
    if bits == 4:
        return (part[..., 0] | part[..., 1] << 4).to(torch.uint8)
    word = part[..., 0] | part[..., 1] << 6 | part[..., 2] << 12 | part[..., 3] << 18
    return torch.stack((word & 255, word >> 8 & 255, word >> 16), -1).to(torch.uint8).flatten(-2)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The codes back, one to a byte.

    Args:
        packed: uint8 [..., bytes].
        bits: 4, 6 or 8.
        count: how many codes of each row to keep.

    Returns:
        uint8 [..., count].
    """
    if bits == 8:
        return packed[..., :count]
    if bits == 4:
        codes = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
        return codes[..., :count]
    part = packed.to(torch.int32).reshape(*packed.shape[:-1], packed.shape[-1] // 3, 3)
    word = part[..., 0] | part[..., 1] << 8 | part[..., 2] << 16
    codes = torch.stack((word & 63, word >> 6 & 63, word >> 12 & 63, word >> 18), -1).flatten(-2)
    return codes[..., :count].to(torch.uint8)
