"""Search strategies behind one small protocol: given what is known, which points come next."""

from __future__ import annotations

from isoscale._base.errors import ConfigError
from isoscale.config import RunConfig
from isoscale.sweep.space import Space
from isoscale.sweep.strategies.base import Strategy, Trial
from isoscale.sweep.strategies.drawn import Sampled, grid, points_of, random
from isoscale.sweep.strategies.lines import Coordinate, Independent, LrLine
from isoscale.sweep.strategies.trust_region import TrustRegion

__all__ = ["Strategy", "Trial", "make"]


def make(config: RunConfig, space: Space) -> Strategy:
    """The strategy that a config names.

    Raises:
        ConfigError: its settings are missing, or some would be ignored.
    """
    section, seed = config.sweep, config.seed
    name = section.strategy
    if name in ("lr", "independent"):
        ignored = [other for other in section.space if other != "lr"]
        if name == "lr" and "lr" in section.space and ignored:
            raise ConfigError(
                f"the LR line tries lr only, not {', '.join(ignored)}", key="sweep.space", value=ignored,
                hint="sweep.strategy=independent tries one line per hyperparameter",
            )  # fmt: skip
        return LrLine(section) if name == "lr" else Independent(section, space)
    if name == "grid":
        return grid(space)
    if name == "coordinate":
        return Coordinate(space, section.trials)
    trials = points_of(section)
    if name == "random":
        return random(space, trials, seed)
    if name == "trust-region":
        return TrustRegion(space, trials, section.batch, seed)
    return Sampled(space, name, trials, section.batch, seed)
