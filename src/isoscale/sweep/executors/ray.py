"""Trials as tasks of a Ray cluster: one on this machine, or a running one by its address.

A task gets its job as plain values and returns its outcome; reports go through a small actor that the driver empties.
Ray retries nothing by itself: a lost worker is reported as a death, and the driver starts the trial again. Run folders
are made at the driver's path, so on a real cluster that path must be on a disk that all nodes share: without it a trial
that moves to another node starts anew, and its files stay where it ran.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import sys
import threading
import time
from dataclasses import asdict
from typing import Any

from isoscale._base.errors import StorageError
from isoscale._base.optional import need
from isoscale.sweep.executors.base import PINNED, Died, Finished, Message, Reported
from isoscale.sweep.job import Job, Outcome, Reporter, execute

STORE = 80_000_000  # bytes of shared memory for objects: jobs and outcomes are small
KNOCK = 10.0  # seconds for a cluster to answer
PATIENCE = 30.0  # seconds that a running trial has to save itself


class _Mailbox:
    """Reports on their way to the driver; an actor."""

    def __init__(self) -> None:
        self.held: list[tuple[str, float, float]] = []

    def put(self, id: str, share: float, loss: float) -> None:
        """Keep a report."""
        self.held.append((id, share, loss))

    def take(self) -> list[tuple[str, float, float]]:
        """Hand over all reports."""
        held, self.held = self.held, []
        return held


def _run(job: dict[str, Any], mailbox: Any) -> dict[str, Any]:
    """The task; a cancelled one sees a KeyboardInterrupt, as any interrupted run."""

    def send(share: float, loss: float) -> bool:
        mailbox.put.remote(job["id"], share, loss)
        return False

    return asdict(execute(Job(**job), Reporter(send)))


def _knock(address: str | None) -> None:
    """Ask whether anybody listens at `host:port`, since Ray itself waits for minutes.

    Raises:
        OSError: nobody does.
    """
    host, colon, port = (address or "").rpartition("://")[2].rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK).close()


class Ray:
    """See `Executor`.

    Args:
        workers: trials at a time.
        address: of a running cluster; None: one is started here and ended by `close`.
        gpus: whether trials use the cluster's GPUs, each an equal share.

    Raises:
        MissingDependencyError: Ray is not installed.
        StorageError: the cluster cannot be reached.
    """

    def __init__(self, workers: int, address: str | None, *, gpus: bool) -> None:
        self.ray = ray = need("ray", "ray")
        self.size = workers
        self.running: dict[Any, str] = {}
        self.stopping: set[str] = set()
        self.own = not ray.is_initialized()
        path = os.pathsep.join(part or os.getcwd() for part in sys.path)
        env = {"env_vars": {**PINNED, "PYTHONPATH": path}}
        quiet = {"log_to_driver": False, "logging_level": logging.CRITICAL, "configure_logging": True}
        small = {"num_cpus": workers, "object_store_memory": STORE, "include_dashboard": False}
        local = {} if address else small
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if self.own:
            handler = signal.getsignal(signal.SIGTERM)  # Ray puts its own in place, which exits at once
            try:
                _knock(address)
                ray.init(address=address or "local", runtime_env=env, **quiet, **local)
                if threading.current_thread() is threading.main_thread():
                    signal.signal(signal.SIGTERM, handler)
            except (ConnectionError, RuntimeError, ValueError, OSError, TimeoutError) as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
                raise StorageError(
                    f"the Ray cluster cannot be reached: {reason}", key="sweep.ray_address", value=address,
                    hint="ray status on its head node; none starts one here",
                ) from None  # fmt: skip
        cards = ray.cluster_resources().get("GPU", 0.0) if gpus else 0.0
        share = 1 / math.ceil(workers / cards) if cards else 0.0  # a card takes a whole number of trials
        self.task = ray.remote(_run).options(num_cpus=1, num_gpus=share, max_retries=0)
        self.mailbox = ray.remote(_Mailbox).options(num_cpus=0, max_restarts=-1, max_task_retries=-1).remote()

    @property
    def free(self) -> int:
        """See `Executor`."""
        return self.size - len(self.running)

    def start(self, job: Job) -> None:
        """See `Executor`."""
        self.running[self.task.remote(job.to_dict(), self.mailbox)] = job.id

    def poll(self, seconds: float) -> list[Message]:
        """See `Executor`."""
        if not self.running:
            time.sleep(seconds)
            return []
        ready, _ = self.ray.wait(list(self.running), num_returns=1, timeout=min(seconds, 0.1))
        found: list[Message] = self._reports()
        for task in ready:
            found.append(self._ended(self.running.pop(task), task))
        return found

    def _reports(self) -> list[Message]:
        try:
            return [Reported(*report) for report in self.ray.get(self.mailbox.take.remote(), timeout=30)]
        except self.ray.exceptions.RayError:
            return []  # the mailbox moves to another node; a report is no loss

    def _ended(self, name: str, task: Any) -> Message:
        stopped, errors = name in self.stopping, self.ray.exceptions
        self.stopping.discard(name)
        try:
            return Finished(name, Outcome(**self.ray.get(task)))
        except errors.TaskCancelledError:
            return Finished(name, Outcome(float("nan"), state="pruned")) if stopped else Died(name, "cancelled")
        except errors.RayTaskError as error:
            if stopped:
                return Finished(name, Outcome(float("nan"), state="pruned"))
            if isinstance(getattr(error, "cause", None), KeyboardInterrupt):
                return Died(name, "interrupted")
            last = str(error).strip().splitlines()[-1]
            return Finished(name, Outcome(float("nan"), state="failed", error=last))
        except errors.RayError as error:
            return Died(name, type(error).__name__)

    def stop(self, id: str) -> None:
        """See `Executor`."""
        for task, name in self.running.items():
            if name == id:
                self.stopping.add(id)
                self.ray.cancel(task, force=False)

    def close(self, polite: bool) -> None:
        """See `Executor`."""
        try:
            tasks = list(self.running)
            for task in tasks:
                self.ray.cancel(task, force=not polite)
            if tasks and polite:
                self.ray.wait(tasks, num_returns=len(tasks), timeout=PATIENCE)
        finally:
            self.running.clear()
            if self.own:
                self.ray.shutdown()


