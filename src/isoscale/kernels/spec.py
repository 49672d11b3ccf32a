"""What a cast is, in plain numbers: all that a kernel needs to know of a format.

Kernels know numbers, `isoscale.formats` knows names; so the formats may call the kernels.
"""

from __future__ import annotations

from typing import NamedTuple


class CastSpec(NamedTuple):
    """One cast of a matrix whose blocks lie along its columns.

    The elements' grid is that of sign, exponent and mantissa with subnormals; their codes are sign and magnitude, or
    two's complement of magnitude x 2^mantissa_bits.

    Args:
        bits: of a code: 4, 6 or 8.
        mantissa_bits: explicit ones.
        bias: of the exponent field.
        emin: exponent of the smallest normal value.
        emax: exponent of the largest value.
        max: the largest value.
        twos: codes are two's complement; then -0 becomes 0.
        scale: `none`, `e8m0`, `e4m3` (with a tensor scale) or `fp32`.
        rule: `floor`, `ceil`, `even`, `rceil` or `amax`.
        rows: extent of a block across the axis.
        cols: extent of a block along the axis.
    """

    bits: int
    mantissa_bits: int
    bias: int
    emin: int
    emax: int
    max: float
    twos: bool
    scale: str
    rule: str
    rows: int
    cols: int
