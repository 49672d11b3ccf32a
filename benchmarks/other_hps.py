"""Not only the LR: do init scale, betas, weight decay and the residual multiplier carry over width?

Pre-registered (before any row of this study was run):
  O1  for each HP, the best of five values at width 256 (Complete(d)P, alpha 1, QK norm; everything else at the base's
      best) is at most one grid step (a factor of 2, 4 for decay) from the best at width 64, and the base's best value
      costs <= 0.01 nats/byte there.
Setting: `size` of axes.py, LR 2^-6.

    OMP_NUM_THREADS=1 python benchmarks/other_hps.py --workers 2
"""

from __future__ import annotations

from typing import Any

import axes
import numpy as np
from study import Cell, main, publish, verdict

BASE = {**axes.SIZE, **axes.SCHEMES["d-1-qk"][0], "hps.lr": 2.0**-6}
VALUES: dict[str, list[float]] = {
    "init_std": [0.015, 0.03, 0.06, 0.12, 0.24],
    "alpha_res": [0.25, 0.5, 1.0, 2.0, 4.0],
    "weight_decay": [0.00625, 0.025, 0.1, 0.4, 1.6],
    "beta1": [0.6, 0.8, 0.9, 0.95, 0.975],
    "beta2": [0.8, 0.9, 0.95, 0.975, 0.9875],
}
WIDTHS = (64, 256)


def cells() -> list[Cell]:
    """One seed of everything, the narrow ones first; then more seeds."""
    return [
        {"label": {"hp": hp, "value": value, "width": width, "seed": seed},
         "config": {**BASE, f"hps.{hp}": value, "model.width": width, "seed": seed}}
        for seed in (0, 1, 2) for width in WIDTHS for hp, values in VALUES.items() for value in values
    ]  # fmt: skip


def judge(rows: dict[str, dict[str, Any]]) -> None:
    """Table and verdicts into docs/results/other_hps.md."""
    found: dict[tuple[str, int], dict[float, list[float]]] = {}
    for row in rows.values():
        label = row["label"]
        group = found.setdefault((label["hp"], label["width"]), {})
        group.setdefault(label["value"], []).append(float(row["val_loss"]))
    text = ["# Other hyperparameters over width", "", "Command, setting and pre-registration: `benchmarks/other_hps.py`.", "",
            "| HP | width | seeds | loss by value |", "|---|---|---|---|"]
    said = []
    for hp, values in VALUES.items():
        means: dict[int, dict[float, float]] = {}
        for width in WIDTHS:
            points = found.get((hp, width), {})
            if len(points) < len(values):
                continue
            means[width] = {value: float(np.mean(points[value])) for value in values}
            seeds = min(len(losses) for losses in points.values())
            text.append(f"| {hp} | {width} | {seeds} | " + ", ".join(f"{v:g}: {means[width][v]:.3f}" for v in values) + " |")
        if len(means) == 2:
            best = {width: min(values, key=means[width].__getitem__) for width in WIDTHS}
            steps = values.index(best[256]) - values.index(best[64])
            price = means[256][best[64]] - means[256][best[256]]
            seeds = min(len(losses) for width in WIDTHS for losses in found[hp, width].values())
            good = abs(steps) <= 1 and price <= 0.01
            held = (True if seeds >= 3 else None) if good else False
            said.append(f"- {hp}: best {best[64]:g} at 64, {best[256]:g} at 256 ({steps:+d} steps), the base's best costs "
                        f"{price:.4f}, {seeds} seed{'s' if seeds > 1 else ''}: **{verdict(held)}**")  # fmt: skip
    publish("other_hps", "\n".join([*text, "", "## Verdicts", "", *said]) + "\n")


if __name__ == "__main__":
    main("other_hps", __doc__ or "", cells(), judge)
