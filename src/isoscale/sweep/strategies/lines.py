"""Search strategies behind one small protocol: given what is known, which points come next; None when done.

`lr`: one line over the learning rate. `independent` (u-muP, arXiv 2407.17465 section 3.1): the LR line; then, at
the best LR, one line per other hyperparameter; then all winners together. `random`: log-uniform in the box.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

from isoscale._base.errors import ConfigError, did_you_mean
from isoscale._base.rng import generator
from isoscale.config import SweepSection
from isoscale.sweep.space import Point, centre_out

Results = Sequence[tuple[Point, float]]
"""Finished points and their mean loss over the seeds."""


class Strategy(Protocol):
    """What a strategy is."""

    def next_points(self, phase: int, results: Results) -> list[Point] | None:
        """Points of phase 0, 1, ...; None when the search is over.

        Args:
            phase: how many phases are complete.
            results: everything measured so far.
        """
        ...


def best(results: Results) -> tuple[Point, float]:
    """The point of lowest finite loss.

    Raises:
        ConfigError: every run diverged.
    """
    finite = [(point, loss) for point, loss in results if math.isfinite(loss)]
    if not finite:
        raise ConfigError("every run of the sweep diverged", key="sweep.space", hint="lower learning rates")
    return min(finite, key=lambda pair: pair[1])


class LrLine:
    """One line over the learning rate."""

    def __init__(self, section: SweepSection) -> None:
        if "lr" not in section.space:
            raise ConfigError(
                "the LR line search needs values for lr",
                key="sweep.space.lr",
                hint="--set 'sweep.space={lr=[0.5, 1.0, 2.0]}'",
            )
        self.values = section.space["lr"]

    def next_points(self, phase: int, results: Results) -> list[Point] | None:
        """See `Strategy`."""
        return [{"lr": value} for value in centre_out(self.values)] if phase == 0 else None


class Independent:
    """LR line, one line per other HP at the best LR, then the winners together."""

    def __init__(self, section: SweepSection) -> None:
        self.line, self.space = LrLine(section), section.space

    def next_points(self, phase: int, results: Results) -> list[Point] | None:
        """See `Strategy`."""
        if phase == 0:
            return self.line.next_points(0, results)
        lines = [(point, loss) for point, loss in results if set(point) == {"lr"}]
        start, floor = best(lines)
        others = [name for name in self.space if name != "lr"]
        if phase == 1 and others:
            return [{**start, name: value} for name in others for value in centre_out(self.space[name])]
        if phase == 2 and others:
            winners = dict(start)
            for name in others:
                own = [(point, loss) for point, loss in results if set(point) == {"lr", name}]
                if own and best(own)[1] < floor:
                    winners[name] = best(own)[0][name]
            return [winners] if len(winners) > 2 else None
        return None


class Random:
    """Log-uniform between the ends of each HP's values."""

    def __init__(self, section: SweepSection, seed: int) -> None:
        if section.trials is None:
            raise ConfigError(
                "random search needs the number of points", key="sweep.trials", hint="--set sweep.trials=20"
            )
        self.trials, self.space, self.seed = section.trials, section.space, seed

    def next_points(self, phase: int, results: Results) -> list[Point] | None:
        """See `Strategy`."""
        if phase > 0:
            return None
        draw = generator(self.seed, "sweep", "random")
        return [
            {name: float(math.exp(draw.uniform(math.log(min(v)), math.log(max(v))))) for name, v in self.space.items()}
            for _ in range(self.trials)
        ]


def make(section: SweepSection, seed: int) -> Strategy:
    """The strategy that a config names.

    Raises:
        ConfigError: unknown, or its settings are missing.
    """
    table: Mapping[str, type[LrLine] | type[Independent]] = {"lr": LrLine, "independent": Independent}
    if section.strategy == "random":
        return Random(section, seed)
    ignored = [name for name in section.space if name != "lr"]
    if section.strategy == "lr" and "lr" in section.space and ignored:
        raise ConfigError(
            f"the LR line tries lr only, not {', '.join(ignored)}", key="sweep.space", value=ignored,
            hint="sweep.strategy=independent tries one line per hyperparameter",
        )  # fmt: skip
    if section.strategy not in table:
        raise ConfigError(
            f"unknown strategy {section.strategy!r}",
            key="sweep.strategy",
            value=section.strategy,
            hint=did_you_mean(section.strategy, [*table, "random"]),
        )
    return table[section.strategy](section)
