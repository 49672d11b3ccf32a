"""Muon with AdamW for the rest: does the base LR carry over width and depth, and what does scaling twice do?

Pre-registered (before any row of this study was run):
  M1  complete-d for Muon (matrices: no width factor, as torch's "original" shape factor keeps the spectral norm; the
      rest: AdamW's rules): the optimum moves at most 0.5 octave to width 256 and to depth 16 and costs <= 0.01 nats/byte.
  M2  control: scaling Muon's LR by 1 / m_N once more, as if it were Adam, moves the optimum by >= 1 octave at width 256.
Setting: as axes.py at `size`, alpha 1, QK norm; the AdamW part has the LR 2^-6 x 16 for the embedding (lr_rest keeps it at
AdamW's own optimum at every point of the grid, so that the curve is Muon's). Grids are centred on the base's optimum.

    OMP_NUM_THREADS=1 python benchmarks/muon.py --workers 1      (twice: the second run has the base's optimum)
"""

from __future__ import annotations

from typing import Any

import axes
from study import Cell, cost_of, finite, losses, main, optimum, publish, read, verdict

SETTINGS = {**axes.SIZE, **axes.SCHEMES["d-1-qk"][0], "train.optimizer": "muon"}
REST = 2.0**-6
ENDS: dict[str, dict[str, object]] = {"base": {}, "width x4": {"model.width": 256}, "depth x8": {"model.depth": 16}}


def cell(end: str, log2_lr: int, seed: int, twice: bool = False) -> Cell:
    """One run; `twice` multiplies the matrices' LR by 1 / m_N once more."""
    lr = 2.0**log2_lr / (4 if twice else 1)
    return {
        "label": {"end": end, "twice": twice, "log2_lr": log2_lr, "seed": seed},
        "config": {**SETTINGS, **ENDS[end], "hps.lr": lr, "hps.lr_rest": REST / lr, "seed": seed},
    }


def cells() -> list[Cell]:
    """The base first; the ends once its optimum is known."""
    out = [cell("base", e, 0) for e in range(-9, -1)]
    points = losses(read("muon").values(), "end", "twice").get(("base", False), {})
    if len(points) < 8:
        return out
    middle = round(optimum(points).at)
    near = range(middle - 2, middle + 3)
    out += [cell(end, e, 0) for end in ("width x4", "depth x8") for e in near]
    out += [cell("width x4", e, 0, True) for e in range(middle - 1, middle + 4)]
    for seed in (1, 2):
        out += [cell("base", e, seed) for e in range(-9, -1)]
        out += [cell(end, e, seed) for end in ("width x4", "depth x8") for e in near]
    return out


def judge(rows: dict[str, dict[str, Any]]) -> None:
    """Table and verdicts into docs/results/muon.md."""
    curves = losses(rows.values(), "end", "twice")
    base_points = curves.get(("base", False), {})
    if len(base_points) < 8:
        print("not enough rows yet")
        return
    base = optimum(base_points)
    text = ["# Muon and AdamW together", "", "Command, setting and pre-registration: `benchmarks/muon.py`.", "",
            "| where | seeds | loss by Muon's base LR | optimum, log2 | drift | cost |", "|---|---|---|---|---|---|"]
    said = []
    for end in ENDS:
        for twice in (False, True):
            points = curves.get((end, twice), {})
            if len(points) < 5:
                continue
            best, price = optimum(points), cost_of(points, base.at)[0]
            drift = best.at - base.at
            seeds = len({seed for by in points.values() for seed in by})
            grid = " ".join(f"2^{e:g}: {finite(sum(by.values()) / len(by))}" for e, by in sorted(points.items()))
            name = f"{end}{', scaled twice' if twice else ''}"
            text.append(f"| {name} | {seeds} | {grid} | {best.at:.2f} | {drift:+.2f} | {price:.4f} |")
            if twice:
                said.append(f"- **M2** {name}: drift {drift:+.2f} octaves: **{verdict(abs(drift) >= 1)}** (the AdamW part "
                            "is held, so this is the curve above moved by 1 / m_N: it shows what the bug costs, the "
                            "drift itself is by construction)")  # fmt: skip
            elif end != "base":
                good = abs(drift) <= 0.5 and price <= 0.01
                bad = abs(drift) > 0.5 and price > 0.01
                held = (None if seeds < 3 else True) if good else False if bad else None
                said.append(f"- **M1** {name}: drift {drift:+.2f}, cost {price:.4f}, {seeds} seeds: **{verdict(held)}**")
    publish("muon", "\n".join([*text, "", "## Verdicts", "", *said]) + "\n")


if __name__ == "__main__":
    main("muon", __doc__ or "", cells(), judge)
