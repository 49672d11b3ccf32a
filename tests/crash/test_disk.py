"""Out of space at every write in turn: the old checkpoint loads, nothing stray stays, the next save works."""

import errno
import os
from contextlib import contextmanager, suppress

import pytest
import saver

from isoscale._base import files
from isoscale._base.errors import StorageError
from isoscale.train import checkpoint


def refusing(at, code):
    """A hook that raises at the `at`-th operation, and the operations seen."""
    seen = []

    def hook(name, path):
        seen.append(name)
        if len(seen) == at:
            raise OSError(code, os.strerror(code))

    return hook, seen


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("step", [2, 1], ids=["new step", "same step"])
def test_a_disk_that_refuses_at_every_operation(tmp_path, code, step, monkeypatch):
    monkeypatch.setattr(files, "CHUNK", 3000)  # several writes per file
    every = set()
    for at in range(1, 200):
        run = tmp_path / str(at)
        saver.save(run, 1, 1000)
        hook, seen = refusing(at, code)
        refusal = None
        with files.failing(hook):
            try:
                saver.save(run, step, 1000, keep=1)
            except StorageError as error:
                refusal = error
        found = checkpoint.load_latest(run)
        assert saver.whole(found)
        assert found.skipped == ()
        names = os.listdir(run / "checkpoints")
        assert not [name for name in names if ".tmp-" in name], (at, seen[-1], names)
        if refusal is None:
            break
        every.add(seen[-1])
        assert refusal.hint, seen[-1]
        assert refusal.place, seen[-1]
        saver.save(run, found.step, 1000, keep=1)  # space is free again
        assert os.listdir(run / "checkpoints") == [f"step_{found.step:08d}"]
    assert at > 20
    assert every == {"write", "fsync", "fsync_dir", "rename", "remove"}
    assert found.step == step


def test_control_writing_straight_to_the_target_leaves_half_a_checkpoint(tmp_path, monkeypatch):
    @contextmanager
    def careless(path, *, replace=False):
        path.mkdir(parents=True, exist_ok=True)
        yield path

    monkeypatch.setattr(checkpoint, "atomic_dir", careless)
    hook, _ = refusing(3, errno.ENOSPC)
    with files.failing(hook), suppress(OSError):
        saver.save(tmp_path, 1, 1000)
    assert os.listdir(tmp_path / "checkpoints" / "step_00000001")
