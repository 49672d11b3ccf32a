"""The logged casts are those of training, loss scale included."""

from __future__ import annotations

from pathlib import Path

from isoscale._base.log import read
from isoscale.config import RunConfig
from isoscale.train import train


def flushed(folder: Path, text: Path, scale: float) -> float:
    """Largest flushed share of an FP8 gradient at the end of a tiny run."""
    config = RunConfig().with_values(**{
        "data.source": (str(text),), "data.seq_len": 16, "model.width": 32, "model.depth": 1, "train.steps": 2,
        "train.batch": 2, "numerics.recipe": "fp8", "numerics.log_casts": True, "numerics.loss_scale": scale,
    })  # fmt: skip
    train(config, folder)
    rows = [row for row in read(folder / "metrics.jsonl") if row["kind"] == "cast"]
    assert {row["operand"] for row in rows} == {"weight", "input", "grad"}
    return max(row["flushed"] for row in rows if row["operand"] == "grad" and row["format"] == "e5m2")


def test_logged_casts_carry_the_loss_scale(tmp_path: Path, text_file: Path) -> None:
    assert flushed(tmp_path / "unit", text_file, 1.0) < 0.1
    assert flushed(tmp_path / "low", text_file, 2.0**-24) > 0.9
