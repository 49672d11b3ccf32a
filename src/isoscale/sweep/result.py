"""What a sweep found, read back from its folder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna

from isoscale._base.errors import CheckpointError
from isoscale.config import RunConfig
from isoscale.sweep.store import open_study
from isoscale.train.folder import read_config

_STATES = {
    optuna.trial.TrialState.COMPLETE: "done",
    optuna.trial.TrialState.RUNNING: "running",
    optuna.trial.TrialState.WAITING: "waiting",
    optuna.trial.TrialState.FAIL: "failed",
}


@dataclass(frozen=True)
class TrialRow:
    """One (point, seed).

    Args:
        id: its identity and folder name under `trials/`.
        point: HP values in base units.
        seed: of init and data.
        state: done, running, waiting or failed.
        loss: validation, nats per token; inf when diverged, nan while not done.
        seconds: wall time.
        attempts: how often it was started.
    """

    id: str
    point: Mapping[str, float]
    seed: int
    state: str
    loss: float
    seconds: float
    attempts: int


@dataclass(frozen=True)
class SweepResult:
    """A sweep's trials and its winner.

    Args:
        out: the sweep folder.
        config: what every trial shared.
        trials: one per (point, seed).
        best: the winning HP values; empty while nothing is done.
        loss: their mean validation loss over the seeds.
        edge: whether the best LR lies at an end of what was tried (then the optimum may lie outside).
        seconds: wall time of all trials together.
    """

    out: Path
    config: RunConfig
    trials: tuple[TrialRow, ...]
    best: Mapping[str, float]
    loss: float
    edge: bool
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "out": str(self.out), "best": dict(self.best), "loss": self.loss, "edge": self.edge,
            "seconds": self.seconds, "trials": [asdict(trial) for trial in self.trials],
        }  # fmt: skip


def trial_rows(study: optuna.Study) -> tuple[TrialRow, ...]:
    """One row per (point, seed); of several attempts the one furthest along counts."""
    rank = {"done": 3, "running": 2, "waiting": 1, "failed": 0}
    rows: dict[str, TrialRow] = {}
    for trial in study.get_trials(deepcopy=False):
        attrs = trial.user_attrs
        if "id" not in attrs or trial.state not in _STATES:
            continue
        state = _STATES[trial.state]
        loss = float(trial.value) if state == "done" and trial.value is not None else math.nan
        row = TrialRow(attrs["id"], attrs["point"], attrs["seed"], state, loss, attrs.get("seconds", 0.0), 1)
        old = rows.get(row.id)
        attempts = (old.attempts if old else 0) + (state != "waiting")
        keep = row if old is None or rank[state] >= rank[old.state] else old
        rows[row.id] = TrialRow(keep.id, keep.point, keep.seed, keep.state, keep.loss, keep.seconds, attempts)
    return tuple(rows.values())


def means(trials: tuple[TrialRow, ...]) -> list[tuple[Mapping[str, float], float]]:
    """Finished points and their mean loss over the seeds that are done."""
    groups: dict[tuple[tuple[str, float], ...], list[float]] = {}
    for trial in trials:
        if trial.state == "done":
            groups.setdefault(tuple(sorted(trial.point.items())), []).append(trial.loss)
    return [(dict(point), sum(losses) / len(losses)) for point, losses in groups.items()]


def summarise(out: Path, config: RunConfig, study: optuna.Study) -> SweepResult:
    """The result as it stands."""
    trials = trial_rows(study)
    done = [(point, loss) for point, loss in means(trials) if math.isfinite(loss)]
    best, loss = min(done, key=lambda pair: pair[1]) if done else ({}, math.nan)
    rates = sorted({point["lr"] for point, _ in means(trials) if "lr" in point})
    edge = len(rates) > 1 and best.get("lr") in (rates[0], rates[-1]) and config.sweep.strategy != "random"
    return SweepResult(out, config, trials, best, loss, edge, sum(t.seconds for t in trials))


def load(out: Path | str) -> SweepResult:
    """The result of a sweep folder, finished or not.

    Raises:
        CheckpointError: there is no sweep, or none of its trials is done.
    """
    out = Path(out)
    study = open_study(out)
    result = summarise(out, read_config(out), study)
    if not result.best:
        raise CheckpointError(
            "no trial of this sweep has finished with a finite loss",
            place=str(out),
            hint="isoscale sweep --resume, or lower learning rates",
        )
    return result
