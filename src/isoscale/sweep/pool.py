"""Several independent runs on a few worker processes, each run resumable in its own folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from isoscale._base.errors import IsoscaleError
from isoscale.config import RunConfig
from isoscale.sweep.executors.base import Died, Finished, cards_of
from isoscale.sweep.executors.processes import Processes
from isoscale.sweep.job import TRAIN, Job

WATCH = 0.5  # seconds between looks at the metric files


@dataclass(frozen=True)
class PoolStatus:
    """What a progress display gets: optimiser steps over all runs, and the time left."""

    steps_done: int
    steps: int
    runs_done: int
    runs: int
    seconds_left: float


def run_all(
    jobs: Mapping[str, RunConfig], out: Path, *, workers: int = 2,
    on_status: Callable[[PoolStatus], None] | None = None,
) -> dict[str, float]:  # fmt: skip
    """Train every config in `out / name`; the validation losses by name (inf: diverged).

    Args:
        jobs: folder name -> config, started in this order.
        out: parent folder.
        workers: processes, one pinned thread each.
        on_status: called about twice a second.

    Raises:
        IsoscaleError: a run refuses, or its process was killed; the others save what they have.
    """
    out.mkdir(parents=True, exist_ok=True)
    total = sum(config.train.steps for config in jobs.values())
    started, first = time.perf_counter(), _steps(jobs, out)
    todo = [Job(name, {}, config.seed, config.model_dump_json(), str((out / name).resolve()), TRAIN)
            for name, config in jobs.items()]  # fmt: skip
    losses: dict[str, float] = {}
    executor = Processes(workers, out, cards_of(next(iter(jobs.values()))))
    try:
        while len(losses) < len(jobs):
            while executor.free and todo:
                executor.start(todo.pop(0))
            for message in executor.poll(WATCH):
                if isinstance(message, Died):
                    raise IsoscaleError(f"the training process of {message.id} was killed: {message.reason}",
                                        place=str(out), hint="is there enough memory? --resume goes on")  # fmt: skip
                if isinstance(message, Finished):
                    if message.outcome.state == "failed":
                        raise IsoscaleError(f"{message.id}: {message.outcome.error}", place=str(out / message.id))
                    losses[message.id] = message.outcome.loss
            if on_status is not None:
                done = _steps(jobs, out)
                rate = (done - first) / (time.perf_counter() - started)
                left = (total - done) / rate if rate > 0 else float("nan")
                on_status(PoolStatus(done, total, len(losses), len(jobs), left))
    finally:
        executor.close(polite=len(losses) < len(jobs))
    return {name: losses[name] for name in jobs}


def _steps(names: Iterable[str], out: Path) -> int:
    return sum(_lines(out / name / "metrics.jsonl") for name in names)


def _lines(path: Path) -> int:
    return path.read_bytes().count(b'"kind":"train"') if path.exists() else 0
