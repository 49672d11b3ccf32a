"""Objectives without torch, and the worker processes of a driver, for the tests of searches."""

from __future__ import annotations

import math
import os
import signal
import time
from pathlib import Path

from isoscale.sweep.job import Outcome


def bowl(job, report):
    """A valley around lr = 2 and weight_decay = 0.05, tilted by the seed."""
    point = {"lr": 1.0, "weight_decay": 0.05, **job.point}
    return 2 + sum((math.log2(value) - math.log2(best)) ** 2 for value, best in
                   ((point["lr"], 2.0), (point["weight_decay"], 0.05))) + 0.01 * math.sin(job.seed + point["lr"])


def noted(job, report):
    """The same in most of a second, by small steps; each start leaves a line in the trial's folder, each end too."""
    folder = Path(job.folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "starts").open("a") as file:
        file.write(f"{os.getpid()}\n")
    for _ in range(16):
        time.sleep(0.05)
    loss = bowl(job, report)
    with (folder / "ends").open("a") as file:
        file.write(f"{os.getpid()}\n")
    return loss


def curves(job, report):
    """Reports at the rungs; bad points are bad from the start."""
    loss = bowl(job, report)
    for share in (0.1, 0.2, 0.3, 0.45, 0.6, 0.8):
        report(share, loss + 1 - share)
        time.sleep(0.02)
    return loss


def three_at_once(job, report):
    """Waits until three trials run; which card it sees, -1 for none."""
    folder = Path(job.folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "here").touch()
    until = time.monotonic() + 20
    while len(list(folder.parent.glob("*/here"))) < 3:
        if time.monotonic() > until:
            raise TimeoutError("the others did not start")
        time.sleep(0.02)
    return float(os.environ.get("CUDA_VISIBLE_DEVICES", "").replace(",", "") or -1)


def some_fail(job, report):
    """Rates above 3 fail with an error."""
    if job.point["lr"] > 3:
        raise ValueError(f"no model at {job.point['lr']:g}")
    return bowl(job, report)


def always_fails(job, report):
    """Nothing works."""
    raise ValueError("nothing works\nand this is a second line")


def kills_itself(job, report):
    """A worker that dies each time."""
    if job.point["lr"] == 2.0:
        os.kill(os.getpid(), signal.SIGKILL)
    return bowl(job, report)


def torch_free(job, report):
    """1 where the worker has loaded torch, else 0.5."""
    import sys

    return 1.0 if "torch" in sys.modules else 0.5


def forever(job, report):
    """Until interrupted, which is noted."""
    folder = Path(job.folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "started").touch()
    try:
        while True:
            time.sleep(0.05)
    except KeyboardInterrupt:
        (folder / "saved").touch()
        raise


def stubborn(job, report):
    """Does not end when asked."""
    folder = Path(job.folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "started").touch()
    while True:
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            continue


def outcome(job, report):
    """An outcome of its own."""
    return Outcome(math.inf if job.point["lr"] > 3 else 1.0, 7.0, diverged="w" if job.point["lr"] > 3 else "")


def workers(pid: int | None = None) -> list[int]:
    """Process ids of a driver's workers."""
    pid = pid or os.getpid()
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            try:
                command = Path(f"/proc/{child}/cmdline").read_bytes()
            except OSError:
                continue
            if b"isoscale.sweep.executors.worker" in command:
                found.append(int(child))
    return found


def own_wins(job, report):
    """Nothing beats the config as it is."""
    return float(len(job.point))
