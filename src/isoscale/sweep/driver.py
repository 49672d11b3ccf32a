"""The loop of a search. The driver alone talks to the storage; workers get jobs and send messages.

Alone (SQLite in the folder, whose lock keeps others out) every trial that is not finished is the driver's own. Together
with other drivers on one storage, the leader asks the strategy and writes new trials; everybody runs them, and takes
over what the dead have left. A strategy is a function of the trials, so it does not matter who leads, or when.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from isoscale._base.errors import IsoscaleError, StorageError
from isoscale.sweep.executors import Died, Executor, Finished, Message, Reported
from isoscale.sweep.job import Job, Outcome
from isoscale.sweep.ledger import Ledger, Record, key_of
from isoscale.sweep.planner import Planner, Setup
from isoscale.sweep.pruning import hopeless
from isoscale.sweep.space import show, trial_config
from isoscale.sweep.status import Status, Teller
from isoscale.sweep.store import RETRIES, Store

if TYPE_CHECKING:
    from isoscale.sweep.lease import Lease

POLL = 0.5  # seconds between looks while nothing happens
REFRESH, LOOK = 1.0, 3.0  # seconds between looks at the storage, and at the other drivers
STATES = {"done": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}


class Driver:
    """One session of a search.

    Args:
        setup: see there.
        store: the study.
        lease: the standing among other drivers; None where there can be none.
        on_status: called about twice a second.
    """

    def __init__(
        self, setup: Setup, store: Store, lease: Lease | None, on_status: Callable[[Status], None] | None = None
    ) -> None:
        self.setup, self.store, self.lease = setup, store, lease
        self.config, self.budget = setup.config, setup.budget
        self.ledger = Ledger(self.config.sweep.seeds or (self.config.seed,))
        self.mine: set[str] = set()
        self.again: list[Record] = []  # lost their worker; still this driver's
        self.abandoned = 0  # trials of others to be looked at once: their drivers may be dead
        self.begun = time.monotonic()
        self._read = self._looked = self._asked_lead = -math.inf
        self._leads = False
        self.planner = Planner(setup, store, self.ledger)
        self.teller = Teller(self.ledger, self.budget.estimate(setup.pace), on_status)

    @property
    def seconds(self) -> float:
        """Wall time of the search, all sessions together."""
        return self.setup.spent + time.monotonic() - self.begun

    def begin(self, *, retry: bool) -> None:
        """Read the study. Trials of a session that was cut off wait again; with `retry`, failed ones too."""
        self.refresh(force=True)
        for record in list(self.ledger.records.values()):
            if record.state == "running" and self.lease is None:
                self.store.release(record.number)
                self.ledger.set(record, "waiting")
            elif record.state == "failed" and retry and self.leads():
                self.planner.create(record.point, record.seed, record.attempts, confirm=record.confirm)
        self.teller.first = self.ledger.ended

    def leads(self) -> bool:
        """Whether this driver asks the strategy."""
        if self.lease is None:
            return True
        if time.monotonic() - self._asked_lead >= LOOK:
            self._asked_lead, self._leads = time.monotonic(), self.lease.take("leader")
        return self._leads

    def run(self, executor: Executor) -> None:
        """Until nothing is left to do.

        Raises:
            IsoscaleError: too many points failed, or the storage is gone.
        """
        self.teller(self.planner.over, force=True)
        while True:
            self.refresh()
            limit = self.config.sweep.budget_seconds
            if limit is not None and self.seconds >= limit:
                self.planner.stopped = "sweep.budget_seconds"
            elif self.leads():
                self.planner.plan(self._room(executor))
            self.fill(executor)
            if self.finished():
                break
            self.handle(executor, executor.poll(POLL if self.lease is None else POLL / 2))
            self.check_failures()
            self.teller(self.planner.over)
        self.teller(self.planner.over, force=True)

    def finished(self) -> bool:
        """Whether the search has ended."""
        if self.mine:
            return False
        if self.planner.stopped == "sweep.budget_seconds":
            return True
        return self.planner.over and self.planner.confirming and not self.ledger.open

    def _room(self, executor: Executor) -> int:
        """How many trials could start now, here and elsewhere."""
        if self.lease is None:
            return executor.free
        return executor.free + (self.lease.drivers - 1) * self.setup.workers  # others look only once a second

    # who runs it

    def fill(self, executor: Executor) -> None:
        """Start what may start."""
        while executor.free and self.again:
            self._start(executor, self.again.pop())
        nothing = not self.ledger.counts["waiting"] and not self.abandoned
        if nothing or not executor.free or self.planner.stopped == "sweep.budget_seconds":
            return
        for record in list(self.ledger.records.values()):
            if not executor.free:
                return
            dead = record.state == "running" and record.id not in self.mine and self.abandoned
            if (record.state == "waiting" or dead) and self._claim(record):
                self._start(executor, record)
        self.abandoned = 0

    def _claim(self, record: Record) -> bool:
        if self.lease is None:
            if not (taken := self.store.run(record.number)):
                self.refresh(force=True)  # somebody else has changed it
            return taken
        if not self.lease.take(record.id):
            return False
        if self.store.run(record.number):
            return True
        found = self.store.do(lambda: self.store.rdb.get_trial(record.number))
        if found.state == TrialState.RUNNING:  # of a dead driver
            record.attempts = max(record.attempts, int(found.user_attrs.get("attempts", 1)))
            return True
        self.lease.drop(record.id)  # ended meanwhile
        return False

    def _start(self, executor: Executor, record: Record) -> None:
        record.attempts += 1
        if record.attempts > 1:
            self.store.attr(record.number, "attempts", record.attempts)
        self.mine.add(record.id)
        self.ledger.set(record, "running")
        config = trial_config(self.config, record.point, record.seed)
        folder = self.setup.out / "trials" / record.id
        executor.start(Job(record.id, dict(record.point), record.seed, config.model_dump_json(), str(folder),
                           self.setup.objective))  # fmt: skip

    # what came of it

    def handle(self, executor: Executor, messages: list[Message]) -> None:
        """Take messages in."""
        for message in messages:
            record = self.ledger.records.get(message.id)
            if record is None or record.id not in self.mine:
                continue  # another driver took it over and has ended it
            if isinstance(message, Reported):
                if self.hear(message):
                    executor.stop(message.id)
            elif isinstance(message, Finished):
                self._finish(record, message.outcome)
            elif isinstance(message, Died):
                record.deaths += 1
                if record.deaths > RETRIES:
                    error = f"its worker died {record.deaths} times, last by {message.reason}"
                    self._finish(record, Outcome(math.nan, state="failed", error=error))
                else:
                    self.again.append(record)

    def hear(self, message: Reported) -> bool:
        """Write a report down; True where the trial is not worth finishing."""
        record = self.ledger.records[message.id]
        at = round(message.share * self.budget.tokens)
        record.curve[at] = message.loss
        self.store.report(record.number, at, message.loss)
        self.teller(self.planner.over)
        rule = self.config.sweep.prune
        if rule == "none" or record.confirm:
            return False
        others = [other.curve for other in self.ledger.records.values() if other is not record and not other.confirm]
        return hopeless(rule, record.curve, others)

    def _finish(self, record: Record, outcome: Outcome) -> None:
        told = max(record.curve, default=0.0)
        record.loss = outcome.loss if outcome.state == "done" else math.nan
        if outcome.state == "pruned":
            record.loss = record.curve.get(told, math.nan)
        whole = outcome.state == "done" and not outcome.diverged
        record.seconds, record.tokens = outcome.seconds, self.budget.tokens if whole else int(told)
        record.error, record.diverged = outcome.error, outcome.diverged
        attrs: dict[str, object] = {"seconds": record.seconds, "tokens": record.tokens}
        attrs |= {"error": record.error} if record.error else {}
        attrs |= {"diverged": record.diverged} if record.diverged else {}
        value = None if outcome.state == "failed" or math.isnan(record.loss) else record.loss
        self.store.end(record.number, STATES[outcome.state], value, attrs)
        self.mine.discard(record.id)
        self.ledger.set(record, outcome.state)
        if self.lease is not None:
            self.lease.drop(record.id)

    def check_failures(self) -> None:
        """Stop when too many points failed.

        Raises:
            IsoscaleError: with the first reason.
        """
        if self.ledger.counts["failed"] < self.config.sweep.max_failures:
            return
        failed = self.ledger.failed()
        if len(failed) < self.config.sweep.max_failures:
            return
        key, error = next(iter(failed.items()))
        name = next(r.id for r in self.ledger.records.values() if r.state == "failed" and key_of(r.point) == key)
        raise IsoscaleError(
            f"{len(failed)} points failed, for example trial {name}: {error}", key=show(dict(key)),
            place=str(self.setup.out), hint="see worker_*.log and trials/; --resume tries again",
        )  # fmt: skip

    # what others did

    def refresh(self, *, force: bool = False) -> None:
        """Read what other drivers wrote."""
        now = time.monotonic()
        if self.lease is not None and (force or now - self._looked >= LOOK):
            self._looked = now
            self.lease.look()
            force = True
        if not force and (self.lease is None or now - self._read < REFRESH):
            return
        self._read = now
        for record in self.ledger.merge(self.store.trials(), self.mine):
            self.mine.discard(record.id)
        if now == self._looked:
            self.abandoned = self.ledger.counts["running"] - len(self.mine)

    def release(self) -> None:
        """Give back what did not end, so that others, or the next session, may have it."""
        names, self.mine = self.mine, set()
        for name in names:
            record = self.ledger.records[name]
            try:
                if record.attempts == 1:
                    self.store.attr(record.number, "attempts", 1)  # else it is written already
                self.store.release(record.number)
                if self.lease is not None:
                    self.lease.drop(name)
            except (StorageError, UpdateFinishedTrialError):
                return  # the storage is gone: whoever comes next finds these trials without a driver
            self.ledger.set(record, "waiting")
