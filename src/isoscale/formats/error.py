"""What a cast loses: signal to quantisation noise, and the shares clipped and flushed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from isoscale._base.errors import ConfigError
from isoscale.formats import reference
from isoscale.formats.block import Format
from isoscale.formats.cast import cast_of, facts_of, fake_cast
from isoscale.formats.layout import to_blocks, to_matrix
from isoscale.formats.rounding import Stochastic, resolve


@dataclass(frozen=True)
class CastError:
    """What a cast loses.

    Args:
        format: printed name, with its rule.
        sqnr_db: 10 log10(sum x^2 / sum (x - cast(x))^2), in dB; inf where nothing is lost, NaN for an all-zero tensor.
        clipped: share of elements whose magnitude is above the largest value (of the format, or of its block).
        flushed: share of elements that are not zero and become zero.
        special: share of elements that are, or whose block becomes, NaN; they count nowhere else.
        block_sqnr_db, block_clipped, block_flushed: the same for each block, [L, Rb, K] float64 (see `layout`).
    """

    format: str
    sqnr_db: float
    clipped: float
    flushed: float
    special: float
    block_sqnr_db: Tensor
    block_clipped: Tensor
    block_flushed: Tensor

    def __str__(self) -> str:
        return (
            f"{self.format}: SQNR {self.sqnr_db:.1f} dB, clipped {self.clipped:.2%}, flushed {self.flushed:.2%}"
            + (f", NaN {self.special:.2%}" if self.special else "")
        )  # fmt: skip


def error(
    x: Tensor, fmt: Format | str, *, axis: int = -1, scale_rule: str | None = None,
    rounding: str | Stochastic = "nearest-even", seed: int | Tensor | None = None,
) -> CastError:  # fmt: skip
    """Measures what `fake_cast` with the same arguments loses, in float64.

    The arguments are those of `fake_cast`.

    Raises:
        ConfigError: as `fake_cast`.
    """
    facts = facts_of(x, fmt, scale_rule)
    x = x.detach()
    name, noise = resolve(rounding, seed, tuple(x.shape))
    cast = cast_of(x, facts, axis, name, noise)
    if x.numel() == 0:
        none = torch.zeros((0, 0, 0), dtype=torch.float64)
        return CastError(facts.name, math.nan, 0.0, 0.0, 0.0, none, none, none)
    if x.is_meta:
        raise ConfigError("a meta tensor holds no values to measure", key="x", value=tuple(x.shape))
    y = fake_cast(x, fmt, axis=axis, scale_rule=scale_rule, rounding=rounding, seed=seed)
    inside = reference.kept(x, cast, None, top=True)

    def blocks(part: Tensor) -> Tensor:
        return to_blocks(to_matrix(part.to(torch.float64), cast.view), cast.spec.rows, cast.spec.cols)

    good = y.isfinite() & x.isfinite() if cast.spec.scale != "none" else ~x.isnan()
    finite = good & x.isfinite()
    signal = blocks(torch.where(finite, x.double().square(), 0.0)).sum((2, 4))
    noise_power = blocks(torch.where(finite, (x.double() - y.double()).square(), 0.0)).sum((2, 4))
    count = blocks(torch.ones_like(x)).sum((2, 4))
    clipped = blocks(~inside & good).sum((2, 4))
    flushed = blocks((x != 0) & (y == 0) & good).sum((2, 4))
    return CastError(
        facts.name, float(_db(signal.sum(), noise_power.sum())), float(clipped.sum()) / x.numel(),
        float(flushed.sum()) / x.numel(), 1.0 - float(good.sum()) / x.numel(),
        _db(signal, noise_power), clipped / count, flushed / count,
    )  # fmt: skip


def _db(signal: Tensor, noise: Tensor) -> Tensor:
    return 10.0 * (signal / noise).log10()
