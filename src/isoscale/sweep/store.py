"""The Optuna study of a sweep: SQLite in the run folder, heartbeat on, killed trials retried.

Trials are identified by (point, seed) in their user attributes. Optuna's retry makes a new trial number with the same
attributes, and the trial's run folder is named by the identity, so the retry continues from its checkpoint.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback

from isoscale._base.errors import CheckpointError, StorageError

NAME = "isoscale"
HEARTBEAT, GRACE = 3, 12  # seconds; a worker silent for GRACE is taken for dead
RETRIES = 3
optuna.logging.set_verbosity(optuna.logging.ERROR)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


def url(out: Path) -> str:
    """The storage's address."""
    return f"sqlite:///{(out / 'study.db').resolve()}"


def open_study(out: Path, *, create: bool = False) -> optuna.Study:
    """The study of a sweep folder.

    Raises:
        CheckpointError: there is none and `create` is off.
        StorageError: the folder cannot be written.
    """
    if not create and not (out / "study.db").exists():
        raise CheckpointError(
            "no sweep here", key="study.db", place=str(out), hint="give the folder that isoscale sweep --out made"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        storage = RDBStorage(
            url(out), heartbeat_interval=HEARTBEAT, grace_period=GRACE,
            heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=RETRIES),
            engine_kwargs={"connect_args": {"timeout": 60}},
        )  # fmt: skip
        return optuna.create_study(study_name=NAME, storage=storage, direction="minimize", load_if_exists=True)
    except (OSError, optuna.exceptions.StorageInternalError) as error:
        raise StorageError(
            "the sweep's storage cannot be opened",
            place=str(out / "study.db"),
            value=str(error)[:200],
            hint="is the disk full or the folder read-only?",
        ) from None


def attributes(trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
    """`id`, `point` and `seed` of a trial; empty for one that was not enqueued by a strategy."""
    return {key: trial.user_attrs[key] for key in ("id", "point", "seed") if key in trial.user_attrs}
