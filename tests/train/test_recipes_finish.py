"""The BF16 finish of a run: where it begins, what it changes, and that a cut run and a loaded model know of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from isoscale import numerics
from isoscale._base.log import read
from isoscale.config import RunConfig
from isoscale.formats.recipes import BF16
from isoscale.train import train
from isoscale.train.inference import evaluate_run, load_model


def config(text: Path, **changes: object) -> RunConfig:
    """Eight steps of two sequences at width 32."""
    return RunConfig().with_values(**{
        "data.source": (str(text),), "data.seq_len": 16, "model.width": 32, "model.depth": 2, "train.steps": 8,
        "train.batch": 2, "train.eval_every": 2, "train.checkpoint_every": 2, "numerics.recipe": "nvfp4", **changes,
    })  # fmt: skip


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read(folder / "metrics.jsonl") if row["kind"] == "train"]


def test_the_finish_changes_the_steps_from_its_first_on(tmp_path: Path, text_file: Path) -> None:
    """Losses agree up to step 5 and differ from step 6 on: forward and backward of steps 6 and 7 are BF16."""
    train(config(text_file), tmp_path / "none")
    train(config(text_file, **{"numerics.finish": 0.25}), tmp_path / "finish")
    plain, finished = losses(tmp_path / "none"), losses(tmp_path / "finish")
    assert plain[:6] == finished[:6]
    assert plain[6] != finished[6]
    rows = read(tmp_path / "finish" / "metrics.jsonl")
    assert [(row["step"], row["formats"]) for row in rows if row["kind"] == "switch"] == [(6, str(BF16))]
    assert not any(row["kind"] == "switch" for row in read(tmp_path / "none" / "metrics.jsonl"))


def test_a_loaded_model_has_the_formats_of_its_last_step(tmp_path: Path, text_file: Path) -> None:
    """Its loss is the one the run wrote down at the end."""
    result = train(config(text_file, **{"numerics.finish": 0.25}), tmp_path / "run")
    model, step = load_model(tmp_path / "run", 256)
    assert step == 8
    assert set(numerics.summary(model).layers.values()) == {BF16}
    assert evaluate_run(tmp_path / "run", batches=16).loss == pytest.approx(result.val_loss, abs=1e-6)
    train(config(text_file), tmp_path / "none")
    assert set(numerics.summary(load_model(tmp_path / "none", 256)[0]).layers.values()) != {BF16}


def test_noise_repeats_with_the_seed_and_only_with_it(tmp_path: Path, text_file: Path) -> None:
    """Stochastic rounding follows the run's seed, step by step, like dropout."""
    runs = {"one": {}, "again": {}, "nearest": {"numerics.recipe": "nvfp4-bare"}}
    for name, changes in runs.items():
        train(config(text_file, **changes), tmp_path / name)
    one, again, nearest = (losses(tmp_path / name) for name in runs)
    assert one == again
    assert one != nearest
