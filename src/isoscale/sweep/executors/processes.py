"""Trials in worker processes of this machine, one pinned thread each; a killed one is replaced.

The workers are spawned by command line, not forked, and stand in sessions of their own: a Ctrl-C in the terminal
reaches the driver alone, which then decides whether they may save themselves. They load torch only when a job does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path

from isoscale._base.errors import ConfigError, StorageError
from isoscale.sweep.executors.base import Died, Finished, Message, Reported, environment
from isoscale.sweep.job import Job, Outcome

PATIENCE = 30.0  # seconds that a worker has to save its run before it is killed


@dataclass
class _Worker:
    """A process, the driver's end of its socket, and its job."""

    number: int
    process: subprocess.Popen[bytes]
    line: Connection
    job: str = ""


class Processes:
    """See `Executor`.

    Args:
        workers: how many, at most; started when needed.
        out: folder of their logs, `worker_N.log`.
        cards: see `cards_of`; worker N gets the N-th, over and over.
    """

    def __init__(self, workers: int, out: Path, cards: Sequence[str] = ()) -> None:
        if sys.platform == "win32":
            raise ConfigError("worker processes need POSIX sockets", key="sweep.executor", value="processes",
                              hint='sweep.executor = "inline"')  # fmt: skip
        self.size, self.out, self.cards = workers, out, cards
        self.workers: list[_Worker] = []

    @property
    def free(self) -> int:
        """See `Executor`."""
        return self.size - sum(bool(worker.job) for worker in self.workers)

    def start(self, job: Job) -> None:
        """See `Executor`. A worker that was killed while idle is replaced."""
        message = json.dumps(job.to_dict()).encode()
        while True:
            idle = next((worker for worker in self.workers if not worker.job), None) or self._spawn()
            try:
                idle.line.send_bytes(message)
            except OSError:
                self._bury(idle)
                continue
            idle.job = job.id
            return

    def poll(self, seconds: float) -> list[Message]:
        """See `Executor`."""
        if not self.workers:
            time.sleep(seconds)
            return []
        ready = wait([worker.line for worker in self.workers], timeout=seconds)
        found: list[Message] = []
        for worker in [worker for worker in self.workers if worker.line in ready]:
            try:
                while worker.line.poll():
                    found.append(self._read(worker, json.loads(worker.line.recv_bytes())))
            except (EOFError, OSError, ValueError):
                job, reason = worker.job, self._bury(worker)
                if job:
                    found.append(Died(job, reason))
        return found

    def stop(self, id: str) -> None:
        """See `Executor`."""
        for worker in self.workers:
            if worker.job == id:
                try:
                    worker.line.send_bytes(json.dumps({"stop": id}).encode())
                except OSError:
                    return  # `poll` will find it dead

    def close(self, polite: bool) -> None:
        """See `Executor`."""
        for worker in self.workers if polite else ():
            worker.process.terminate()
        until = time.monotonic() + PATIENCE
        for worker in self.workers if polite else ():
            try:
                worker.process.wait(timeout=max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                continue
        while self.workers:
            self._bury(self.workers[0])

    def _read(self, worker: _Worker, message: dict[str, object]) -> Message:
        name = str(message["id"])
        if "outcome" in message:
            worker.job = ""
            return Finished(name, Outcome(**message["outcome"]))  # type: ignore[arg-type]
        return Reported(name, float(message["share"]), float(message["loss"]))  # type: ignore[arg-type]

    def _spawn(self) -> _Worker:
        used = {worker.number for worker in self.workers}
        number = next(n for n in range(len(used) + 1) if n not in used)
        ours, theirs = Pipe()
        command = [sys.executable, "-m", "isoscale.sweep.executors.worker", str(theirs.fileno())]
        path = json.dumps([path or os.getcwd() for path in sys.path])
        env = {**environment(number, self.cards), "ISOSCALE_PATH": path}
        try:
            with (self.out / f"worker_{number}.log").open("ab") as log:
                process = subprocess.Popen(command, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                                           pass_fds=(theirs.fileno(),), start_new_session=True)  # fmt: skip
        except OSError as error:
            raise StorageError(f"a worker process cannot be started: {error.strerror}", place=str(self.out),
                               hint="is there enough memory and disk? --resume continues") from None  # fmt: skip
        finally:
            theirs.close()
        worker = _Worker(number, process, ours)
        self.workers.append(worker)
        return worker

    def _bury(self, worker: _Worker) -> str:
        """Make sure that it is dead; its last words."""
        worker.process.kill()
        status = worker.process.wait()
        worker.line.close()
        self.workers.remove(worker)
        return f"signal {-status}" if status < 0 else f"exit status {status}: {self._last_words(worker.number)}"

    def _last_words(self, number: int) -> str:
        lines = (self.out / f"worker_{number}.log").read_text(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else "nothing in its log"
