"""What every strategy is: a function of the trials so far, so that a resumed or shared search goes on by itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from isoscale._base.errors import ConfigError
from isoscale.sweep.space import Point

State = Literal["open", "done", "pruned", "failed"]


@dataclass(frozen=True)
class Trial:
    """One point, all its seeds together.

    Args:
        point: see `Point`.
        state: open (waiting, running, or a seed is missing), done, pruned or failed.
        loss: mean over the seeds, nats/token; inf when one diverged; nan while open; pruned: its last, at its tokens.
    """

    point: Point
    state: State
    loss: float


class Strategy(Protocol):
    """What a strategy is. It holds no state between calls but what it could build again from the trials."""

    def ask(self, trials: Sequence[Trial], count: int) -> list[Point] | None:
        """The points that come next.

        Args:
            trials: every point so far, in the order in which they were asked for.
            count: how many could start now.

        Returns:
            New points, as many as belong together (also more or fewer than `count`); an empty list: wait for what is
            open; None: the search is over.
        """
        ...


def finished(trials: Sequence[Trial]) -> list[Trial]:
    """Those with a loss that counts."""
    return [trial for trial in trials if trial.state == "done"]


def lowest(trials: Sequence[Trial]) -> Trial:
    """The trial of lowest finite loss.

    Raises:
        ConfigError: every run diverged or failed.
    """
    finite = [trial for trial in trials if trial.state == "done" and math.isfinite(trial.loss)]
    if not finite:
        raise ConfigError("every run of the sweep diverged or failed", key="sweep.space", hint="lower learning rates")
    return min(finite, key=lambda trial: trial.loss)
