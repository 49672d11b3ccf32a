"""Running a sweep: enqueue a phase, keep workers alive, watch, next phase. Killed workers' trials come back."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import optuna

from isoscale._base.errors import ConfigError, IsoscaleError
from isoscale._base.files import atomic_write
from isoscale._base.log import dumps
from isoscale.config import RunConfig
from isoscale.sweep.budget import affordable
from isoscale.sweep.result import SweepResult, TrialRow, means, summarise, trial_rows
from isoscale.sweep.space import Point, identity, show
from isoscale.sweep.store import RETRIES, open_study
from isoscale.sweep.strategies import make
from isoscale.train.data import load_corpus
from isoscale.train.folder import check, claim, locked
from isoscale.train.setup import meta_plan, resolved

WATCH = 0.5  # seconds between looks
# One thread a worker; and glibc keeps freed pages, which saves up to a fifth of a CPU step.
PINNED = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "2000000000",
          "MALLOC_TRIM_THRESHOLD_": "2000000000"}  # fmt: skip


@dataclass(frozen=True)
class Status:
    """What a progress display gets.

    Args:
        done, total: trials of the sweep so far enqueued.
        best: the best point so far, in words; empty before the first.
        loss: its loss.
        seconds_left: estimate for what is enqueued; nan before the first trial is done.
    """

    done: int
    total: int
    best: str
    loss: float
    seconds_left: float


def _spawn(out: Path, number: int) -> subprocess.Popen[bytes]:
    env = {**os.environ, **PINNED}
    command = [sys.executable, "-m", "isoscale.sweep.worker", str(out), str(os.getpid())]
    with (out / f"worker_{number}.log").open("ab") as log:
        return subprocess.Popen(command, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL)


def sweep(
    config: RunConfig, out: Path | str, *, resume: bool = False, on_status: Callable[[Status], None] | None = None
) -> SweepResult:
    """Search hyperparameters with the config's strategy; every trial is a resumable run under `out/trials`.

    Args:
        config: the proxy and its sweep section.
        out: sweep folder, with `run.json`, `study.db` (open to optuna-dashboard), `trials/` and `sweep.json`.
        resume: continue the sweep that is there.
        on_status: called about twice a second.

    Raises:
        IsoscaleError: a bad config, an unpayable budget, a folder of another sweep, workers that keep dying (with the
            last line of their log).
    """
    out, config = Path(out).resolve(), resolved(config)
    check(out, config, resume=resume, kind="sweep")
    corpus = load_corpus(config.data.source, config.data.tokenizer, val_fraction=config.data.val_fraction,
                         cache=Path(config.data.cache) if config.data.cache else None,
                         seq_len=config.data.seq_len)  # fmt: skip
    meta_plan(config, corpus.vocab)  # a config that no trial could run is refused here, and the largest values too
    for name, values in config.sweep.space.items():
        meta_plan(config.with_values(**{f"hps.{name}": max(values)}), corpus.vocab)
    strategy, limit = make(config.sweep, config.seed), affordable(config, corpus.vocab)
    with locked(out):
        claim(out, config, resume=resume, kind="sweep")
        study = open_study(out, create=True)
        study.set_user_attr("stop", False)
        watch = _Watch(out, config, study, on_status)
        try:
            watch.revive()
            phase = 0
            while (points := strategy.next_points(phase, means(trial_rows(study)))) is not None:
                cut = watch.enqueue(points, limit)
                watch.drain()
                if cut:
                    break
                phase += 1
        finally:
            study.set_user_attr("stop", True)
            watch.close()
    result = summarise(out, config, study)
    if not result.best:
        raise ConfigError(
            "every run of the sweep diverged or failed",
            key="sweep.space",
            place=str(out),
            hint="lower learning rates; the trials' folders hold the details",
        )
    atomic_write(out / "sweep.json", dumps(result.to_dict(), indent=1))
    return result


class _Watch:
    """Worker processes and the queue they empty."""

    def __init__(
        self, out: Path, config: RunConfig, study: optuna.Study, on_status: Callable[[Status], None] | None
    ) -> None:
        self.out, self.config, self.study, self.on_status = out, config, study, on_status
        self.workers: list[subprocess.Popen[bytes]] = []
        self.deaths, self.begun, self.before = 0, time.perf_counter(), 0
        self.revived: dict[str, int] = {}

    def revive(self) -> list[TrialRow]:
        """Put trials back into the queue whose worker was interrupted; those that an error ended are returned.

        Called at the start too, where a resumed sweep gives every failed trial another chance, errors included.
        """
        start, lost = not self.workers, []
        errors = {t.user_attrs["id"]: t.user_attrs["error"] for t in self.study.get_trials(deepcopy=False)
                  if "error" in t.user_attrs}  # fmt: skip
        for row in trial_rows(self.study):
            if row.state != "failed":
                continue
            count = self.revived.get(row.id, 0)
            if not start and (row.id in errors or count > RETRIES):
                lost.append(row)
                continue
            self.revived[row.id] = count + 1
            attrs = {"id": row.id, "point": dict(row.point), "seed": row.seed}
            self.study.enqueue_trial(dict(row.point), user_attrs=attrs)
        return lost

    def enqueue(self, points: list[Point], limit: float) -> bool:
        """Add the phase's (point, seed) pairs that are not there yet; True when the budget cut some off."""
        known = {row.id for row in trial_rows(self.study)}
        for seed in self.config.sweep.seeds or (self.config.seed,):
            for point in points:
                name = identity(point, seed)
                if name in known:
                    continue
                if len(known) >= limit:
                    return True
                known.add(name)
                self.study.enqueue_trial(dict(point), user_attrs={"id": name, "point": dict(point), "seed": seed})
        return False

    def drain(self) -> None:
        """Until nothing waits or runs."""
        self.before = sum(row.state == "done" for row in trial_rows(self.study))
        self.begun = time.perf_counter()
        while True:
            self.report()
            if lost := self.revive():
                raise IsoscaleError(
                    f"trial {lost[0].id} failed: {self._error(lost[0].id)}",
                    place=str(self.out),
                    key=show(lost[0].point),
                    hint="see worker_*.log; --resume tries again",
                )
            open_rows = [row for row in trial_rows(self.study) if row.state in ("waiting", "running")]
            if not open_rows:
                self.report()  # what ended since the first look
                return
            self._keep_alive(min(self.config.sweep.workers, len(open_rows)))
            optuna.storages.fail_stale_trials(self.study)
            time.sleep(WATCH)

    def _keep_alive(self, wanted: int) -> None:
        gone = [worker for worker in self.workers if worker.poll() is not None]
        self.deaths += len(gone)
        self.workers = [worker for worker in self.workers if worker.poll() is None]
        if self.deaths > (RETRIES + 1) * self.config.sweep.workers:
            raise IsoscaleError(
                "the sweep's workers keep dying",
                place=str(self.out / "worker_0.log"),
                value=self._last_words(),
                hint="read the log; isoscale train reproduces one trial",
            )
        while len(self.workers) < wanted:
            self.workers.append(_spawn(self.out, len(self.workers)))

    def _error(self, name: str) -> str:
        trials = [t for t in self.study.get_trials(deepcopy=False) if t.user_attrs.get("id") == name]
        found = [str(t.user_attrs["error"]) for t in trials if "error" in t.user_attrs]
        return found[-1] if found else f"its worker died {len(trials)} times"

    def _last_words(self) -> str:
        for log in sorted(self.out.glob("worker_*.log")):
            lines = log.read_text(errors="replace").strip().splitlines()
            if lines:
                return lines[-1][:300]
        return ""

    def report(self) -> None:
        """Tell the display."""
        if self.on_status is None:
            return
        now = summarise(self.out, self.config, self.study)
        done = sum(row.state == "done" for row in now.trials)
        fresh, spent = done - self.before, time.perf_counter() - self.begun
        left = spent / fresh * (len(now.trials) - done) if fresh else float("nan")
        self.on_status(Status(done, len(now.trials), show(now.best) if now.best else "", now.loss, left))

    def close(self) -> None:
        """Stop the workers: politely, then firmly."""
        for worker in self.workers:
            worker.terminate()
        for worker in self.workers:
            try:
                worker.wait(timeout=10)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
        self.workers = []
