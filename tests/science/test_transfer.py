"""LR transfer with its control, end to end, on real text, re-run from scratch: about half an hour on two cores.

The cells are those of benchmarks/transfer.py (seed 0); the study itself has more widths, schemes and seeds.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from isoscale.config import RunConfig
from isoscale.sweep.pool import run_all

pytestmark = pytest.mark.science
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))


def fitted(losses: dict[float, float]) -> float:
    """log2 LR of the minimum of a parabola through the three points around the lowest."""
    x = sorted(losses)
    best = min(max(1, min(range(len(x)), key=lambda i: losses[x[i]])), len(x) - 2)
    a, b, _ = np.polyfit(x[best - 1 : best + 2], [losses[e] for e in x[best - 1 : best + 2]], 2)
    return float(-b / (2 * a)) if a > 0 else x[best]


def optima(tmp: Path, scheme: str, exponents: range) -> dict[int, float]:
    """Fitted optimum per width."""
    from transfer import cell

    out = {}
    for width in (64, 256):
        cells = {e: cell(scheme, width, e, 0)["config"] for e in exponents}
        jobs = {f"{scheme}_{width}_{e}": RunConfig().with_values(**config) for e, config in cells.items()}
        losses = run_all(jobs, tmp, workers=2)
        out[width] = fitted({float(e): losses[f"{scheme}_{width}_{e}"] for e in exponents})
    return out


def test_umup_keeps_its_optimum_where_sp_drifts(tmp_path: Path) -> None:
    ours = optima(tmp_path, "u-mup", range(-1, 4))
    control = optima(tmp_path, "sp-lecun", range(-11, -4))
    assert abs(ours[256] - ours[64]) <= 0.5, ours
    assert control[64] - control[256] >= 1.0, control


@pytest.mark.parametrize("scheme", ["u-mup", "sp"])
def test_a_recorded_row_can_be_made_again(scheme: str, tmp_path: Path) -> None:
    """The tables are not canned: the same cell gives the recorded loss (up to the machine's arithmetic)."""
    rows = [json.loads(line) for line in (ROOT / "docs/results/data/transfer.jsonl").read_text().splitlines()]
    row = next(r for r in rows if r["label"]["scheme"] == scheme and r["label"]["width"] == 64)
    losses = run_all({"again": RunConfig().with_values(**row["config"])}, tmp_path, workers=1)
    assert losses["again"] == pytest.approx(row["val_loss"], rel=5e-3)
