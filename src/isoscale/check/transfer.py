"""The transfer check: does the best learning rate of the smallest model also suit the largest?

A flat coordinate check does not prove transfer, so this trains: each LR of a grid with factor 2, at the smallest and
the largest size of each axis, on paired data. Warm-up over a tenth of the steps, then linear to zero. The grid grows by
one LR on a side where an end is not 0.05 nats worse than the best.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from isoscale.check.fit import EDGE, Curve, Optimum, cost_of, optimum, shift
from isoscale.check.measure import Ready

GRID, WIDEST = (-2, -1, 0, 1, 2), 9
OCTAVES, NATS = 0.5, 0.01
RunOne = Callable[[int, int, int, int], float]
"""(width, depth, seed, octaves from --lr) -> loss."""


@dataclass(frozen=True)
class Transfer:
    """What a sweep over one axis found.

    Args:
        axis: `width` or `depth`.
        small: size that the LR is tuned at.
        large: size that it is carried to.
        best_small: fitted optimum there, in log2 LR.
        best_large: likewise.
        octaves: how far the optimum moved: (mean, low, high).
        cost: nats lost at the large size by using the small one's optimum: (mean, low, high).
        verdict: confirmed, refuted or undecided.
        edge: whether an optimum lies at an end of the LRs tried.
        curves: size -> log2 LR -> seed -> loss.
    """

    axis: str
    small: int
    large: int
    best_small: Optimum
    best_large: Optimum
    octaves: tuple[float, float, float]
    cost: tuple[float, float, float]
    verdict: str
    edge: bool
    curves: Mapping[int, Curve]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def train_loss(ready: Ready, steps: int) -> float:
    """Mean training loss of the last fifth of a short run; inf if it diverges."""
    peaks = [group["lr"] for group in ready.optimizer.param_groups]
    warm, last = max(1, steps // 10), []
    for step in range(steps):
        factor = min((step + 1) / warm, (steps - step) / (steps - warm))
        for group, peak in zip(ready.optimizer.param_groups, peaks):
            group["lr"] = peak * factor
        ready.optimizer.zero_grad(set_to_none=True)
        loss = ready.task.loss(ready.model, ready.task.batch(step))
        value = float(loss.detach())
        if not math.isfinite(value):
            return math.inf
        loss.backward()  # type: ignore[no-untyped-call]
        ready.optimizer.step()
        if step >= steps - max(1, steps // 5):
            last.append(value)
    return sum(last) / len(last)


def _ends(curve: Curve) -> tuple[bool, bool]:
    """Whether the low end and the high end of the grid are too good to be ends."""
    mean = [float(np.mean(list(curve[lr].values()))) for lr in sorted(curve)]
    return mean[0] < min(mean) + EDGE, mean[-1] < min(mean) + EDGE


def judge(small: Curve, large: Curve) -> tuple[tuple[float, float, float], tuple[float, float, float], str, bool]:
    """Octaves, cost, verdict, and whether an optimum lies at an edge.

    Confirmed: the interval of the shift lies within half an octave, or that of the cost below 0.01 nats. Refuted: both
    lie wholly beyond. An optimum at an edge of the grid decides nothing, unless the cost is already too high.
    """
    octaves, cost = shift(small, large), cost_of(large, optimum(small).at)
    edge = any(any(_ends(curve)) for curve in (small, large))
    _, low, high = octaves
    away = low > OCTAVES or high < -OCTAVES
    if away and cost[1] > NATS:
        return octaves, cost, "refuted", edge
    near = max(abs(low), abs(high)) <= OCTAVES
    return octaves, cost, "confirmed" if not edge and (near or cost[2] <= NATS) else "undecided", edge


def sweep(axis: str, models: Mapping[int, tuple[int, int]], lr: float, seeds: int, run: RunOne) -> Transfer:
    """Sweep the LR at two sizes of one axis and compare the optima.

    Args:
        axis: `width` or `depth`.
        models: size -> (width, depth), smallest and largest.
        lr: middle of the grid.
        seeds: runs per LR.
        run: trains one model, or returns the loss it is known to have.
    """
    grid = list(GRID)
    curves: dict[int, dict[float, dict[int, float]]] = {size: {} for size in models}
    while True:
        for size, model in models.items():
            for octave in grid:
                if (at := math.log2(lr) + octave) not in curves[size]:
                    curves[size][at] = {seed: run(*model, seed, octave) for seed in range(seeds)}
        low, high = (any(ends) for ends in zip(*(_ends(curve) for curve in curves.values())))
        if len(grid) >= WIDEST or not (low or high):
            break
        grid = [*([grid[0] - 1] if low else []), *grid, *([grid[-1] + 1] if high else [])]
    small, large = min(models), max(models)
    octaves, cost, verdict, edge = judge(curves[small], curves[large])
    return Transfer(axis, small, large, optimum(curves[small]), optimum(curves[large]), octaves, cost, verdict, edge,
                    curves)  # fmt: skip
