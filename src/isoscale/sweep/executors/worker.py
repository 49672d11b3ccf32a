"""A worker process: jobs come in through a socket, messages go out, until the other end is gone.

Runs as `python -m isoscale.sweep.executors.worker FD`. A thread listens, so that a trial can be ended at any line of
its code: the listener signals the main thread, where the handler raises. The driver's death closes the socket, which
ends the worker as an interruption does: its run saves a checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import queue
import signal
import sys
import threading
from dataclasses import asdict
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any

from isoscale.sweep.job import Job, Outcome, Pruned, Reporter, execute

PATIENCE = 30.0  # seconds that an interrupted run has to save itself once the driver is gone


class Worker:
    """One job after the other.

    Args:
        line: the socket to the driver.
    """

    def __init__(self, line: Connection) -> None:
        self.line = line
        self.jobs: queue.Queue[Job | None] = queue.Queue()
        self.now, self.unwanted = "", ""
        self.sending = False  # half a message would spoil the line: a signal waits for its end
        signal.signal(signal.SIGTERM, self._interrupt)
        signal.signal(signal.SIGUSR1, self._prune)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    def _prune(self, number: int, frame: FrameType | None) -> None:
        if self.now and self.unwanted == self.now and not self.sending:
            self.unwanted = ""  # once
            raise Pruned

    def listen(self) -> None:
        """The listener's loop."""
        main = threading.main_thread().ident or 0
        try:
            while True:
                message = json.loads(self.line.recv_bytes())
                if "stop" in message:
                    self.unwanted = message["stop"]
                    signal.pthread_kill(main, signal.SIGUSR1)
                else:
                    self.jobs.put(Job(**message))
        except (EOFError, OSError):
            self.jobs.put(None)
            signal.pthread_kill(main, signal.SIGTERM)
            threading.Event().wait(PATIENCE)
            os._exit(1)

    def send(self, **message: Any) -> None:
        """To the driver; one that is gone hears nothing."""
        self.sending = True
        try:
            self.line.send_bytes(json.dumps(message).encode())
        except OSError:
            raise KeyboardInterrupt from None
        finally:
            self.sending = False

    def report(self, share: float, loss: float) -> bool:
        """Send a report; the answer, if any, comes as a signal, unless one came while sending."""
        self.send(id=self.now, share=share, loss=loss)
        return self.unwanted == self.now

    def work(self) -> None:
        """Until the driver is gone."""
        threading.Thread(target=self.listen, daemon=True).start()
        while (job := self.jobs.get()) is not None:
            try:
                self.now = job.id
                outcome = execute(job, Reporter(self.report))
                self.now = ""
            except Pruned:  # the signal came between the last line of the trial and here
                outcome = Outcome(math.nan, state="pruned")
            self.now = ""
            self.send(id=job.id, outcome=asdict(outcome))


if __name__ == "__main__":
    sys.path[:] = json.loads(os.environ.pop("ISOSCALE_PATH", "null")) or sys.path
    try:
        Worker(Connection(int(sys.argv[1]))).work()
    except KeyboardInterrupt:
        sys.exit(130)
