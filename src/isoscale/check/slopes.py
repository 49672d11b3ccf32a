"""How a number changes with size: the slope of log2 value against log2 size, with its error over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Slope:
    """An exponent.

    Args:
        slope: of log2 value against log2 size, mean over seeds; NaN where a value is 0 or not finite.
        stderr: standard error of that mean; with one seed that of the line through the sizes.
    """

    slope: float
    stderr: float


def fit_slope(values: Mapping[tuple[int, int], float]) -> Slope:
    """The slope through (size, seed) -> value.

    Args:
        values: every seed has every size; at least two sizes.
    """
    sizes = sorted({size for size, _ in values})
    seeds = sorted({seed for _, seed in values})
    table = np.array([[values[size, seed] for size in sizes] for seed in seeds], dtype=float)
    if not np.isfinite(table).all() or (table <= 0).any():
        return Slope(math.nan, math.nan)
    x, y = np.log2(np.array(sizes, dtype=float)), np.log2(table)
    x = x - x.mean()
    slopes = y @ x / (x @ x)
    if len(seeds) > 1:
        return Slope(float(slopes.mean()), float(slopes.std(ddof=1) / math.sqrt(len(seeds))))
    if len(sizes) < 3:
        return Slope(float(slopes[0]), math.nan)
    rest = y[0] - y[0].mean() - slopes[0] * x
    return Slope(float(slopes[0]), float(math.sqrt(rest @ rest / (len(sizes) - 2) / (x @ x))))
