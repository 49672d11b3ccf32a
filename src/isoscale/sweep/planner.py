"""What comes next in a search: the strategy is asked, the budget kept, the best confirmed. For the leader alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from isoscale.config import RunConfig
from isoscale.sweep.budget import Budget, enough
from isoscale.sweep.ledger import ENDED, Ledger, Record
from isoscale.sweep.result import means
from isoscale.sweep.space import Point, Space, identity
from isoscale.sweep.store import Store
from isoscale.sweep.strategies import Strategy
from isoscale.sweep.winner import candidates, fresh_seeds


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
    pace: float = math.nan  # seconds per run, all workers together, where it was measured


class Planner:
    """Writes new trials.

    Args:
        setup: what is searched.
        store: the study.
        ledger: what is known of it.
    """

    def __init__(self, setup: Setup, store: Store, ledger: Ledger) -> None:
        self.setup, self.store, self.ledger = setup, store, ledger
        self.stopped = ""  # what ended the search early
        self.over = self.confirming = False
        self.asked = (-1, -1, -1)  # what was known when the strategy was last asked
        self.ranges = {dim.name: (dim.low, dim.high) for dim in setup.space.dims}

    def plan(self, room: int) -> None:
        """Ask the strategy, enqueue, stop when it is enough.

        Args:
            room: how many trials could start now.
        """
        while not self.over and self.ledger.counts["waiting"] < max(room, 1):
            known = (self.ledger.ended, len(self.ledger.records), room)
            if known == self.asked:
                return  # nothing that could change the answer
            self.asked, trials = known, self.ledger.trials()
            if enough(self.setup.config, trials):
                self.stopped, self.over = "sweep.enough", True
                break
            wanted = self.ledger.incomplete()
            if not wanted:
                points = self.setup.strategy.ask(trials, max(1, room - self.ledger.counts["waiting"]))
                pairs = [(point, seed) for point in points or () for seed in self.ledger.seeds]
                wanted = [pair for pair in pairs if identity(*pair) not in self.ledger.records]
                if points is None:
                    self.over = True
                elif pairs and not wanted and not self.ledger.open:
                    self.stopped, self.over = "repetition: the strategy asks only for points that it knows", True
            for point, seed in wanted:
                if cut := self.setup.budget.exhausted(len(self.ledger.records), self.tokens()):
                    self.stopped, self.over = cut, True
                    break
                self.create(point, seed)
        if self.over and not self.confirming and not self.ledger.open:
            self.confirm()

    def confirm(self) -> None:
        """The best points once more, with seeds that nobody has used."""
        section, self.confirming = self.setup.config.sweep, True
        if not section.confirm_seeds:
            return
        rows = self.ledger.rows()
        used = [row.seed for row in rows if not row.confirm] or [self.setup.config.seed]
        for point in candidates(means(rows), section.confirm):
            for seed in fresh_seeds(used, section.confirm_seeds):
                if identity(point, seed) in self.ledger.records:
                    continue
                if cut := self.setup.budget.exhausted(len(self.ledger.records), self.tokens(), confirming=True):
                    self.stopped = cut
                    return
                self.create(point, seed, confirm=True)

    def tokens(self) -> float:
        """Spent so far, and promised to what is open."""
        return math.fsum(record.tokens if record.state in ENDED else self.setup.budget.tokens
                         for record in self.ledger.records.values())  # fmt: skip

    def create(self, point: Point, seed: int, attempts: int = 0, *, confirm: bool = False) -> None:
        """Add a waiting trial."""
        name = identity(point, seed)
        attrs = {"id": name, "point": dict(point), "seed": seed, "folder": f"trials/{name}"}
        attrs |= {"confirm": True} if confirm else {}
        number = self.store.create(point, self.ranges, attrs)
        self.ledger.put(Record(name, point, seed, number, attempts=attempts, confirm=confirm))
