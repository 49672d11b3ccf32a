"""A run that was cut ends as the uncut one: weights, optimiser state and metric rows, bit for bit."""

import json
import os
import random
import signal
import time

import pytest
import torch

from isoscale._base.errors import CheckpointError, IsoscaleError, StorageError
from isoscale._base.files import failing
from isoscale._base.log import read
from isoscale.train import checkpoint, loop, train
from isoscale.train.folder import locked

VARIANTS = {
    "plain": {},
    "standard": {"rules.parametrisation": "sp", "hps.lr": 0.01},
    "accumulate": {"train.accumulate": 2},
    "dropout": {"model.dropout": 0.2, "train.clip": 0.5},
    "bf16": {"train.precision": "bf16"},
    "bpe": {"data.tokenizer": "bpe:300"},
    "fp8": {"numerics.recipe": "fp8", "numerics.log_casts": True, "model.dropout": 0.1},
    "nvfp4, BF16 finish": {"numerics.recipe": "nvfp4", "numerics.finish": 0.5, "numerics.keep_first": 0.5,
                           "numerics.log_casts": True, "train.accumulate": 2},
    "mxfp4, BF16 finish, other rhythm": {"numerics.recipe": "mxfp4", "numerics.finish": 0.3, "train.eval_every": 3,
                                         "train.checkpoint_every": 2, "model.dropout": 0.1},
    "mxnorm": {"numerics.recipe": "mxfp8", "numerics.norm": "mxnorm", "model.norm": "trainable"},
    "lmd": {"optim.name": "lmd", "train.accumulate": 2, "train.clip": 0.5},
    "lmd, one vector, bf16": {"optim.name": "lmd", "optim.form": "hypentropy", "train.precision": "bf16"},
    "lmd, 8 bits, mxfp6": {"optim.name": "lmd", "optim.state": "int8-log", "numerics.recipe": "mxfp6",
                           "train.eval_every": 3, "train.checkpoint_every": 2},
    "lmd, two samples": {"optim.name": "lmd", "optim.samples": 2, "optim.state": "bf16", "model.dropout": 0.1},
    "madam": {"optim.name": "madam"},
    "loss scale, other rhythm": {"numerics.loss_scale": 8.0, "train.eval_every": 2, "train.checkpoint_every": 5},
}


def ending(out):
    """Everything a run leaves behind but wall times."""
    saved = checkpoint.load_latest(out)
    state = {key: value for key, value in saved.state.items() if key != "seconds"}
    result = json.loads((out / "result.json").read_text())
    result = {key: value for key, value in result.items() if key not in ("seconds", "out")}
    return saved.model, saved.optimizer, state, result, (out / "metrics.jsonl").read_bytes()


def assert_same_ending(one, two):
    first, second = ending(one), ending(two)
    for left, right in zip(first[:2], second[:2]):
        assert left.keys() == right.keys()
        for name, tensor in left.items():
            assert tensor.dtype == right[name].dtype
            assert torch.equal(tensor, right[name]), name
    assert first[2:] == second[2:]


def cut_at(*steps):
    left = set(steps)

    def on_step(tick):
        if tick.step in left:
            left.remove(tick.step)
            raise KeyboardInterrupt

    return on_step


