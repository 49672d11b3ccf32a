"""One run inside a worker: continue what is there, wait for whoever still works on it, report, diverge in words."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

from isoscale._base.errors import CheckpointError, NonFiniteError
from isoscale._base.log import read
from isoscale.config import RunConfig
from isoscale.sweep.job import Job, Outcome, Report
from isoscale.sweep.pruning import RUNGS
from isoscale.train import Tick, train
from isoscale.train.bench import Bench

POLL = 0.3  # seconds between two looks
WINDOW = 0.1  # share of the run before a rung whose losses are averaged


@cache
def _bench() -> Bench:
    """What this process's runs share: a worker knows nothing of training, and a Ray task leaves nothing else behind."""
    return Bench()


def run_one(config: RunConfig, folder: Path, report: Report | None = None) -> tuple[float, float, str]:
    """Train, or continue, a run in a folder that a worker taken for dead may still hold.

    Args:
        config: the run.
        folder: its run folder.
        report: called at each of `pruning.RUNGS` with the mean training loss of the tenth of the run before it.

    Returns:
        Validation loss (inf when the run diverged), seconds, and what diverged first (else empty).

    Raises:
        IsoscaleError: whatever the run refuses.
        Pruned: the report says so.
    """
    on_step = None if report is None else _rungs(config, folder, report)
    while True:
        try:
            result = train(config, folder, resume=True, on_step=on_step, bench=_bench())
        except NonFiniteError as error:
            return float("inf"), 0.0, error.key
        except CheckpointError as error:
            if error.key != "lock":
                raise
            time.sleep(POLL)
        else:
            loss = result.val_loss
            return (loss if loss == loss else float("inf")), result.seconds, ""


def _rungs(config: RunConfig, folder: Path, report: Report) -> Callable[[Tick], None]:
    """Reports at the rungs. The losses are read back from the run's rows, so that a resumed run reports the same."""
    steps = config.train.steps
    whole = config.train.sequences_before(steps)
    shares = [config.train.sequences_before(step) / whole for step in range(steps + 1)]
    due = {next(step for step, share in enumerate(shares) if share >= rung - 1e-9): rung for rung in RUNGS}

    def on_step(tick: Tick) -> None:
        rung = due.get(tick.step)
        if rung is None or tick.step == steps:
            return
        rows = {row["step"]: row["loss"] for row in read(folder / "metrics.jsonl") if row["kind"] == "train"}
        last = [rows[step] for step in range(tick.step) if step in rows and shares[step + 1] > rung - WINDOW + 1e-9]
        report(rung, sum(last) / len(last) if last else math.nan)

    return on_step


def objective(job: Job, report: Report) -> Outcome:
    """The default objective: a training run in the trial's folder."""
    loss, seconds, diverged = run_one(RunConfig.model_validate_json(job.config), Path(job.folder), report)
    return Outcome(loss, seconds, diverged=diverged)
