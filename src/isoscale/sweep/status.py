"""What a progress display is told, and when."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from isoscale.sweep.budget import Estimate
from isoscale.sweep.ledger import Ledger
from isoscale.sweep.space import show

SHOW = 0.4  # seconds between two statuses


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


class Teller:
    """Tells a display how a search stands.

    Args:
        ledger: what is known.
        estimate: of the whole search.
        on_status: the display; None: nobody.
    """

    def __init__(self, ledger: Ledger, estimate: Estimate, on_status: Callable[[Status], None] | None) -> None:
        self.ledger, self.estimate, self.on_status = ledger, estimate, on_status
        self.begun, self.shown = time.monotonic(), -math.inf
        self.first = 0  # trials that had ended before this session
        self._best: tuple[int, str, float] = (-1, "", math.nan)  # how many had ended, the best point then, its loss

    def __call__(self, over: bool, *, force: bool = False) -> None:
        """Tell, if it is time.

        Args:
            over: whether no more trials will come.
            force: tell in any case.
        """
        now, ledger = time.monotonic(), self.ledger
        if self.on_status is None or not (force or now - self.shown >= SHOW):
            return
        self.shown, done, total = now, ledger.ended, len(ledger.records)
        if self._best[0] != done:
            finite = [trial for trial in ledger.trials() if trial.state == "done" and math.isfinite(trial.loss)]
            best = min(finite, key=lambda trial: trial.loss, default=None)
            self._best = (done, show(best.point) if best else "", best.loss if best else math.nan)
        fresh, runs = done - self.first, total if over else max(total, self.estimate.runs or 0)
        left = (now - self.begun) / fresh * (runs - done) if fresh else math.nan
        counts = ledger.counts
        self.on_status(Status(done, runs, *self._best[1:], left, self.estimate, counts["failed"], counts["pruned"],
                              counts["running"]))  # fmt: skip
