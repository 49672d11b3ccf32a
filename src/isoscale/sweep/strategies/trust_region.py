"""Trust-region random search in log space (Complete(d)P, arXiv 2512.22382, section 5).

The paper names the method and its start (the best global hyperparameters), draws candidates near good points and
recentres on improvement; its schedule could not be read, so what follows is ours. A box about the incumbent, `radius`
octaves either way; each candidate moves a random half of the numbers (at most `MOVES`), as all of forty at once would
nearly always be worse. A batch that improves grows the box, one that does not shrinks it; a diverged, pruned or failed
candidate is no more than a failure, whatever its loss, so that a cliff repels nothing but its own side. A box that has
become too small starts anew, at its first size, about the best point.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from isoscale._base.rng import generator
from isoscale.sweep.space import Point, Space
from isoscale.sweep.strategies.base import Trial

FIRST, LARGEST, SMALLEST = 1.0, 3.0, 0.2  # octaves
GROW, SHRINK = 1.5, 0.75
MOVES = 12


@dataclass(frozen=True)
class Box:
    """Where the search stands.

    Args:
        centre: coordinates of the incumbent.
        loss: its loss; inf before the first.
        radius: octaves either way.
        restarts: how often the box has started anew.
    """

    centre: tuple[float, ...]
    loss: float = math.inf
    radius: float = FIRST
    restarts: int = 0


class TrustRegion:
    """See the module.

    Args:
        space: what may move.
        trials: points, the start included.
        batch: points drawn at once.
        seed: of the draws.
    """

    def __init__(self, space: Space, trials: int, batch: int, seed: int) -> None:
        self.space, self.trials, self.batch, self.seed = space, trials, batch, seed

    def ask(self, trials: Sequence[Trial], count: int) -> list[Point] | None:
        """See `Strategy`: the start, then a batch once all before it are done."""
        if not trials:
            return [{}]
        if any(trial.state == "open" for trial in trials):
            return []
        if len(trials) >= self.trials:
            return None
        return self.candidates(self.box(trials), len(trials))

    def box(self, trials: Sequence[Trial]) -> Box:
        """Where the search stands after these trials."""
        box = Box(tuple(self.space.octaves(trials[0].point)), _loss(trials[0]))
        for first in range(1, len(trials), self.batch):
            best = min(trials[first : first + self.batch], key=_loss)
            if _loss(best) < box.loss:
                centre = tuple(self.space.octaves(best.point))
                box = Box(centre, _loss(best), min(box.radius * GROW, LARGEST), box.restarts)
            elif box.radius * SHRINK < SMALLEST:
                box = Box(box.centre, box.loss, FIRST, box.restarts + 1)
            else:
                box = Box(box.centre, box.loss, box.radius * SHRINK, box.restarts)
        return box

    def candidates(self, box: Box, number: int) -> list[Point]:
        """The next batch."""
        draw = generator(self.seed, "sweep", "trust-region", number)
        size = len(self.space.dims)
        moved = min(MOVES, max(1, math.ceil(size / 2)))
        out = []
        for _ in range(min(self.batch, self.trials - number)):
            octaves = list(box.centre)
            for at in draw.permutation(size)[:moved]:
                octaves[at] += float(draw.uniform(-box.radius, box.radius))
            out.append(self.space.point(octaves))
        return out


def _loss(trial: Trial) -> float:
    return trial.loss if trial.state == "done" and math.isfinite(trial.loss) else math.inf
