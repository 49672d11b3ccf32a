"""The driver's picture of a study in memory: read once, then kept up by what the driver does and hears."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from isoscale.sweep.result import TrialRow
from isoscale.sweep.space import Point
from isoscale.sweep.strategies.base import State, Trial

STATES = {TrialState.WAITING: "waiting", TrialState.RUNNING: "running", TrialState.COMPLETE: "done",
          TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}  # fmt: skip
ENDED = ("done", "pruned", "failed")
Key = tuple[tuple[str, float], ...]


def key_of(point: Point) -> Key:
    """A point as a key, whatever the order of its names."""
    return tuple(sorted((name, float(value)) for name, value in point.items()))


@dataclass
class Record:
    """One (point, seed); the arguments are those of `TrialRow`.

    Args:
        number: of the trial in the storage.
        curve: tokens -> training loss.
        deaths: workers that died under it in this session.
    """

    id: str
    point: Point
    seed: int
    number: int
    state: str = "waiting"
    loss: float = math.nan
    seconds: float = 0.0
    tokens: int = 0
    attempts: int = 0
    error: str = ""
    diverged: str = ""
    confirm: bool = False
    curve: dict[float, float] = field(default_factory=dict)
    deaths: int = 0

    @property
    def row(self) -> TrialRow:
        """What a user sees."""
        return TrialRow(self.id, dict(self.point), self.seed, self.state, self.loss, self.seconds, self.attempts,
                        self.tokens, self.error, self.diverged, self.confirm)  # fmt: skip


def record_of(trial: FrozenTrial) -> Record | None:
    """A trial of the storage; None for one that no driver made."""
    attrs: Mapping[str, Any] = trial.user_attrs
    if "id" not in attrs:
        return None
    state, curve = STATES[trial.state], {float(at): loss for at, loss in trial.intermediate_values.items()}
    loss = float(trial.value) if state in ("done", "pruned") and trial.value is not None else math.nan
    return Record(
        attrs["id"], attrs["point"], attrs["seed"], trial._trial_id, state, loss, attrs.get("seconds", 0.0),
        attrs.get("tokens", 0), attrs.get("attempts", int(state != "waiting")), attrs.get("error", ""),
        attrs.get("diverged", ""), attrs.get("confirm", False), curve,
    )  # fmt: skip


class Ledger:
    """All records, by identity and by point.

    Args:
        seeds: that each point is trained with in the search.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.seeds = tuple(seeds)
        self.records: dict[str, Record] = {}
        self.points: dict[Key, dict[int, Record]] = {}
        self._trials: dict[Key, Trial] = {}
        self.counts = dict.fromkeys(("waiting", "running", *ENDED), 0)

    def put(self, record: Record) -> Record:
        """Add a record, or replace the one of its identity."""
        if (old := self.records.get(record.id)) is not None:
            self.counts[old.state] -= 1
        self.counts[record.state] += 1
        self.records[record.id] = record
        if not record.confirm:
            self.points.setdefault(key_of(record.point), {})[record.seed] = record
        self.changed(record)
        return record

    def merge(self, trials: Sequence[FrozenTrial], mine: set[str]) -> list[Record]:
        """Take over what the storage says; records of trials that this driver runs stay, but for those that have ended.

        Returns:
            Records of trials in `mine` that another driver has ended meanwhile.
        """
        ended = []
        for trial in trials:
            attrs = trial.user_attrs
            old = self.records.get(attrs.get("id", ""))
            if old is not None:
                again = old.state == "failed" and trial._trial_id > old.number
                same = old.number == trial._trial_id and old.state != STATES[trial.state]
                if not (again or same) or (old.id in mine and STATES[trial.state] not in ENDED):
                    continue
            record = record_of(trial)
            if record is None:
                continue
            if old is not None:
                record.deaths = old.deaths
            self.put(record)
            if record.id in mine:
                ended.append(record)
        return ended

    def set(self, record: Record, state: str) -> None:
        """A record has another state, and with it maybe another loss."""
        self.counts[record.state] -= 1
        self.counts[state] += 1
        record.state = state
        self.changed(record)

    @property
    def ended(self) -> int:
        """Trials that have ended."""
        return sum(self.counts[state] for state in ENDED)

    @property
    def open(self) -> int:
        """Trials that wait or run."""
        return self.counts["waiting"] + self.counts["running"]

    def changed(self, record: Record) -> None:
        """A record is new, or has another state or loss."""
        if record.confirm:
            return
        key = key_of(record.point)
        old = self._trials.get(key)
        self._trials[key] = self._together(self.points[key], old.point if old else record.point)

    def _together(self, runs: Mapping[int, Record], point: Point) -> Trial:
        found = [runs[seed] for seed in self.seeds if seed in runs]
        states = {run.state for run in found}
        state: State = "open"
        if "failed" in states:
            state = "failed"
        elif "pruned" in states:
            state = "pruned"
        elif states == {"done"} and len(found) == len(self.seeds):
            state = "done"
        losses = [run.loss for run in found if run.state in ("done", "pruned")]
        return Trial(point, state, sum(losses) / len(losses) if losses and state != "open" else math.nan)

    def trials(self) -> list[Trial]:
        """What a strategy sees, in the order in which the points were asked for."""
        return list(self._trials.values())

    def rows(self) -> tuple[TrialRow, ...]:
        """What a user sees."""
        return tuple(record.row for record in self.records.values())

    def incomplete(self) -> list[tuple[Point, int]]:
        """Points of which a seed has never been asked for, with that seed."""
        return [(trial.point, seed) for key, trial in self._trials.items() if trial.state == "open"
                for seed in self.seeds if seed not in self.points[key]]  # fmt: skip

    def failed(self) -> dict[Key, str]:
        """Points that failed, with the reason of the first of their runs."""
        out: dict[Key, str] = {}
        for record in self.records.values():
            if record.state == "failed":
                out.setdefault(key_of(record.point), record.error)
        return out
