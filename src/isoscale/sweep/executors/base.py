"""What an executor is: it takes jobs and gives messages. It knows neither the storage nor the strategy."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from isoscale.config import RunConfig
from isoscale.sweep.job import Job, Outcome

# One thread a worker; and glibc keeps freed pages, which saves up to a fifth of a CPU step.
PINNED = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "2000000000",
          "MALLOC_TRIM_THRESHOLD_": "2000000000"}  # fmt: skip


def cards_of(config: RunConfig) -> tuple[str, ...]:
    """The GPUs of this machine that trials are spread over, as CUDA_VISIBLE_DEVICES names them; none on a CPU.

    A config that names one card (`cuda:1`) keeps to it.
    """
    if config.train.device not in ("auto", "cuda"):
        return ()
    import torch

    seen = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    count = torch.cuda.device_count()
    return tuple(seen[:count] or map(str, range(count)))


def environment(number: int, cards: Sequence[str]) -> dict[str, str]:
    """What worker `number` is started with: one thread, and one card, which it shares with every n-th of n cards."""
    return {**os.environ, **PINNED, **({"CUDA_VISIBLE_DEVICES": cards[number % len(cards)]} if cards else {})}


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
