"""Statistics of learning-rate curves: the fitted optimum with its interval, and what another LR would cost.

A curve is log2 LR -> seed -> loss. Losses above 20 count as 20, so that a diverged run is bad and not infinite.
Intervals are 95 % of a bootstrap over seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Curve = Mapping[float, Mapping[int, float]]
Floats = NDArray[np.float64]
WORST, EDGE = 20.0, 0.05


@dataclass(frozen=True)
class Optimum:
    """A fitted optimum with its bootstrap interval (95 %).

    Args:
        at: log2 LR of the fitted minimum.
        low: lower end of its interval.
        high: upper end.
        loss: fitted loss there.
        interior: whether both ends of the grid are at least 0.05 nats worse than the minimum.
    """

    at: float
    low: float
    high: float
    loss: float
    interior: bool


@dataclass(frozen=True)
class Basin:
    """A parabola through the points around a curve's minimum.

    Args:
        at: log2 LR of its vertex, inside the grid.
        loss: there.
        curvature: nats per octave squared; 0 when no parabola fits.
        low: lowest log2 LR that was fitted.
        high: highest.
    """

    at: float
    loss: float
    curvature: float
    low: float
    high: float


def basin(x: Floats, y: Floats) -> Basin:
    """Least-squares parabola through up to five points around the lowest; points 0.35 above it follow the divergence
    cliff, not the basin, and are left out while three remain."""
    best = int(np.argmin(y))
    lo, hi = max(0, min(best - 2, len(x) - 5)), min(len(x), max(best + 3, 5))
    xs, ys = x[lo:hi], y[lo:hi]
    near = ys < ys.min() + 0.35
    if near.sum() >= 3:
        xs, ys = xs[near], ys[near]
    else:
        xs, ys = x[max(0, best - 1) : best + 2], y[max(0, best - 1) : best + 2]
    if len(xs) >= 3:
        a, b, c = np.polyfit(xs, ys, 2)
        if a > 0:
            at = float(np.clip(-b / (2 * a), x[0], x[-1]))
            return Basin(at, float(np.polyval((a, b, c), at)), float(a), float(xs[0]), float(xs[-1]))
    return Basin(float(x[best]), float(y[best]), 0.0, float(x[best]), float(x[best]))


def _seeds(*curves: Curve) -> list[int]:
    return sorted({seed for curve in curves for by in curve.values() for seed in by})


def _means(curve: Curve, seeds: Sequence[int]) -> tuple[Floats, Floats]:
    """log2 LR and mean loss over the seeds given (repeats count), sorted by LR."""
    x = np.array(sorted(curve))
    y = []
    for lr in x:
        by = curve[lr]
        have = [min(by[seed], WORST) for seed in seeds if seed in by] or [min(value, WORST) for value in by.values()]
        y.append(float(np.mean(have)))
    return x, np.array(y)


def _interval(one: Callable[[list[int]], float], seeds: list[int], start: int, rounds: int) -> tuple[float, float]:
    rng = np.random.default_rng(start)
    picks = [tuple(sorted(int(seed) for seed in rng.choice(seeds, len(seeds)))) for _ in range(rounds)]
    known = {pick: one(list(pick)) for pick in set(picks)}  # few seeds have few combinations
    draws = [known[pick] for pick in picks]
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


def optimum(curve: Curve, rounds: int = 500) -> Optimum:
    """Quadratic in log2 LR through seed means, near the minimum; seeds resampled for the interval."""
    seeds = _seeds(curve)
    x, mean = _means(curve, seeds)
    fit = basin(x, mean)
    low, high = _interval(lambda picked: basin(*_means(curve, picked)).at, seeds, 0, rounds)
    interior = bool(mean[0] >= fit.loss + EDGE and mean[-1] >= fit.loss + EDGE)
    return Optimum(fit.at, low, high, fit.loss, interior)


def shift(small: Curve, large: Curve, rounds: int = 500) -> tuple[float, float, float]:
    """How far the optimum moved from `small` to `large`, in octaves; (mean, low, high), seeds resampled in pairs."""
    seeds = _seeds(small, large)

    def one(picked: Sequence[int]) -> float:
        return basin(*_means(large, picked)).at - basin(*_means(small, picked)).at

    return one(seeds), *_interval(one, seeds, 0, rounds)


def cost_of(curve: Curve, at: float, rounds: int = 500) -> tuple[float, float, float]:
    """Loss at the LR `at` minus the curve's own best; (mean, low, high) over seed resamples.

    Inside the fitted basin both are read off the parabola (linear interpolation between octaves would charge a cost
    even to the curve's own optimum); outside it, `at` is interpolated between the measured points.
    """
    seeds = _seeds(curve)

    def one(picked: Sequence[int]) -> float:
        x, values = _means(curve, picked)
        fit = basin(x, values)
        if fit.low <= at <= fit.high:
            return fit.curvature * (at - fit.at) ** 2
        return float(np.interp(at, x, values)) - min(fit.loss, float(values.min()))

    return one(seeds), *_interval(one, seeds, 1, rounds)
