"""A saver killed at random moments never leaves an unloadable run; an in-place writer does."""

import os
import random
import signal
import time
from itertools import count

import pytest
import saver
import torch

from isoscale.train import checkpoint

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
KILLS, ROWS = 20, 1 << 19  # 8 MB per checkpoint


def kill_at_random(step, rng):
    """Lets a child call `step(1)`, `step(2)`, ... and kills it soon after its first; the last number it reported."""
    reader, writer = os.pipe()

    def work():
        for number in count(1):
            step(number)
            os.write(writer, b".")

    child = saver.fork(work)
    os.close(writer)
    first = os.read(reader, 1)
    assert first, "the child died by itself"
    time.sleep(rng.uniform(0, 0.1))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    reported = first + os.read(reader, 1 << 16)
    os.close(reader)
    return len(reported)


def test_no_kill_leaves_a_run_unloadable(tmp_path):
    rng, last = random.Random(0), 0
    for _ in range(KILLS):
        reported = kill_at_random(lambda number, base=last: saver.save(tmp_path, base + number, ROWS), rng)
        found = checkpoint.load_latest(tmp_path)
        assert found.step >= last + reported, "a save that was reported is gone"
        assert found.skipped == ()
        assert saver.whole(found)
        last = found.step
    saver.save(tmp_path, last + 1, ROWS)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2  # what the kills left is swept


def test_control_an_in_place_writer_loses_its_file(tmp_path):
    rng, file = random.Random(0), tmp_path / "state.pt"
    for _ in range(KILLS):
        kill_at_random(lambda number: torch.save(saver.tensors(number, ROWS), file), rng)
        try:
            torch.load(file, weights_only=True)
        except Exception:  # whatever a torn archive raises
            return
    pytest.fail("no kill hurt the in-place writer")


def test_a_kill_at_every_failpoint_leaves_the_old_or_the_new(tmp_path):
    steps = []
    for number in range(1, 100):
        run = tmp_path / str(number)
        saver.save(run, 1, 1000)
        killed = saver.killed_at(number, lambda run=run: saver.save(run, 2, 1000, keep=1))
        found = checkpoint.load_latest(run)
        steps.append(found.step)
        assert found.skipped == ()
        assert saver.whole(found)
        if not killed:
            break
        saver.save(run, 3, 1000)
        assert not [path for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]
    assert len(steps) > 15
    assert steps == sorted(steps)
    assert set(steps) == {1, 2}


def test_a_kill_while_a_step_is_replaced_leaves_one_of_the_two(tmp_path):
    sizes = []
    for number in range(1, 100):
        run = tmp_path / str(number)
        saver.save(run, 1, 1000)
        killed = saver.killed_at(number, lambda run=run: saver.save(run, 1, 2000))
        found = checkpoint.load_latest(run)
        sizes.append(len(found.model["w0"]))
        assert saver.whole(found)
        if not killed:
            break
        saver.save(run, 1, 3000)
        assert os.listdir(run / "checkpoints") == ["step_00000001"]
    assert sizes == sorted(sizes)
    assert set(sizes) == {1000, 2000}
