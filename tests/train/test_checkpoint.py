"""A checkpoint comes back bit for bit, or says what is wrong with it."""

import json
import math
import os
from pathlib import Path

import pytest
import torch

from isoscale._base.errors import CheckpointError
from isoscale._base.files import sha256
from isoscale.train import checkpoint


def save(run_dir, step, *, model=None, optimizer=None, state=None, plan="{}", keep=2):
    model = {"w": torch.full((4, 3), float(step))} if model is None else model
    optimizer = {"w.exp_avg": torch.full((4, 3), -float(step))} if optimizer is None else optimizer
    state = {"step": step} if state is None else state
    return checkpoint.save(run_dir, step, model=model, optimizer=optimizer, state=state, plan=plan, keep=keep)


def steps(run_dir):
    return sorted(int(path.name.removeprefix("step_")) for path in (Path(run_dir) / "checkpoints").iterdir())


def test_the_layout(tmp_path):
    path = save(tmp_path, 100)
    assert path == tmp_path / "checkpoints" / "step_00000100"
    assert sorted(os.listdir(path)) == sorted([*checkpoint.FILES, "manifest.json"])
    assert json.loads((path / "manifest.json").read_text())["step"] == 100


DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_of_every_dtype_comes_back(tmp_path, dtype):
    words = torch.arange(256, dtype=torch.uint8)
    value = (words % 2 if dtype == torch.bool else words.repeat(8)).view(dtype).clone()
    save(tmp_path, 1, model={"x": value, "scalar": value[3].clone(), "empty": value[:0].reshape(0, 5)})
    found = checkpoint.load_latest(tmp_path).model
    assert found["x"].dtype == dtype
    assert torch.equal(found["x"].view(torch.uint8), value.view(torch.uint8))
    assert found["scalar"].shape == ()
    assert found["empty"].shape == (0, 5)


