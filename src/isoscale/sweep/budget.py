"""How many runs a budget in runs, tokens or FLOPs buys."""

from __future__ import annotations

import math

from isoscale._base.errors import ConfigError
from isoscale.config import RunConfig
from isoscale.planning import cost
from isoscale.train.setup import meta_plan


def run_cost(config: RunConfig, vocab: int = 256) -> tuple[int, float]:
    """Tokens and FLOPs of one run of this config."""
    tokens = config.train.sequences_before(config.train.steps) * config.data.seq_len
    model = config.model
    per_token = cost(meta_plan(config, vocab).rows, width=model.width, depth=model.depth, seq_len=config.data.seq_len)
    return tokens, tokens * per_token.flops_per_token


def affordable(config: RunConfig, vocab: int = 256) -> float:
    """The number of runs that the tightest budget pays for; inf without one.

    Raises:
        ConfigError: a budget that does not pay for a single run (with the numbers).
    """
    sweep, (tokens, flops) = config.sweep, run_cost(config, vocab)
    limits = {
        "sweep.budget_runs": (sweep.budget_runs, 1.0),
        "sweep.budget_tokens": (sweep.budget_tokens, float(tokens)),
        "sweep.budget_flops": (sweep.budget_flops, flops),
    }
    runs = math.inf
    for key, (limit, one) in limits.items():
        if limit is None:
            continue
        if limit < one:
            raise ConfigError(
                f"the budget pays for no run: one costs {one:.4g}",
                key=key,
                value=limit,
                hint=f"at least {one:.4g}, or fewer train.steps",
            )
        runs = min(runs, limit // one)
    return runs
