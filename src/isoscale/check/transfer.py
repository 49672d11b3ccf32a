"""The transfer check: does the best learning rate of the smallest model also suit the largest?

A flat coordinate check does not prove transfer, so this trains: each LR of a grid with factor 2, at the smallest and
the largest size of each axis, on paired data. Warm-up over a tenth of the steps, then linear to zero. The grid grows on
a side until the end there is 0.05 nats worse than the best.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from isoscale.check.fit import EDGE, Curve, Optimum, cost_of, optimum, shift
from isoscale.check.prepare import Ready

START, WIDEST, EXPECTED = (-1, 0, 1), 9, 6
OCTAVES, NATS = 0.5, 0.01


@dataclass(frozen=True)
class Verdict:
    """What two LR curves say of each other.

    Args:
        best_small: fitted optimum of the smaller model, in log2 LR.
        best_large: of the larger.
        octaves: how far the optimum moved: (mean, low, high).
        cost: nats lost at the large size by using the small one's optimum: (mean, low, high).
        verdict: confirmed, refuted or undecided.
        edge: whether an optimum lies at an end of the LRs tried.
        learned: whether both models got below the baseline.
    """

    best_small: Optimum
    best_large: Optimum
    octaves: tuple[float, float, float]
    cost: tuple[float, float, float]
    verdict: str
    edge: bool
    learned: bool


@dataclass(frozen=True)
class Transfer:
    """What a sweep over one axis found.

    Args:
        axis: `width` or `depth`.
        small: size that the LR is tuned at.
        large: size that it is carried to.
        found: the comparison.
        curves: size -> log2 LR -> seed -> loss.
    """

    axis: str
    small: int
    large: int
    found: Verdict
    curves: Mapping[int, Curve]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, flat."""
        sizes = {"axis": self.axis, "small": self.small, "large": self.large}
        return {**sizes, **asdict(self.found), "curves": {size: dict(curve) for size, curve in self.curves.items()}}


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


def bracket(start: list[int], lr: float, run: Callable[[int], dict[int, float]]) -> dict[float, dict[int, float]]:
    """A curve around its minimum: LRs are added on a side until its end is 0.05 nats worse, nine at most."""
    grid, found = list(start), {octave: run(octave) for octave in start}
    while True:
        curve = {math.log2(lr) + octave: found[octave] for octave in sorted(grid)}
        low, high = _ends(curve)
        if len(grid) >= WIDEST or not (low or high):
            return curve
        grid += [min(grid) - 1] if low else [max(grid) + 1]
        found[grid[-1]] = run(grid[-1])


def judge(small: Curve, large: Curve, baseline: float | None) -> Verdict:
    """What two curves say.

    Confirmed: the interval of the shift lies within half an octave, or that of the cost below 0.01 nats. Refuted: both
    lie wholly beyond. Undecided where an optimum is at an edge (unless the cost is too high already), or a model has
    not learned more than the baseline.
    """
    best = optimum(small), optimum(large)
    octaves, cost = shift(small, large), cost_of(large, best[0].at)
    edge = any(any(_ends(curve)) for curve in (small, large))
    learned = baseline is None or max(one.loss for one in best) < baseline
    _, low, high = octaves
    near = max(abs(low), abs(high)) <= OCTAVES or cost[2] <= NATS
    away = (low > OCTAVES or high < -OCTAVES) and cost[1] > NATS
    said = "refuted" if away else "confirmed" if near and not edge else "undecided"
    return Verdict(*best, octaves, cost, said if learned else "undecided", edge, learned)


def sweep(
    axis: str, sizes: tuple[int, int], lr: float, baseline: float | None, run: Callable[[int, int], dict[int, float]]
) -> Transfer:
    """Sweep the LR at two sizes of one axis and compare the optima.

    Args:
        axis: `width` or `depth`.
        sizes: the smaller and the larger.
        lr: where the grid starts.
        baseline: loss below which a model has learned something; None if unknown.
        run: (size, octaves from `lr`) -> seed -> loss.
    """
    small, large = sizes
    curve = bracket(list(START), lr, lambda octave: run(small, octave))
    near = round(optimum(curve).at - math.log2(lr))
    other = bracket([near - 1, near, near + 1], lr, lambda octave: run(large, octave))
    return Transfer(axis, small, large, judge(curve, other, baseline), {small: curve, large: other})
