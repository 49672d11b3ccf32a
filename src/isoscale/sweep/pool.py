"""Several independent runs on a few pinned worker processes, each run resumable in its own folder."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from isoscale._base.errors import IsoscaleError
from isoscale.config import RunConfig
from isoscale.sweep.executors.base import PINNED
from isoscale.sweep.one import run_one, stop_politely

WATCH = 0.5  # seconds between looks at the metric files


@dataclass(frozen=True)
class PoolStatus:
    """What a progress display gets: optimiser steps over all runs, and the time left."""

    steps_done: int
    steps: int
    runs_done: int
    runs: int
    seconds_left: float


def _train(config: RunConfig, folder: Path) -> float:
    return run_one(config, folder)[0]


def _lines(path: Path) -> int:
    return path.read_bytes().count(b'"kind":"train"') if path.exists() else 0


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
        IsoscaleError: whatever a run refuses.
    """
    out.mkdir(parents=True, exist_ok=True)
    total = sum(config.train.steps for config in jobs.values())
    before = {name: os.environ.get(name) for name in PINNED}
    os.environ.update(PINNED)  # the spawned processes inherit it
    started, first = time.perf_counter(), _steps(jobs, out)
    try:
        with ProcessPoolExecutor(workers, get_context("spawn"), initializer=stop_politely) as pool:
            futures: dict[Future[float], str] = {
                pool.submit(_train, config, out / name): name for name, config in jobs.items()
            }
            pending = set(futures)
            try:
                while pending:
                    finished, pending = wait(pending, timeout=WATCH, return_when=FIRST_COMPLETED)
                    for future in finished:
                        future.result()
                    if on_status is not None:
                        done = _steps(jobs, out)
                        rate = (done - first) / (time.perf_counter() - started)
                        left = (total - done) / rate if rate > 0 else float("nan")
                        on_status(PoolStatus(done, total, len(jobs) - len(pending), len(jobs), left))
            except BrokenProcessPool:
                hint = "is there enough memory? --resume continues where it was"
                raise IsoscaleError("a training process was killed", place=str(out), hint=hint) from None
            except BaseException:
                workers_now = list((pool._processes or {}).values())
                pool.shutdown(wait=False, cancel_futures=True)
                for process in workers_now:
                    process.terminate()
                raise
            return {name: future.result() for future, name in futures.items()}
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _steps(jobs: Sequence[str] | Mapping[str, RunConfig], out: Path) -> int:
    return sum(_lines(out / name / "metrics.jsonl") for name in jobs)
