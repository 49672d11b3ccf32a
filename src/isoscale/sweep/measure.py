"""How many workers: a few steps of the very run with one, two, four ... processes at once, and the best throughput.

Each process is what a worker is (one pinned thread, its own model and data) and stays alive through the measurement,
so that imports, kernels and compilation are paid once and are not counted. Counts double until more does not help.
On a GPU several processes share the card, and several cards are filled in turn; a count that does not fit into their
memory is not taken.
What is lost: a machine that does other work meanwhile is measured with it.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from isoscale._base.errors import IsoscaleError
from isoscale.config import RunConfig
from isoscale.sweep.executors.base import cards_of, environment

WINDOW = 1.5  # seconds a count is measured for
WARM = 3  # steps before
PER_CARD = 8
GAIN = 1.05  # a larger count is taken for this much more throughput
PATIENCE = 300.0  # seconds that a process may take to get ready: torch.compile


@dataclass(frozen=True)
class Measured:
    """What was found; `int(...)` is the number of workers.

    Args:
        workers: the count to use.
        seconds_per_step: of each worker, while that many run.
        rates: workers -> steps per second, all together; empty where nothing could be measured.
    """

    workers: int
    seconds_per_step: float
    rates: Mapping[int, float]

    def __int__(self) -> int:
        return self.workers

    def seconds(self, runs: int, steps: int) -> float:
        """Wall time of so many runs of so many steps; the last round may be a partial one."""
        return math.ceil(runs / self.workers) * steps * self.seconds_per_step


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def counts(limit: int) -> list[int]:
    """1, 2, 4 ... up to the limit, which is the last."""
    return [*(2**k for k in range(limit.bit_length()) if 2**k < limit), limit]


def pick(rates: Mapping[int, float]) -> int:
    """The count to take: a larger one only for `GAIN` as much throughput."""
    best = min(rates)
    for count in sorted(rates):
        if rates[count] > GAIN * rates[best]:
            best = count
    return best


def pick_workers(
    config: RunConfig, limit: int | None = None, *, on_line: Callable[[str], None] | None = None
) -> Measured:
    """Measure, and pick the number of workers with the best throughput.

    Args:
        config: of the trials.
        limit: most workers; default one per core and thread of a run, or 8 per GPU.
        on_line: gets one line per count.

    Raises:
        IsoscaleError: the run cannot start at all; says why.
    """
    say = on_line or (lambda _line: None)
    per_run = max(1, config.train.threads)
    if config.sweep.command:  # a trial's own command cannot be timed in pieces
        say(f"workers: {limit or cores()} (a command of its own is not measured)")
        return Measured(limit or cores(), math.nan, {})
    cards = cards_of(config)
    most = limit or PER_CARD * len(cards) or max(1, cores() // per_run)
    rates: dict[int, float] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="isoscale-")))
        (folder / "run.json").write_text(config.model_dump_json(exclude_unset=True), encoding="utf-8")
        crew: list[_Process] = []
        for count in counts(most):
            fresh = [_Process(folder, number, cards) for number in range(len(crew), count)]
            for process in fresh:
                stack.callback(process.close)
            crew += fresh
            try:
                rate = _together(crew, fresh)
            except IsoscaleError:
                if not rates:
                    raise
                say(f"{count} workers: do not fit")
                break
            rates[count] = rate
            say(f"{count} worker{'s' * (count > 1)}: {rate:.3g} steps/s")
            if pick(rates) != count:
                break
    best = pick(rates)
    return Measured(best, best / rates[best], rates)


def _together(crew: list[_Process], fresh: list[_Process]) -> float:
    """Steps per second of all processes at once."""
    for process in fresh:
        process.hear()  # ready
    for process in crew:
        process.tell(f"{WINDOW}")
    return sum(float(process.hear()) for process in crew)


class _Process:
    """One process under measurement: a line in, a line out."""

    def __init__(self, folder: Path, number: int, cards: Sequence[str]) -> None:
        self.log = folder / f"{number}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "isoscale.sweep.measure", str(folder / "run.json"), str(folder / str(number))],
                env=environment(number, cards), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip

    def tell(self, line: str) -> None:
        """Send a line."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._gone() from None

    def hear(self) -> str:
        """The next line.

        Raises:
            IsoscaleError: the process has ended; with its last words.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        if not line:
            raise self._gone()
        return line

    def _gone(self) -> IsoscaleError:
        self.process.wait(timeout=PATIENCE)
        lines = self.log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
        return IsoscaleError(f"a measured run ended: {lines[-1][:300]}", key="sweep.workers", value="auto",
                             hint="isoscale train shows the whole error; or sweep.workers = 1")  # fmt: skip

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.communicate()


def serve(config: RunConfig, out: Path) -> None:
    """In the process: warm up, say so, then for each line of seconds step that long and answer steps per second."""
    import torch

    from isoscale.train.loop import stepper

    step = stepper(config, out)
    number = 0
    for number in range(WARM):
        step(number)
    print("ready", flush=True)
    for line in sys.stdin:
        begun, done = time.perf_counter(), 0
        while not done or time.perf_counter() - begun < float(line):
            number += 1
            step(number % config.train.steps)
            done += 1
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        print(done / (time.perf_counter() - begun), flush=True)


if __name__ == "__main__":
    try:
        serve(RunConfig.model_validate_json(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
    except IsoscaleError as error:
        sys.exit(" ".join(str(error).split()))  # one line, the log's last
