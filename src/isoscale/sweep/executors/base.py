"""What an executor is: it takes jobs and gives messages. It knows neither the storage nor the strategy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from isoscale.sweep.job import Job, Outcome

# One thread a worker; and glibc keeps freed pages, which saves up to a fifth of a CPU step.
PINNED = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "2000000000",
          "MALLOC_TRIM_THRESHOLD_": "2000000000"}  # fmt: skip


@dataclass(frozen=True)
class Reported:
    """A running trial's loss at a share of its tokens."""

    id: str
    share: float
    loss: float


@dataclass(frozen=True)
class Finished:
    """A trial has ended by itself."""

    id: str
    outcome: Outcome


@dataclass(frozen=True)
class Died:
    """A trial's worker is gone, and the trial with it; `reason` is the last that was heard of it."""

    id: str
    reason: str


Message = Reported | Finished | Died

Hear = Callable[[Reported], bool]
"""What an executor that blocks while a trial runs calls for each report; True: the trial should end."""


class Executor(Protocol):
    """What an executor is."""

    @property
    def free(self) -> int:
        """Jobs that could start now."""
        ...

    def start(self, job: Job) -> None:
        """Begin a job; only while one is free."""
        ...

    def poll(self, seconds: float) -> list[Message]:
        """What happened; waits up to so long for something to happen."""
        ...

    def stop(self, id: str) -> None:
        """End a running job, which then finishes as `pruned`; one that has finished meanwhile stays as it is."""
        ...

    def close(self, polite: bool) -> None:
        """End every worker. Politely: running trials save what they have first."""
        ...
