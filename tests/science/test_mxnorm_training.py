"""The recorded rows of the MXNorm study, made again from scratch: about ten minutes on one core."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from isoscale.config import RunConfig
from isoscale.sweep.pool import run_all

pytestmark = pytest.mark.science
ROOT = Path(__file__).resolve().parents[2]


def test_mxnorm_against_rmsnorm_as_recorded(tmp_path: Path) -> None:
    """Both losses as recorded, up to the machine's arithmetic, and MXNorm not better by more than it was."""
    rows = [json.loads(line) for line in (ROOT / "docs/results/data/mxnorm.jsonl").read_text().splitlines()]
    wanted = {arm: next(r for r in rows if r["label"] == {"width": 256, "arm": arm, "seed": 0})
              for arm in ("rmsnorm", "mxnorm p=2", "mxnorm, rounded")}  # fmt: skip
    jobs = {f"arm{i}": RunConfig().with_values(**row["config"]) for i, row in enumerate(wanted.values())}
    losses = run_all(jobs, tmp_path, workers=2)
    found = dict(zip(wanted, (losses[name] for name in jobs)))
    for arm, row in wanted.items():
        assert found[arm] == pytest.approx(row["val_loss"], abs=0.03), arm
    assert found["mxnorm, rounded"] > found["rmsnorm"] + 0.02, "control: an unstable estimate costs loss"
