"""One worker process: take a waiting trial, train (or continue) it, tell the loss; until there is nothing left.

Runs as `python -m isoscale.sweep.worker FOLDER PARENT_PID` with one pinned thread.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import optuna

from isoscale.config import RunConfig
from isoscale.sweep.one import POLL, run_one, stop_politely
from isoscale.sweep.store import open_study


def trial_config(config: RunConfig, point: dict[str, float], seed: int) -> RunConfig:
    """The sweep's config at one point."""
    values: dict[str, object] = {f"hps.{name}": value for name, value in point.items()}
    return config.with_values(seed=seed, **values)


def objective(trial: optuna.Trial, config: RunConfig, out: Path) -> float:
    """Train one trial; a diverged run has loss inf."""
    if "id" not in trial.user_attrs:  # two workers saw one waiting trial, and this one came second
        raise optuna.TrialPruned
    point, seed = trial.user_attrs["point"], trial.user_attrs["seed"]
    for name, value in point.items():
        trial.suggest_float(name, min(value, 2.0**-30), max(value, 2.0**30), log=True)
    trial.set_user_attr("pid", os.getpid())
    folder = out / "trials" / trial.user_attrs["id"]
    trial.set_user_attr("folder", str(folder.relative_to(out)))
    try:
        loss, seconds, diverged = run_one(trial_config(config, point, seed), folder)
    except Exception as error:
        trial.set_user_attr("error", str(error)[:2000])
        raise
    trial.set_user_attr("seconds", seconds)
    if diverged:
        trial.set_user_attr("diverged", diverged)
    return loss


def work(out: Path, parent: int) -> None:
    """Until the study says stop, or the parent is gone."""
    study = open_study(out)
    config = RunConfig.model_validate_json((out / "run.json").read_text(encoding="utf-8"))
    while os.getppid() == parent and not study.user_attrs.get("stop", False):
        waiting = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.WAITING,))
        if waiting:
            study.optimize(lambda trial: objective(trial, config, out), n_trials=1, catch=())
        else:
            time.sleep(POLL)


if __name__ == "__main__":
    stop_politely()
    try:
        work(Path(sys.argv[1]), int(sys.argv[2]))
    except KeyboardInterrupt:
        sys.exit(130)
