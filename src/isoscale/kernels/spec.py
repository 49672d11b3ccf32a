"""What a cast is, in plain numbers: all that a kernel needs to know of a format.

Kernels know numbers, `isoscale.formats` knows names; so the formats may call the kernels.
"""

from __future__ import annotations

import math
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


class NormSpec(NamedTuple):
    """A norm without gain whose result is cast: y = x / r for each row.

    Args:
        kind: `mx2` or `mx1`, MXNorm with p = 2 or 1 (arXiv 2603.13180): r = (sum_k w_k m_k^p)^(1/p) + eps, where m_k is
            the largest magnitude of block k; `rms`: r = sqrt(mean(x^2) + eps).
        eps: not negative.
        w_full: weight of all blocks but the last one: n / D x a(p, n)^p for blocks of n values in a row of D.
        w_last: weight of the last block, which may be a short one.
        clamp: bound of |y| before the cast; inf for none.
        ride: cast x itself and return r beside, so that 1 / r can ride as a factor of the rows of the next matmul.
        stat: values of the blocks whose maxima make r, a divisor of the scales' blocks, and whose weights are given; 0:
            the scales' own.
    """

    kind: str
    eps: float
    w_full: float = 0.0
    w_last: float = 0.0
    clamp: float = math.inf
    ride: bool = False
    stat: int = 0
