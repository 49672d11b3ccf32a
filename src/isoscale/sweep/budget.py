"""What a search costs before it starts, what it has spent, and when it should stop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from isoscale._base.errors import ConfigError
from isoscale.config import RunConfig
from isoscale.planning import cost
from isoscale.sweep.strategies.base import Trial
from isoscale.train.setup import meta_plan

ENOUGH = 29
"""0.9^29 < 0.05: had a further trial a chance of 10 % to improve, so many without one would be seen with < 5 %."""
DRAWING = ("random", "tpe", "gp", "trust-region")


def run_tokens(config: RunConfig) -> int:
    """Tokens of one run."""
    return config.train.sequences_before(config.train.steps) * config.data.seq_len


def run_cost(config: RunConfig, vocab: int = 256) -> tuple[int, float]:
    """Tokens and FLOPs of one run of this config."""
    tokens = run_tokens(config)
    model = config.model
    per_token = cost(meta_plan(config, vocab).rows, width=model.width, depth=model.depth, seq_len=config.data.seq_len)
    return tokens, tokens * per_token.flops_per_token


def affordable(config: RunConfig, vocab: int = 256) -> float:
    """The number of runs that the tightest budget pays for; inf without one.

    Raises:
        ConfigError: a budget that does not pay for a single run (with the numbers).
    """
    return Budget(config, *run_cost(config, vocab)).runs


@dataclass(frozen=True)
class Estimate:
    """What a search will cost at most.

    Args:
        runs: trials; None where the strategy decides as it goes and nothing limits it.
        tokens, flops: of all runs; nan where unknown.
        limited: the budget that cuts the search short, else empty.
        seconds: wall time; nan where no step was measured.
    """

    runs: int | None
    tokens: float
    flops: float
    limited: str = ""
    seconds: float = math.nan

    def __str__(self) -> str:
        if self.runs is None:
            return "as many runs as the strategy wants"
        flops = f", {self.flops:.3g} FLOPs" if math.isfinite(self.flops) else ""
        cut = f" (cut by {self.limited})" if self.limited else ""
        long = f", about {max(1, round(self.seconds / 60))} min" if math.isfinite(self.seconds) else ""
        return f"at most {self.runs:,} runs, {self.tokens:.3g} tokens{flops}{long}{cut}"


class Budget:
    """Limits in runs, tokens, FLOPs and seconds.

    Args:
        config: of the sweep.
        tokens, flops: of one run; flops nan where nobody counts them.

    Raises:
        ConfigError: a limit that does not pay for the confirmation and one run before it (with the numbers).
    """

    def __init__(self, config: RunConfig, tokens: int, flops: float) -> None:
        section = config.sweep
        self.config, self.tokens, self.flops = config, tokens, flops
        self.reserved = section.confirm * section.confirm_seeds
        self.limits = {
            "sweep.budget_runs": (section.budget_runs, 1.0),
            "sweep.budget_tokens": (section.budget_tokens, float(tokens)),
            "sweep.budget_flops": (section.budget_flops, flops),
        }
        for key, (limit, one) in self.limits.items():
            least = one * (1 + self.reserved)
            if limit is not None and not limit >= least:
                unit = {"runs": "run", "tokens": "tokens", "flops": "FLOPs"}[key.removeprefix("sweep.budget_")]
                confirm = f", and {self.reserved} confirm the winner" if self.reserved else ""
                raise ConfigError(
                    f"the budget pays for no run: one costs {one:.4g} {unit}{confirm}", key=key, value=limit,
                    hint=f"at least {least:.4g}, or fewer train.steps",
                )  # fmt: skip

    @property
    def runs(self) -> float:
        """Whole runs that all limits pay for."""
        return min((limit // one for limit, one in self.limits.values() if limit is not None), default=math.inf)

    def exhausted(self, runs: int, tokens: float, *, confirming: bool = False) -> str:
        """The limit that does not pay for one run more; empty where all do.

        Args:
            runs: started so far.
            tokens: spent and promised so far.
            confirming: whether the run is one of those that a part of the budget is kept for.
        """
        kept = 0 if confirming else self.reserved
        share = tokens / self.tokens  # in runs
        for key, (limit, one) in self.limits.items():
            used = runs if key == "sweep.budget_runs" else share
            if limit is not None and (used + 1 + kept) * one > limit * (1 + 1e-9):
                return key
        return ""

    def estimate(self, pace: float = math.nan) -> Estimate:
        """Before the start.

        Args:
            pace: seconds per run, all workers together; nan: nobody measured.
        """
        points = size(self.config)
        section = self.config.sweep
        confirmed = min(points or 0, section.confirm) * section.confirm_seeds
        wanted = math.inf if points is None else points * len(section.seeds or (0,)) + confirmed
        cut = min(self.limits, key=lambda key: (self.limits[key][0] or math.inf) // self.limits[key][1])
        runs = min(wanted, self.runs)
        if not math.isfinite(runs):
            return Estimate(None, math.nan, math.nan)
        return Estimate(int(runs), runs * self.tokens, runs * self.flops, cut if self.runs < wanted else "",
                        runs * pace)  # fmt: skip


def size(config: RunConfig) -> int | None:
    """How many points the strategy may ask for; None where only it knows."""
    section = config.sweep
    counts = {name: len(values) for name, values in section.space.items()}
    if section.strategy == "lr":
        return counts.get("lr", 0)
    if section.strategy == "independent":
        return sum(counts.values()) + (len(counts) > 1)
    if section.strategy == "grid":
        return math.prod(counts.values())
    return section.trials


def enough(config: RunConfig, trials: Sequence[Trial]) -> bool:
    """Whether the last `ENOUGH` finished points have improved the best by no more than `sweep.enough`.

    Where a strategy draws, each of those points was a chance to improve; none of them took it, so at 95 % confidence a
    further one has a chance below 10 %. Lines and grids are not drawn: they always end by themselves.
    """
    limit = config.sweep.enough
    if limit is None or config.sweep.strategy not in DRAWING:
        return False
    ended = [trial for trial in trials if trial.state in ("done", "pruned")]
    losses = [trial.loss if trial.state == "done" else math.inf for trial in ended]
    if len(losses) <= ENOUGH:
        return False
    before = min(losses[:-ENOUGH])
    return math.isfinite(before) and before - min(losses) <= limit
