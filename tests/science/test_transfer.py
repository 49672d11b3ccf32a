"""LR transfer with its control, end to end, on real text: minutes. The full study is benchmarks/transfer.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from isoscale.config import RunConfig
from isoscale.sweep.pool import run_all

pytestmark = pytest.mark.science
BASE = {"train.steps": 120, "train.batch": 8, "train.eval_every": 1000, "train.checkpoint_every": 1000}


def fitted(losses: dict[float, float]) -> float:
    """log2 LR of the minimum of a parabola through the three points around the lowest."""
    x = sorted(losses)
    best = min(max(1, min(range(len(x)), key=lambda i: losses[x[i]])), len(x) - 2)
    a, b, _ = np.polyfit(x[best - 1 : best + 2], [losses[e] for e in x[best - 1 : best + 2]], 2)
    return float(-b / (2 * a)) if a > 0 else x[best]


def optima(tmp: Path, name: str, exponents: range, widths: tuple[int, ...]) -> dict[int, float]:
    """Fitted optimum per width."""
    out = {}
    for width in widths:
        jobs = {
            f"{name}_{width}_{e}": RunConfig().with_values(**{
                **BASE, "rules.parametrisation": name, "model.width": width, "hps.lr": 2.0**e})
            for e in exponents
        }  # fmt: skip
        losses = run_all(jobs, tmp, workers=2)
        out[width] = fitted({float(e): losses[f"{name}_{width}_{e}"] for e in exponents})
    return out


def test_umup_keeps_its_optimum_where_sp_drifts(tmp_path: Path) -> None:
    ours = optima(tmp_path, "u-mup", range(-1, 4), (64, 256))
    control = optima(tmp_path, "sp", range(-11, -5), (64, 256))
    assert abs(ours[256] - ours[64]) <= 0.5, ours
    assert control[64] - control[256] > abs(ours[256] - ours[64]), (ours, control)
