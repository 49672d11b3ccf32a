"""Every flipped bit, every truncation and every missing file is found before a tensor is handed out."""

import random
import shutil

import pytest
import saver

from isoscale._base.errors import CheckpointError
from isoscale.train import checkpoint

EVERY = (*checkpoint.FILES, "manifest.json")


@pytest.fixture
def run(tmp_path):
    for step in (1, 2):
        saver.save(tmp_path, step, 500)
    return tmp_path


def expect_found(run, name):
    """The damage is found in the newest checkpoint, and the older one is loaded instead."""
    newest = run / "checkpoints" / "step_00000002"
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(newest)
    assert str(newest) in str(caught.value)
    found = checkpoint.load_latest(run)
    assert found.step == 1
    assert saver.whole(found)
    [(path, reason)] = found.skipped
    assert path == newest
    assert name in reason


@pytest.mark.slow
def test_a_thousand_bit_flips(run):
    rng = random.Random(0)
    folder = run / "checkpoints" / "step_00000002"
    for number in range(1000):
        file = folder / EVERY[number % len(EVERY)]
        data = bytearray(file.read_bytes())
        sound = bytes(data)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(data)
        expect_found(run, file.name)
        file.write_bytes(sound)
    assert checkpoint.load_latest(run).step == 2


def test_every_bit_of_a_manifest(run):
    file = run / "checkpoints" / "step_00000002" / "manifest.json"
    sound = file.read_bytes()
    for position in range(len(sound)):
        data = bytearray(sound)
        data[position] ^= 1 << (position % 8)
        file.write_bytes(data)
        with pytest.raises(CheckpointError):
            checkpoint.load(file.parent)


def test_a_hundred_truncations(run):
    rng = random.Random(1)
    for number in range(100):
        file = run / "checkpoints" / "step_00000002" / EVERY[number % len(EVERY)]
        sound = file.read_bytes()
        file.write_bytes(sound[: rng.randrange(len(sound))])
        expect_found(run, file.name)
        file.write_bytes(sound)


@pytest.mark.parametrize("name", EVERY)
def test_each_file_missing_or_swapped(run, name):
    file = run / "checkpoints" / "step_00000002" / name
    file.unlink()
    expect_found(run, name)
    if name != "plan.json":  # the same in both
        shutil.copy(run / "checkpoints" / "step_00000001" / name, file)
        with pytest.raises(CheckpointError):
            checkpoint.load(file.parent)


def test_control_safetensors_alone_does_not_notice_a_flip(run):
    import safetensors.torch

    file = run / "checkpoints" / "step_00000002" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert safetensors.torch.load_file(file)
