"""Who has won, and how sure that is: pure functions of losses by point and seed.

The best of many noisy trials is partly the luckiest. So the best few points are trained again with seeds that the
search has not seen, and those runs alone decide; their spread gives a 95 % interval of each mean, and of the paired
difference between the best and the second (same seeds, same data).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from isoscale.sweep.space import Point


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % t interval; both ends are nan for one value, infinite where a run diverged."""

    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Contender:
    """A point and its fresh-seed runs."""

    point: Point
    losses: Mapping[int, float]
    interval: Interval


@dataclass(frozen=True)
class Confidence:
    """What the confirmation found.

    Args:
        contenders: by mean, best first.
        gap: second minus best, paired by seed; None with one contender.
    """

    contenders: tuple[Contender, ...]
    gap: Interval | None

    @property
    def settled(self) -> bool:
        """Whether the interval of the gap leaves zero out."""
        return self.gap is not None and self.gap.low > 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        contenders = [{"point": dict(one.point), "losses": {str(seed): loss for seed, loss in one.losses.items()},
                       **asdict(one.interval)} for one in self.contenders]  # fmt: skip
        return {"contenders": contenders, "gap": asdict(self.gap) if self.gap else None, "settled": self.settled}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Confidence:
        """What `to_dict` made; numbers that JSON has not as text."""
        found = [Contender(one["point"], {int(seed): float(loss) for seed, loss in one["losses"].items()},
                           _interval_of(one)) for one in data["contenders"]]  # fmt: skip
        return Confidence(tuple(found), _interval_of(data["gap"]) if data["gap"] else None)


def _interval_of(data: Mapping[str, Any]) -> Interval:
    return Interval(float(data["mean"]), float(data["low"]), float(data["high"]), int(data["count"]))


def student(df: int) -> float:
    """The 97.5 % quantile of Student's t (Abramowitz and Stegun 26.7.3 and 26.7.4, inverted by bisection)."""

    def inside(t: float) -> float:
        theta = math.atan(t / math.sqrt(df))
        term = total = math.cos(theta) if df % 2 else 1.0
        for k in range(3 if df % 2 else 2, df - 1, 2):
            term *= (k - 1) / k * math.cos(theta) ** 2
            total += term
        if df == 1:
            return 2 * theta / math.pi
        return 2 / math.pi * (theta + math.sin(theta) * total) if df % 2 else math.sin(theta) * total

    low, high = 1.0, 16.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < 0.95 else (low, middle)
    return high


def interval(values: Sequence[float]) -> Interval:
    """The mean and its 95 % interval."""
    n = len(values)
    if not n or not all(map(math.isfinite, values)):
        return Interval(math.inf if n else math.nan, -math.inf, math.inf, n)
    mean = sum(values) / n
    if n == 1:
        return Interval(mean, math.nan, math.nan, 1)
    half = student(n - 1) * math.sqrt(sum((x - mean) ** 2 for x in values) / (n - 1) / n)
    return Interval(mean, mean - half, mean + half, n)


def candidates(means: Sequence[tuple[Point, float]], count: int) -> list[Point]:
    """The best points of a search, finite ones only, best first."""
    finite = sorted((pair for pair in means if math.isfinite(pair[1])), key=lambda pair: pair[1])
    return [point for point, _ in finite[:count]]


def fresh_seeds(used: Sequence[int], count: int) -> list[int]:
    """Seeds that nobody has used."""
    first = max(used) + 1
    return list(range(first, first + count))


def choose(runs: Sequence[tuple[Point, Mapping[int, float]]]) -> Confidence:
    """The contenders in the order of their means over fresh seeds.

    Args:
        runs: point, and its loss by seed; points without a loss are left out.
    """
    found = [Contender(point, dict(losses), interval(list(losses.values()))) for point, losses in runs if losses]
    found.sort(key=lambda one: one.interval.mean)
    if len(found) < 2:
        return Confidence(tuple(found), None)
    best, second = found[0].losses, found[1].losses
    return Confidence(tuple(found), interval([second[seed] - best[seed] for seed in best if seed in second]))
