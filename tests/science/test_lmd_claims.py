"""LMD's tables are not canned, and what its pages say holds when it is run again: a few minutes on one core."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.science
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))


def recorded(model: str, kind: str, formats: str) -> list[dict[str, Any]]:
    """Rows of the study on seed 0, best first."""
    import study

    rows = [row for row in study.read("lmd_formats").values()
            if (row["label"]["model"], row["label"]["optimizer"], row["label"]["formats"], row["label"]["seed"])
            == (model, kind, formats, 0)]  # fmt: skip
    return sorted(rows, key=lambda row: float(row["val_loss"]))


@pytest.mark.parametrize("kind", ["adamw", "lmd", "hypentropy", "lion", "madam"])
def test_a_recorded_row_can_be_made_again(kind: str) -> None:
    """Within what a run scatters by when only rounding differs; the next LR but one, the control, lies outside of it."""
    import lmd_runs

    rows = recorded("llama", kind, "fp32")
    best = rows[0]
    again = lmd_runs.run({"label": best["label"], "config": best["config"]})
    assert again["val_loss"] == pytest.approx(best["val_loss"], abs=0.05)
    assert float(rows[-1]["val_loss"]) > best["val_loss"] + 0.1


def test_medians_are_log_normal_while_the_lr_is_held_and_net_weights_of_adamw_are_not() -> None:
    import lmd_law

    lmd_law.STEPS = 600
    ours = lmd_law.run({"label": {"arm": "lmd constant", "seed": 7}, "config": {}})
    control = lmd_law.run({"label": {"arm": "adamw", "seed": 7}, "config": {}})
    assert ours["medians"] > 0.97 > control["net"]
    free = lmd_law.run({"label": {"arm": "lmd constant, lambda 0", "seed": 7}, "config": {}})
    assert max(free["largest"]) > 1.5 * max(ours["largest"])
