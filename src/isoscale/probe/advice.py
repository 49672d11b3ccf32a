"""Which format a tensor can take: what each loses on its values, and the fewest bits that lose little enough."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from isoscale.formats import BLOCKS, BlockFormat, ElementFormat, Format, by_name, error

PLAIN_FP8 = ("e4m3", "e5m2")
DEFAULT = (*(str(fmt) for fmt in BLOCKS), *PLAIN_FP8)
MIN_SQNR = 25.0
"""dB. A noise power of 0.3 % of the signal's: what 3 mantissa bits keep on values of one scale, and 1 bit does not."""


@dataclass(frozen=True)
class Loss:
    """What one format loses on one tensor.

    Args:
        format: its name, with the rule.
        bits: per value, with the share of the block's scale.
        sqnr_db: signal to noise, in dB; NaN where there is no signal.
        clipped: share of values above the top.
        flushed: share of values that become zero.
        low, normal, high: log2 of the smallest value, the smallest normal one and the largest, in the block that holds
            the tensor's largest magnitude (element formats: always).
    """

    format: str
    bits: float
    sqnr_db: float
    clipped: float
    flushed: float
    low: float
    normal: float
    high: float


@dataclass(frozen=True)
class Advice:
    """One tensor.

    Args:
        name, shape, dtype: of the tensor.
        losses: one per format, the highest SQNR first.
        format: the recommended one, or "" where none is good enough, or the tensor has no signal or an inf or NaN.
        histogram: log2 bin -> how many magnitudes lie in [2^bin, 2^(bin+1)).
        zeros: how many values are zero.
        special: how many are inf or NaN.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    losses: tuple[Loss, ...]
    format: str
    histogram: dict[int, int]
    zeros: int
    special: int


def bits_of(fmt: Format) -> float:
    """Bits per value."""
    return fmt.bits_per_value() if isinstance(fmt, BlockFormat) else float(fmt.bits)


def recommend(losses: Sequence[Loss], min_sqnr: float) -> str:
    """The format of fewest bits whose SQNR is at least `min_sqnr` dB, the highest SQNR among equals; "" for none."""
    good = [loss for loss in losses if loss.sqnr_db >= min_sqnr]
    # An SQNR of inf says that a format loses nothing here, so bits decide alone.
    return min(good, key=lambda loss: (loss.bits, -loss.sqnr_db)).format if good else ""


def _scale(fmt: Format, x: Tensor) -> float:
    """log2 of the scale of the block that holds the largest magnitude; 0 for an element format."""
    if isinstance(fmt, ElementFormat):
        return 0.0
    finite = x[x.isfinite()]
    amax = float(finite.abs().max()) if finite.numel() else 0.0
    if amax == 0:
        return 0.0
    exponent = math.frexp(amax)[1] - 1
    above = amax / 2.0**exponent > fmt.element.max / 2.0**fmt.element.emax
    if fmt.scale_rule == "amax":
        return math.log2(amax / fmt.element.max)
    if fmt.scale_rule == "ceil":
        return exponent - fmt.element.emax + (amax != 2.0**exponent)
    return exponent - fmt.element.emax + (fmt.scale_rule == "rceil" and above)


def advise(
    name: str, x: Tensor, formats: Sequence[str] = DEFAULT, *, axis: int = -1, min_sqnr: float = MIN_SQNR
) -> Advice:
    """What each format loses on a tensor, and which to take.

    Args:
        name: of the tensor.
        x: floating-point, at least one value.
        formats: names.
        axis: along which blocks lie.
        min_sqnr: dB that the recommended format keeps at least.

    Raises:
        ConfigError: an unknown format; an axis that x has not.
    """
    x = x.detach()
    values = x.reshape(1) if x.dim() == 0 else x
    losses = []
    for said in formats:
        fmt = by_name(said)
        found, at = error(values, fmt, axis=axis), _scale(fmt, values)
        element = fmt if isinstance(fmt, ElementFormat) else fmt.element
        low, normal, high = (math.log2(v) + at for v in (element.min_subnormal, element.min_normal, element.max))
        losses.append(Loss(str(fmt) if isinstance(fmt, BlockFormat) else fmt.name, bits_of(fmt), found.sqnr_db,
                           found.clipped, found.flushed, low, normal, high))  # fmt: skip
    losses.sort(key=lambda loss: (-loss.sqnr_db if loss.sqnr_db == loss.sqnr_db else math.inf, loss.bits))
    flat = values.reshape(-1).double()
    finite = flat[flat.isfinite() & (flat != 0)]
    special = int((~flat.isfinite()).sum())
    bins, counts = torch.unique(torch.frexp(finite.abs()).exponent - 1, return_counts=True)
    return Advice(
        name, tuple(x.shape), str(x.dtype).removeprefix("torch."), tuple(losses),
        "" if special else recommend(losses, min_sqnr), dict(zip(bins.tolist(), counts.tolist())),
        int((flat == 0).sum()), special,
    )  # fmt: skip
