"""Trials in this process, one at a time: for debugging, and where a worker process is too much."""

from __future__ import annotations

from isoscale.sweep.executors.base import Finished, Hear, Message, Reported
from isoscale.sweep.job import Job, Reporter, execute


class Inline:
    """See `Executor`. `poll` returns when the trial has ended.

    Args:
        hear: asked at each report whether the trial should end.
    """

    def __init__(self, hear: Hear) -> None:
        self.hear = hear
        self.job: Job | None = None

    @property
    def free(self) -> int:
        """See `Executor`."""
        return int(self.job is None)

    def start(self, job: Job) -> None:
        """See `Executor`."""
        self.job = job

    def poll(self, seconds: float) -> list[Message]:
        """See `Executor`."""
        job = self.job
        if job is None:
            return []
        outcome = execute(job, Reporter(lambda share, loss: self.hear(Reported(job.id, share, loss))))
        self.job = None
        return [Finished(job.id, outcome)]

    def stop(self, id: str) -> None:
        """Nothing runs between two polls."""

    def close(self, polite: bool) -> None:
        """Nothing to end."""
        self.job = None