@pytest.fixture(scope="module")
def uncut(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("uncut") / "run"
    train(tiny(), out)
    return out


@pytest.mark.parametrize("variant", VARIANTS)
def test_resume_is_bit_equal(tiny, tmp_path, variant):
    config = tiny(**VARIANTS[variant])
    train(config, tmp_path / "uncut")
    on_step = cut_at(1, 3, 5, 8)
    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "cut", resume=True, on_step=on_step)
    train(config, tmp_path / "cut", resume=True, on_step=on_step)
    assert_same_ending(tmp_path / "uncut", tmp_path / "cut")
    rows = read(tmp_path / "cut" / "metrics.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(8))


def test_the_same_command_twice_gives_the_same_bits_and_another_seed_others(tiny, tmp_path, uncut):
    train(tiny(), tmp_path / "again")
    assert_same_ending(uncut, tmp_path / "again")
    train(tiny(seed=1), tmp_path / "other")
    assert read(uncut / "metrics.jsonl")[0]["loss"] != read(tmp_path / "other" / "metrics.jsonl")[0]["loss"]


@pytest.mark.parametrize("moment", ["evaluation", "optimiser", "row", "checkpoint"])
def test_an_interrupt_at_a_bad_moment_loses_and_doubles_nothing(tiny, tmp_path, uncut, monkeypatch, moment):
    """Ctrl-C while a step is half booked must not be saved as if it were whole."""
    places = {"evaluation": (loop, "evaluate"), "optimiser": (torch.optim.AdamW, "step"),
              "row": (loop.JsonLog, "append"), "checkpoint": (checkpoint, "_prune")}  # fmt: skip
    owner, name = places[moment]
    whole, calls = getattr(owner, name), [0]

    def broken(*args, **kwargs):
        calls[0] += 1
        if calls[0] == 2:
            if moment == "optimiser":
                whole(*args, **kwargs)
            raise KeyboardInterrupt
        return whole(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, broken)
        with pytest.raises(KeyboardInterrupt):
            train(tiny(), tmp_path / "cut")
    train(tiny(), tmp_path / "cut", resume=True)
    assert_same_ending(uncut, tmp_path / "cut")


def test_control_a_half_booked_step_that_is_saved_shows(tiny, tmp_path, uncut, monkeypatch):
    """Without the guard the interrupted step would be taken twice."""
    whole, calls = torch.optim.AdamW.step, [0]

    def broken(self, *args):
        calls[0] += 1
        whole(self, *args)
        if calls[0] == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", broken)
        patch.setattr(loop._Run, "torn", property(lambda self: False, lambda self, value: None), raising=False)
        with pytest.raises(KeyboardInterrupt):
            train(tiny(), tmp_path / "cut")
    train(tiny(), tmp_path / "cut", resume=True)
    with pytest.raises(AssertionError):
        assert_same_ending(uncut, tmp_path / "cut")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_killed_again_and_again_ends_as_the_uncut_one(tiny, tmp_path):
    values = {"train.steps": 40, "numerics.recipe": "fp8", "numerics.log_casts": True}
    config, rng, kills = tiny(**values), random.Random(0), 0
    train(config, tmp_path / "uncut")
    out, status = tmp_path / "cut", 1

    def rows() -> int:
        path = out / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    while status != 0:
        child = os.fork()
        if child == 0:
            train(config, out, resume=True)
            os._exit(0)
        # By rows written, not by the clock: a fast machine would finish before it is killed.
        written, patience, pause = rows(), rng.randint(1, 8), rng.uniform(0, 0.01)
        while (found := os.waitpid(child, os.WNOHANG)) == (0, 0):
            if kills < 8 and abs(rows() - written) >= patience:
                time.sleep(pause)
                os.kill(child, signal.SIGKILL)
                kills += 1
                found = os.waitpid(child, 0)
                break
            time.sleep(0.001)
        status = found[1]
    assert kills >= 3
    assert_same_ending(tmp_path / "uncut", out)


def test_a_finished_run_resumes_to_the_same_result(tiny, tmp_path):
    first = train(tiny(), tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert train(tiny(), tmp_path, resume=True) == first
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("values", [{}, {"rules.parametrisation": "sp", "hps.lr": 0.01}])
def test_micro_batches_change_no_loss(tiny, tmp_path, values):
    rows = {}
    for count in (1, 2, 4):
        train(tiny(**{"train.accumulate": count, **values}), tmp_path / str(count))
        rows[count] = [row.get("loss", row.get("val_loss")) for row in read(tmp_path / str(count) / "metrics.jsonl")]
    assert rows[2] == pytest.approx(rows[1], abs=1e-5)
    assert rows[4] == pytest.approx(rows[1], abs=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/usr/bin/g++"), reason="needs a compiler")
def test_the_compiled_step_has_the_same_loss(tiny, tmp_path):
    losses = [train(tiny(**{"train.compile": on}), tmp_path / str(on)).val_loss for on in (False, True)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_compiling_without_a_compiler_is_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(loop.ConfigError, match="C\\+\\+ compiler"):
        train(tiny(**{"train.compile": True}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_used_folder_is_refused(tiny, tmp_path, uncut):
    with pytest.raises(CheckpointError, match="holds a run already") as error:
        train(tiny(), uncut)
    assert "--resume" in error.value.hint
    with pytest.raises(CheckpointError, match="another config") as error:
        train(tiny(**{"hps.lr": 2.0, "model.depth": 2}), uncut, resume=True)
    assert "hps.lr" in error.value.key
    assert "model.depth" in error.value.key
    assert error.value.value["hps.lr"] == "1.0 -> 2.0"
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="file, not a folder"):
        train(tiny(), tmp_path / "file")
    with pytest.raises(CheckpointError, match="is a file"):
        train(tiny(), tmp_path / "file" / "run")


def test_what_may_change_between_sessions(tiny, tmp_path, uncut):
    on_step = cut_at(4)
    with pytest.raises(KeyboardInterrupt):
        train(tiny(), tmp_path, on_step=on_step)
    train(tiny(**{"name": "new", "train.keep": 3, "train.checkpoint_every": 7}), tmp_path, resume=True)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (uncut / "metrics.jsonl").read_bytes()


def test_another_text_under_the_same_name_is_refused(tiny, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("one line of text\n" * 300)
    config = tiny(**{"data.source": str(text)})
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "run", on_step=cut_at(2))
    text.write_text("another line of text\n" * 300)
    with pytest.raises(CheckpointError, match="text or the tokenizer is not the one"):
        train(config, tmp_path / "run", resume=True)


def test_one_process_a_run_folder(tiny, tmp_path):
    with locked(tmp_path / "run"), pytest.raises(CheckpointError, match="another process") as error:
        train(tiny(), tmp_path / "run")
    assert error.value.key == "lock"
    train(tiny(), tmp_path / "run")


@pytest.mark.parametrize("values", [{"numerics.recipe": "fp9"}, {"rules.parametrisation": "mup"},
                                    {"train.device": "banana"}, {"data.source": "/no/such/file"}])  # fmt: skip
def test_a_refused_run_leaves_no_folder(tiny, tmp_path, values):
    with pytest.raises(IsoscaleError):
        train(tiny(**values), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def refuse(part, error=28):
    def hook(name, path):
        if name == "write" and part in str(path):
            raise OSError(error, os.strerror(error))

    return hook


@pytest.mark.parametrize(("part", "number"), [("checkpoints", 28), ("metrics", 28), ("checkpoints", 30)])
def test_a_full_or_read_only_disk_leaves_the_last_checkpoint(tiny, tmp_path, uncut, part, number):
    with pytest.raises(KeyboardInterrupt):
        train(tiny(), tmp_path, on_step=cut_at(4))
    with failing(refuse(part, number)), pytest.raises(StorageError, match="disk full" if number == 28 else "read-only"):
        train(tiny(), tmp_path, resume=True)
    assert checkpoint.load_latest(tmp_path).step == 4
    train(tiny(), tmp_path, resume=True)
    assert_same_ending(uncut, tmp_path)


def test_a_truncated_checkpoint_falls_back_and_still_ends_the_same(tiny, tmp_path, uncut):
    with pytest.raises(KeyboardInterrupt):
        train(tiny(), tmp_path, on_step=cut_at(7))
    file = tmp_path / "checkpoints" / "step_00000007" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    train(tiny(), tmp_path, resume=True)
    assert_same_ending(uncut, tmp_path)


def test_when_all_checkpoints_are_damaged_each_is_named(tiny, tmp_path):
    train(tiny(), tmp_path)
    for file in (tmp_path / "checkpoints").glob("*/model.safetensors"):
        file.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no sound checkpoint.*step_00000008.*step_00000006"):
        train(tiny(), tmp_path, resume=True)
