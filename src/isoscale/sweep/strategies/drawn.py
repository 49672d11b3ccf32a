"""Searches over the whole space at once: grid, random, and Optuna's TPE and Gaussian process."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler
from optuna.trial import TrialState, create_trial

from isoscale._base.errors import ConfigError
from isoscale._base.rng import generator, stream
from isoscale.config import SweepSection
from isoscale.sweep.space import Dim, Point, Space, centre_out
from isoscale.sweep.strategies.base import Trial

LARGEST = 100_000


class Listed:
    """Points that are known from the start."""

    def __init__(self, points: list[Point]) -> None:
        self.points = points

    def ask(self, trials: Sequence[Trial], count: int) -> list[Point] | None:
        """See `Strategy`."""
        return self.points[len(trials) : len(trials) + max(count, 1)] or None


def grid(space: Space) -> Listed:
    """Every combination, those near the middle of the grid first.

    Raises:
        ConfigError: a factor without values, or more points than anybody can mean.
    """
    for dim in space.dims:
        if not dim.values:
            raise ConfigError(f"a grid needs values for {dim.name}", key="sweep.strategy", value="grid",
                              hint="trust-region searches per module")  # fmt: skip
    size = math.prod(len(dim.values) for dim in space.dims)
    if size > LARGEST:
        raise ConfigError(f"the grid has {size:,} points", key="sweep.space", hint="sweep.strategy=random")
    ordered = [centre_out(dim.values) for dim in space.dims]
    places = itertools.product(*(range(len(values)) for values in ordered))
    near = sorted(places, key=lambda at: (sum(at), at))
    return Listed([{dim.name: values[i] for dim, values, i in zip(space.dims, ordered, at)} for at in near])


def random(space: Space, trials: int, seed: int) -> Listed:
    """Log-uniform between the ends of each number."""
    draw = generator(seed, "sweep", "random")
    return Listed([{dim.name: _between(dim, float(draw.uniform())) for dim in space.dims} for _ in range(trials)])


def _between(dim: Dim, share: float) -> float:
    low, high = dim.ends
    return dim.value(low + share * (high - low))


class Sampled:
    """An Optuna sampler's points, `batch` at a time, from a mirror study in memory that is made of the trials."""

    def __init__(self, space: Space, kind: str, trials: int, batch: int, seed: int) -> None:
        self.space, self.trials, self.batch = space, trials, batch
        self.distributions: dict[str, BaseDistribution] = {dim.name: FloatDistribution(*dim.ends) for dim in space.dims}
        self.kind, self.seed = kind, stream(seed, "sweep", kind) % 2**31
        self.study, self.told = self._study(), 0

    def _study(self) -> optuna.Study:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return optuna.create_study(sampler=_sampler(self.kind, self.seed, min(10, self.trials // 3)))

    def ask(self, trials: Sequence[Trial], count: int) -> list[Point] | None:
        """See `Strategy`: a batch once all before it are done, so that the points do not hang on timing."""
        if len(trials) >= self.trials:
            return None
        if any(trial.state == "open" for trial in trials):
            return []
        if self.told > len(trials):
            self.study, self.told = self._study(), 0
        for trial in trials[self.told :]:
            self.study.add_trial(self._record(trial, trials))
        self.told = len(trials)
        # the sampler's own numbers hang on how many trials there are, not on what this process has drawn before
        self.study.sampler = _sampler(self.kind, self.seed + len(trials), min(10, self.trials // 3))
        out: list[Point] = []
        asked = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if not trials:
                out.append({})  # the config's own values are the first point
            while len(out) < min(self.batch, self.trials - len(trials)):
                one = self.study.ask(self.distributions)
                asked.append(one)
                out.append(self.space.point([one.params[dim.name] for dim in self.space.dims]))
            for one in asked:
                self.study.tell(one, state=TrialState.FAIL)
        return out

    def _record(self, trial: Trial, trials: Sequence[Trial]) -> optuna.trial.FrozenTrial:
        at = dict(zip(self.distributions, self.space.octaves(trial.point)))
        inside = {dim.name: min(max(at[dim.name], dim.ends[0]), dim.ends[1]) for dim in self.space.dims}
        finite = [t.loss for t in trials if t.state == "done" and math.isfinite(t.loss)]
        worst = max(finite, default=1.0)
        good = trial.state == "done" and math.isfinite(trial.loss)
        # a cliff is told as the worst that was seen: an infinity would blind a Gaussian process
        return create_trial(params=inside, distributions=self.distributions, value=trial.loss if good else worst)


def _sampler(kind: str, seed: int, startup: int) -> BaseSampler:
    if kind == "tpe":
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup, multivariate=True, constant_liar=True)
    try:
        return optuna.samplers.GPSampler(seed=seed, n_startup_trials=startup)
    except ImportError:
        raise ConfigError("the Gaussian process needs scipy", key="sweep.strategy", value="gp",
                          hint="pip install scipy") from None  # fmt: skip


def points_of(section: SweepSection) -> int:
    """How many points a drawing strategy may try.

    Raises:
        ConfigError: nobody said.
    """
    if section.trials is None:
        raise ConfigError(f"{section.strategy} needs the number of points", key="sweep.trials",
                          hint="--set sweep.trials=20, or --runs 20")  # fmt: skip
    return section.trials
