"""The loop of a search. The driver alone talks to the storage; workers get jobs and send messages.

Alone (SQLite in the folder, whose lock keeps others out) every trial that is not finished is the driver's own. Together
with other drivers on one storage, the leader asks the strategy and writes new trials; everybody runs them, and takes
over what the dead have left. A strategy is a function of the trials, so it does not matter who leads, or when.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from isoscale._base.errors import IsoscaleError, StorageError
from isoscale.config import RunConfig
from isoscale.sweep.budget import Budget, Estimate, enough
from isoscale.sweep.executors import Died, Executor, Finished, Message, Reported
from isoscale.sweep.job import Job, Outcome
from isoscale.sweep.ledger import ENDED, Ledger, Record, key_of
from isoscale.sweep.pruning import hopeless
from isoscale.sweep.result import means
from isoscale.sweep.space import Point, Space, identity, show, trial_config
from isoscale.sweep.store import RETRIES, Store
from isoscale.sweep.strategies import Strategy
from isoscale.sweep.winner import candidates, fresh_seeds

if TYPE_CHECKING:
    from isoscale.sweep.lease import Lease

POLL = 0.5  # seconds between looks while nothing happens
SHOW = 0.4  # seconds between two statuses
REFRESH, LOOK = 1.0, 3.0  # seconds between looks at the storage, and at the other drivers
STATES = {"done": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}


@dataclass(frozen=True)
class Status:
    """What a progress display gets.

    Args:
        done, total: trials that have ended, trials so far enqueued.
        best: the best point so far, in words; empty before the first.
        loss: its loss.
        seconds_left: estimate for what is enqueued; nan before the first trial is done.
        estimate: what the whole search may cost.
        failed, pruned, running: of the trials.
    """

    done: int
    total: int
    best: str
    loss: float
    seconds_left: float
    estimate: Estimate | None = None
    failed: int = 0
    pruned: int = 0
    running: int = 0


@dataclass(frozen=True)
class Setup:
    """What a search is made of."""

    out: Path
    config: RunConfig
    objective: str
    space: Space
    strategy: Strategy
    budget: Budget
    workers: int = 1
    spent: float = 0.0  # seconds of earlier sessions


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
        self.setup, self.store, self.lease, self.on_status = setup, store, lease, on_status
        self.config, self.budget = setup.config, setup.budget
        self.ledger = Ledger(self.config.sweep.seeds or (self.config.seed,))
        self.mine: set[str] = set()
        self.again: list[Record] = []  # lost their worker; still this driver's
        self.stopped = ""
        self.over = self.confirming = False
        self.asked = (-1, -1, -1)  # what was known when the strategy was last asked
        self.abandoned = 0  # trials of others to be looked at once: their drivers may be dead
        self.begun = time.monotonic()
        self.first = 0  # trials that had ended before this session
        self._shown = self._read = self._looked = self._asked_lead = -math.inf
        self._leads = False
        self._best: tuple[int, str, float] = (-1, "", math.nan)  # how many had ended, the best point then, its loss
        self.counts = dict.fromkeys(("waiting", "running", *ENDED), 0)
        self.estimate = self.budget.estimate()
        self.ranges = {dim.name: (dim.low, dim.high) for dim in setup.space.dims}

    @property
    def seconds(self) -> float:
        """Wall time of the search, all sessions together."""
        return self.setup.spent + time.monotonic() - self.begun

    @property
    def ended(self) -> int:
        """Trials that have ended."""
        return sum(self.counts[state] for state in ENDED)

    @property
    def open(self) -> int:
        """Trials that wait or run."""
        return self.counts["waiting"] + self.counts["running"]

    def begin(self, *, retry: bool) -> None:
        """Read the study. Trials of a session that was cut off wait again; with `retry`, failed ones too."""
        self.refresh(force=True)
        for record in list(self.ledger.records.values()):
            if record.state == "running" and self.lease is None:
                self.store.release(record.number)
                self._set(record, "waiting")
            elif record.state == "failed" and retry and self.leads():
                self._create(record.point, record.seed, record.attempts, confirm=record.confirm)
        self.first = self.ended

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
        self.status(force=True)
        while True:
            self.refresh()
            limit = self.config.sweep.budget_seconds
            if limit is not None and self.seconds >= limit:
                self.stopped = "sweep.budget_seconds"
            elif self.leads():
                self.plan(executor)
            self.fill(executor)
            if self.finished():
                break
            self.handle(executor, executor.poll(POLL if self.lease is None else POLL / 2))
            self.check_failures()
            self.status()
        self.status(force=True)

    def finished(self) -> bool:
        """Whether the search has ended."""
        if self.mine:
            return False
        if self.stopped == "sweep.budget_seconds":
            return True
        return self.over and self.confirming and not self.open

    # what comes next

    def plan(self, executor: Executor) -> None:
        """Ask the strategy, enqueue, stop when it is enough."""
        room = executor.free
        if self.lease is not None:  # others want some too, and look only once a second
            room += (self.lease.drivers - 1) * self.setup.workers
        while not self.over and self.counts["waiting"] < max(room, 1):
            known = (self.ended, len(self.ledger.records), room)
            if known == self.asked:
                return  # nothing that could change the answer
            self.asked, trials = known, self.ledger.trials()
            if enough(self.config, trials):
                self.stopped, self.over = "sweep.enough", True
                break
            wanted = self.ledger.incomplete()
            if not wanted:
                points = self.setup.strategy.ask(trials, max(1, room - self.counts["waiting"]))
                pairs = [(point, seed) for point in points or () for seed in self.ledger.seeds]
                wanted = [pair for pair in pairs if identity(*pair) not in self.ledger.records]
                if points is None:
                    self.over = True
                elif pairs and not wanted and not self.open:
                    self.stopped, self.over = "repetition: the strategy asks only for points that it knows", True
            for point, seed in wanted:
                if cut := self.budget.exhausted(len(self.ledger.records), self.tokens()):
                    self.stopped, self.over = cut, True
                    break
                self._create(point, seed)
        if self.over and not self.confirming and not self.open:
            self.confirm()

    def confirm(self) -> None:
        """The best points once more, with seeds that nobody has used."""
        section, self.confirming = self.config.sweep, True
        if not section.confirm_seeds:
            return
        rows = self.ledger.rows()
        used = [row.seed for row in rows if not row.confirm] or [self.config.seed]
        for point in candidates(means(rows), section.confirm):
            for seed in fresh_seeds(used, section.confirm_seeds):
                if identity(point, seed) in self.ledger.records:
                    continue
                if cut := self.budget.exhausted(len(self.ledger.records), self.tokens(), confirming=True):
                    self.stopped = cut
                    return
                self._create(point, seed, confirm=True)

    def tokens(self) -> float:
        """Spent so far, and promised to what is open."""
        return math.fsum(record.tokens if record.state in ENDED else self.budget.tokens
                         for record in self.ledger.records.values())  # fmt: skip

    def _create(self, point: Point, seed: int, attempts: int = 0, *, confirm: bool = False) -> None:
        name = identity(point, seed)
        attrs = {"id": name, "point": dict(point), "seed": seed, "folder": f"trials/{name}"}
        attrs |= {"confirm": True} if confirm else {}
        number = self.store.create(point, self.ranges, attrs)
        old = self.ledger.records.get(name)
        if old is not None:
            self.counts[old.state] -= 1
        self.counts["waiting"] += 1
        self.ledger.put(Record(name, point, seed, number, attempts=attempts, confirm=confirm))

    # who runs it

    def fill(self, executor: Executor) -> None:
        """Start what may start."""
        while executor.free and self.again:
            self._start(executor, self.again.pop())
        if self.stopped == "sweep.budget_seconds" or not executor.free or not self.counts["waiting"] + self.abandoned:
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
        self._set(record, "running")
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
        self.status()
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
        self._set(record, outcome.state)
        if self.lease is not None:
            self.lease.drop(record.id)

    def _set(self, record: Record, state: str) -> None:
        self.counts[record.state] -= 1
        self.counts[state] += 1
        record.state = state
        self.ledger.changed(record)

    def check_failures(self) -> None:
        """Stop when too many points failed.

        Raises:
            IsoscaleError: with the first reason.
        """
        if self.counts["failed"] < self.config.sweep.max_failures:
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
        states = [record.state for record in self.ledger.records.values()]
        self.counts = {state: states.count(state) for state in self.counts}
        if now == self._looked:
            self.abandoned = self.counts["running"] - len(self.mine)

    def status(self, *, force: bool = False) -> None:
        """Tell the display."""
        now = time.monotonic()
        if self.on_status is None or not (force or now - self._shown >= SHOW):
            return
        self._shown, done, total = now, self.ended, len(self.ledger.records)
        if self._best[0] != done:
            finite = [t for t in self.ledger.trials() if t.state == "done" and math.isfinite(t.loss)]
            best = min(finite, key=lambda trial: trial.loss, default=None)
            self._best = (done, show(best.point) if best else "", best.loss if best else math.nan)
        fresh = done - self.first
        runs = max(total, self.estimate.runs or 0) if not self.over else total
        left = (time.monotonic() - self.begun) / fresh * (runs - done) if fresh else math.nan
        self.on_status(Status(done, runs, *self._best[1:], left, self.estimate, self.counts["failed"],
                              self.counts["pruned"], self.counts["running"]))  # fmt: skip

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
            self._set(record, "waiting")
