"""What the crash tests save, and how they let a child process do it."""

import os
import signal
from collections.abc import Callable
from itertools import count

import torch

from isoscale._base import files
from isoscale.train import checkpoint

torch.set_num_threads(1)  # the tests fork, and a forked thread pool hangs


def tensors(step, rows):
    return {f"w{index}": torch.full((rows,), float(step + index)) for index in range(2)}


def save(run, step, rows, **options):
    model, optimizer = tensors(step, rows), tensors(-step, rows)
    checkpoint.save(run, step, model=model, optimizer=optimizer, state={"step": step}, plan="{}", **options)


def whole(found):
    """Whether all parts of a checkpoint belong to one step."""
    rows = len(found.model["w0"])
    for part, want in ((found.model, tensors(found.step, rows)), (found.optimizer, tensors(-found.step, rows))):
        if set(part) != set(want) or not all(torch.equal(part[name], want[name]) for name in want):
            return False
    return found.state == {"step": found.step}


def fork(work: Callable[[], object]) -> int:
    """Runs `work` in a forked child, which then exits at once; returns its process id."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return child


def killed_at(number: int, work: Callable[[], object]) -> bool:
    """Runs `work` in a child that kills itself at its failpoint of that number; False when it came to its end."""
    seen = count(1)

    def hook(name, path):
        if next(seen) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def armed():
        with files.failing(hook):
            work()

    return os.WIFSIGNALED(os.waitpid(fork(armed), 0)[1])