def test_strange_layouts_come_back_as_values(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    model = {"t": base.T, "part": base[1:3, ::2], "again": base, "expanded": torch.ones(1).expand(3, 4)}
    save(tmp_path, 1, model={**model, "parameter": torch.nn.Parameter(torch.ones(2)), "conj": torch.ones(2) * 1j})
    found = checkpoint.load_latest(tmp_path).model
    for name, want in model.items():
        assert torch.equal(found[name], want), name
    assert not found["parameter"].requires_grad


def test_tied_tensors_are_stored_once_and_stay_tied(tmp_path):
    weight = torch.nn.Parameter(torch.randn(64, 64))
    path = save(tmp_path, 1, model={"embed.weight": weight, "head.weight": weight, "other": weight.detach().clone()})
    assert (path / "model.safetensors").stat().st_size < 2.1 * weight.numel() * 4
    found = checkpoint.load(path).model
    assert found["head.weight"] is found["embed.weight"]
    assert found["other"] is not found["embed.weight"]
    assert set(found) == {"embed.weight", "head.weight", "other"}


def test_state_and_plan_come_back(tmp_path):
    state = {
        "float": 0.1,
        "big": 2**70,
        "nan": math.nan,
        "inf": -math.inf,
        "list": [1, None, True],
        "text": "é\n",
        "t": (1,),
    }
    save(tmp_path, 7, state=state, plan='{"rows": []}')
    found = checkpoint.load_latest(tmp_path)
    assert (found.step, found.plan) == (7, '{"rows": []}')
    assert math.isnan(found.state.pop("nan"))
    assert found.state == {**{key: value for key, value in state.items() if key != "nan"}, "t": [1]}
    assert found.skipped == ()


def test_old_ones_are_pruned_and_the_newest_loads(tmp_path):
    for step in (0, 5, 10, 100):
        save(tmp_path, step)
    assert steps(tmp_path) == [10, 100]
    assert checkpoint.load_latest(tmp_path).step == 100
    save(tmp_path, 101, keep=1)
    assert steps(tmp_path) == [101]


def test_keeping_none_is_refused_with_the_reason(tmp_path):
    with pytest.raises(CheckpointError, match="would be removed"):
        save(tmp_path, 1, keep=0)
    assert not list(tmp_path.iterdir())


def test_nothing_there_is_none(tmp_path):
    assert checkpoint.load_latest(tmp_path) is None
    assert checkpoint.load_latest(tmp_path / "missing") is None
    with pytest.raises(CheckpointError, match="missing"):
        checkpoint.load(tmp_path / "checkpoints" / "step_00000001")


def test_a_damaged_one_is_skipped_and_named(tmp_path):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    (path / "state.json").write_text("{}")
    found = checkpoint.load_latest(tmp_path)
    assert found.step == 1
    [(skipped, reason)] = found.skipped
    assert skipped == path
    assert "state.json" in reason
    with pytest.raises(CheckpointError, match="bytes"):
        checkpoint.load(path)


def test_none_sound_is_an_error_that_names_all(tmp_path):
    for step in (1, 2):
        (save(tmp_path, step) / "plan.json").unlink()
    with pytest.raises(CheckpointError, match="no sound checkpoint") as caught:
        checkpoint.load_latest(tmp_path)
    assert "step_00000001" in str(caught.value)
    assert "step_00000002" in str(caught.value)


def test_saving_goes_on_after_falling_back(tmp_path):
    save(tmp_path, 1)
    (save(tmp_path, 3) / "model.safetensors").write_bytes(b"")
    assert checkpoint.load_latest(tmp_path).step == 1
    save(tmp_path, 2)
    assert steps(tmp_path) == [1, 2]  # the damaged later one is gone
    assert checkpoint.load_latest(tmp_path).skipped == ()


def test_the_same_step_is_replaced(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 1, model={"w": torch.zeros(1)})
    assert checkpoint.load_latest(tmp_path).model["w"].tolist() == [0]
    assert os.listdir(tmp_path / "checkpoints") == ["step_00000001"]


def test_two_histories_do_not_mix(tmp_path):
    save(tmp_path, 10)
    with pytest.raises(CheckpointError, match="later step 10"):
        save(tmp_path, 5)
    assert steps(tmp_path) == [10]


def reseal(path, **changes):
    body = json.loads((path / "manifest.json").read_text())
    body.pop("digest")
    (path / "manifest.json").write_bytes(checkpoint._seal({**body, **changes}))


def test_an_unknown_format_is_neither_loaded_nor_removed(tmp_path):
    path = save(tmp_path, 3)
    reseal(path, format=2)
    with pytest.raises(CheckpointError, match="unknown checkpoint format"):
        checkpoint.load(path)
    with pytest.raises(CheckpointError, match="later step"):
        save(tmp_path, 2)


@pytest.mark.parametrize("changes", [{"files": {}}, {"files": None}, {"step": "x"}, {"files": {"a": 1}}], ids=str)
def test_a_well_sealed_manifest_of_nonsense_is_refused(tmp_path, changes):
    path = save(tmp_path, 3)
    reseal(path, **changes)
    with pytest.raises(CheckpointError, match="incomplete manifest"):
        checkpoint.load(path)


@pytest.mark.parametrize("aliases", [None, {"model": {"a": "missing"}}, {"model": []}], ids=str)
def test_aliases_that_lead_nowhere_are_refused(tmp_path, aliases):
    path = save(tmp_path, 3)
    reseal(path, aliases=aliases)
    with pytest.raises(CheckpointError, match="cannot read tensors"):
        checkpoint.load(path)


def test_a_sealed_file_that_is_no_safetensors_is_refused(tmp_path):
    path = save(tmp_path, 3)
    hostile = (1 << 60).to_bytes(8, "little") + b"{}"  # a header said to be an exabyte long
    (path / "model.safetensors").write_bytes(hostile)
    entries = json.loads((path / "manifest.json").read_text())["files"]
    entries["model.safetensors"] = {"size": len(hostile), "sha256": sha256(path / "model.safetensors")}
    reseal(path, files=entries)
    with pytest.raises(CheckpointError, match="cannot read tensors"):
        checkpoint.load(path)


def test_a_renamed_folder_is_found(tmp_path):
    path = save(tmp_path, 3)
    path.rename(path.with_name("step_00000009"))
    with pytest.raises(CheckpointError, match="disagree"):
        checkpoint.load_latest(tmp_path)
    path.with_name("step_00000009").rename(tmp_path / "best")  # any other name says nothing about the step
    assert checkpoint.load(tmp_path / "best").step == 3


def test_what_cannot_be_stored_is_refused_by_name(tmp_path):
    cases = [
        ({"model": {"w": torch.ones(2, device="meta")}}, "model.w"),
        ({"optimizer": {"w": torch.ones(2).to_sparse()}}, "opt.w"),
        ({"state": {"a": [{"b": torch.ones(1)}]}}, "state.a[0].b"),
        ({"state": {"a": {1: 2}}}, "state.a"),
        ({"plan": "{"}, "plan"),
        ({"step": -1}, "step"),
    ]
    for changes, key in cases:
        with pytest.raises(CheckpointError) as caught:
            save(tmp_path, **{"step": 1, **changes})
        assert caught.value.key == key
    assert not list(tmp_path.iterdir())


def test_the_package_has_no_pickle():
    source = Path(checkpoint.__file__).parents[1]
    for file in source.rglob("*.py"):
        text = file.read_text()
        assert "import pickle" not in text, file
        assert "torch.load(" not in text or "weights_only=True" in text, file
