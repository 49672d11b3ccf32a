"""Searches along lines: the learning rate alone, one line per hyperparameter, and coordinate by coordinate.

`lr`: one line over the learning rate. `independent` (u-muP, arXiv 2407.17465, section 3.1): the LR line; then, at the
best LR, one line per other hyperparameter; then all winners together. `coordinate`: one number after the other, from
where the last one ended, again and again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import count as endless

from isoscale._base.errors import ConfigError
from isoscale.config import SweepSection
from isoscale.sweep.space import Dim, Point, Space, centre_out, identity
from isoscale.sweep.strategies.base import Trial, lowest


class _Phases:
    """A strategy in phases: each is known once all points of those before are done."""

    def ask(self, trials: Sequence[Trial], count: int) -> list[Point] | None:
        """See `Strategy`: all of a phase at once."""
        known = {identity(trial.point, 0): trial for trial in trials}
        for phase in endless():
            points = self._phase(phase, [trial for trial in trials if trial.state != "open"])
            if points is None:
                return None
            fresh = [point for point in points if identity(point, 0) not in known]
            if fresh:
                return fresh
            if any(known[identity(point, 0)].state == "open" for point in points):
                return []
        raise AssertionError

    def _phase(self, phase: int, done: Sequence[Trial]) -> list[Point] | None:
        """The points of one phase, from the results of those before; None past the last."""
        raise AssertionError(phase, done)


class LrLine(_Phases):
    """One line over the learning rate."""

    def __init__(self, section: SweepSection) -> None:
        if "lr" not in section.space:
            raise ConfigError("the LR line search needs values for lr", key="sweep.space.lr",
                              hint="--set 'sweep.space={lr=[0.5, 1.0, 2.0]}'")  # fmt: skip
        self.values = section.space["lr"]

    def _phase(self, phase: int, done: Sequence[Trial]) -> list[Point] | None:
        return [{"lr": value} for value in centre_out(self.values)] if phase == 0 else None


class Independent(_Phases):
    """LR line, one line per other HP at the best LR, then the winners together.

    A value that the config has already is not tried: it is the best LR's own run.
    """

    def __init__(self, section: SweepSection, space: Space) -> None:
        start = {dim.name: dim.start for dim in space.dims}
        self.line = LrLine(section)
        self.space = {name: tuple(x for x in values if name == "lr" or not math.isclose(x, start[name], rel_tol=1e-12))
                      for name, values in section.space.items()}  # fmt: skip

    def _phase(self, phase: int, done: Sequence[Trial]) -> list[Point] | None:
        if phase == 0:
            return self.line._phase(0, done)
        best = lowest([trial for trial in done if set(trial.point) == {"lr"}])
        others = [name for name in self.space if name != "lr"]
        if phase == 1 and others:
            return [{**best.point, name: value} for name in others for value in centre_out(self.space[name])]
        if phase == 2 and others:
            winners = dict(best.point)
            for name in others:
                own = [trial for trial in done if set(trial.point) == {"lr", name} and math.isfinite(trial.loss)
                       and trial.state == "done"]  # fmt: skip
                if own and lowest(own).loss < best.loss:
                    winners[name] = lowest(own).point[name]
            return [winners] if len(winners) > 2 else None
        return None


class Coordinate:
    """From the config's values, number by number: its grid, or a step either way; stops when a round gains nothing.

    A number without a grid is tried a step of two octaves up and down, halved after a round that gained nothing, down
    to a quarter.
    """

    def __init__(self, space: Space, trials: int | None) -> None:
        self.space, self.trials = space, math.inf if trials is None else trials

    def ask(self, trials: Sequence[Trial], count: int) -> list[Point] | None:
        """See `Strategy`: what has been asked is walked through again, to the first line that is not complete."""
        known = {identity(trial.point, 0): trial for trial in trials}
        here: dict[str, float] = {}
        for line in self._lines(known, here):
            fresh = [point for point in line if identity(point, 0) not in known]
            if fresh:
                room = self.trials - len(trials)
                return fresh[: int(min(room, len(fresh)))] or None
            if any(known[identity(point, 0)].state == "open" for point in line):
                return []
        return None

    def _lines(self, known: dict[str, Trial], here: dict[str, float]) -> Iterator[list[Point]]:
        yield [{}]
        loss, step = _loss(known[identity({}, 0)]), 2.0
        while True:
            before = loss
            for dim in self.space.dims:
                line: list[Point] = [self._moved(here, dim, value) for value in self._values(dim, here, step)]
                yield line
                for point in line:
                    if (found := _loss(known[identity(point, 0)])) < loss:
                        loss, move = found, point
                        here.clear()
                        here.update(move)
            if not loss < before:
                step /= 2
                if step < 0.25 or all(dim.values for dim in self.space.dims):
                    return

    def _moved(self, here: Point, dim: Dim, value: float) -> dict[str, float]:
        """The point with one number changed; none is named that has the config's value."""
        out = {**here, dim.name: value}
        if math.isclose(value, dim.start, rel_tol=1e-12):
            del out[dim.name]
        return out

    def _values(self, dim: Dim, here: Point, step: float) -> list[float]:
        now = here.get(dim.name, dim.start)
        if dim.values:
            return [value for value in centre_out(dim.values) if value != now]
        low, high = dim.ends
        at = dim.octaves(now)
        return [dim.value(x) for x in (min(at + step, high), max(at - step, low)) if x != at]


def _loss(trial: Trial) -> float:
    """What a trial counts for: divergence, pruning and failure are all just no gain."""
    return trial.loss if trial.state == "done" and math.isfinite(trial.loss) else math.inf
