"""No master weights: matrices kept between steps in few bits, AdamW against LMD on its log grids.

Pre-registered (before any row of this study was run). Llama-style decoder, 0.25 million parameters, 400 steps, fp32
arithmetic in the forward and backward pass: only what is *kept* of a matrix between steps is narrow. AdamW keeps its
moments in fp32 throughout, so it is at an advantage in bytes; `bits` counts what is kept of a weight itself.
  S1  LMD on 8-bit log grids (both medians and momenta) loses less than 0.03 nats/byte against its own fp32 (upper end of
      the 95 % interval over paired seeds).
  S2  AdamW with weights kept in MXFP6 to nearest loses more than that (lower end above 0.03). Control: nearest must stall.
  S3  AdamW with weights in MXFP6, rounded stochastically, loses more than LMD int8-log does (interval of the difference of
      the differences above 0).
  S4  At equal bits per weight, absolute: LMD hypentropy int8-log (8 bits) is better than AdamW with weights in 8-bit
      MXFP8, rounded stochastically (interval of the difference below 0).
Each arm has the same three LRs, a factor of 2 apart about its own fp32 optimum, on seed 0, and three seeds at the best
(five LRs at first; cut for time when AdamW's rows were there; weights to nearest in MXFP6, which stall at low LRs and had
their best at the upper end, got three LRs two octaves higher).

    OMP_NUM_THREADS=1 python benchmarks/lmd_storage.py --workers 1
"""

from __future__ import annotations

import math
from typing import Any

import lmd_runs
import numpy as np
import study
from lmd_formats import interval, paired
from lmd_runs import cell
from lmd_runs import NOISE
from study import Cell, publish, verdict

NEAREST, CHANCE = "nearest-even", "stochastic"
ARMS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "adamw fp32": ("32", "adamw", {}),
    "adamw bf16 nearest": ("16", "adamw", {"store": {"format": "bf16", "rounding": NEAREST}}),
    "adamw bf16 stochastic": ("16", "adamw", {"store": {"format": "bf16", "rounding": CHANCE}}),
    "adamw mxfp8 stochastic": ("8.25", "adamw", {"store": {"format": "mxfp8_e4m3/rceil", "rounding": CHANCE}}),
    "adamw mxfp6 nearest": ("6.25", "adamw", {"store": {"format": "mxfp6_e3m2/rceil", "rounding": NEAREST}}),
    "adamw mxfp6 stochastic": ("6.25", "adamw", {"store": {"format": "mxfp6_e3m2/rceil", "rounding": CHANCE}}),
    "lmd fp32": ("64", "lmd", {}),
    "lmd bf16": ("32", "lmd", {"optimizer": {"state": "bf16"}}),
    "lmd int8-log": ("16", "lmd", {"optimizer": {"state": "int8-log"}}),
    "hypentropy fp32": ("32", "hypentropy", {}),
    "hypentropy bf16": ("16", "hypentropy", {"optimizer": {"state": "bf16"}}),
    "hypentropy int8-log": ("8", "hypentropy", {"optimizer": {"state": "int8-log"}}),
}  # fmt: skip
MIDDLE = {"adamw mxfp6 nearest": -6, "adamw": -8, "lmd": -5, "hypentropy": -5}
SEEDS = (0, 1, 2)


def one(arm: str, lr: int, seed: int) -> Cell:
    """A cell of an arm."""
    _, kind, more = ARMS[arm]
    return cell("llama", kind, "fp32", lr, seed, label={"arm": arm}, **more)


def lrs(arm: str) -> range:
    """Three LRs."""
    middle = MIDDLE.get(arm, MIDDLE[ARMS[arm][1]])
    return range(middle - 1, middle + 2)


def tuning() -> list[Cell]:
    """Every arm's LRs on seed 0."""
    return [one(arm, lr, 0) for arm in ARMS for lr in lrs(arm)]


def best(rows: dict[str, dict[str, Any]], arm: str) -> int | None:
    """The best LR on seed 0; None: not all there."""
    found = {lr: rows.get(study.key(one(arm, lr, 0))) for lr in lrs(arm)}
    return min(found, key=lambda lr: float(found[lr]["val_loss"])) if all(found.values()) else None


def seeds(rows: dict[str, dict[str, Any]]) -> list[Cell]:
    """Three seeds of each arm."""
    return [one(arm, lr, seed) for seed in SEEDS for arm in ARMS if (lr := best(rows, arm)) is not None]


def losses(rows: dict[str, dict[str, Any]], arm: str) -> np.ndarray:
    """Final losses of an arm, by seed."""
    lr = best(rows, arm)
    found = [rows.get(study.key(one(arm, lr, seed))) for seed in SEEDS] if lr is not None else []
    return np.array([float(row["val_loss"]) for row in found if row])


def _said(values: np.ndarray) -> str:
    low, high = interval(values)
    return f"{values.mean():+.3f} ({low:+.3f} to {high:+.3f})" if math.isfinite(high) else "too few seeds"


def judge(rows: dict[str, dict[str, Any]]) -> None:
    """Table and verdicts into docs/results/lmd_storage.md."""
    text = ["# No master weights: AdamW and LMD with matrices kept in few bits", "",
            "Setting and pre-registration: `benchmarks/lmd_storage.py`; command: "
            "`OMP_NUM_THREADS=1 python benchmarks/lmd_storage.py`. nats/byte on held-out text, mean of seeds." + NOISE, "",
            "| arm | bits kept of a weight | log2 LR | seeds | loss | against its own fp32, paired |", "|---|---|---|---|---|---|"]  # fmt: skip
    drop = {}
    for arm, (bits, kind, _) in ARMS.items():
        found = losses(rows, arm)
        if len(found) == 0:
            continue
        drop[arm] = paired(found, losses(rows, f"{kind} fp32"))
        told = "" if arm.endswith("fp32") else _said(drop[arm])
        text.append(f"| {arm} | {bits} | {best(rows, arm)} | {len(found)} | {found.mean():.3f} | {told} |")

    def claim(name: str, values: np.ndarray | None, bound: float, below: bool) -> None:
        if values is None or len(values) < 2:
            text.append(f"- {name}: undecided, rows are missing")
            return
        low, high = interval(values)
        passed = (high < bound, low > bound) if below else (low > bound, high < bound)
        text.append(f"- {name}: {_said(values)}: **{verdict(True if passed[0] else False if passed[1] else None)}**")

    text += ["", "## Verdicts", ""]
    claim("S1 LMD int8-log loses less than 0.03", drop.get("lmd int8-log"), 0.03, True)
    claim("S2 AdamW in MXFP6 to nearest loses more than 0.03", drop.get("adamw mxfp6 nearest"), 0.03, False)
    both = drop.get("adamw mxfp6 stochastic"), drop.get("lmd int8-log")
    claim("S3 AdamW in MXFP6, stochastic, loses more than LMD int8-log", paired(*both) if all(x is not None for x in both) else None, 0.0, False)  # fmt: skip
    eight = losses(rows, "hypentropy int8-log"), losses(rows, "adamw mxfp8 stochastic")
    claim("S4 hypentropy int8-log is better than AdamW in MXFP8, stochastic", paired(*eight), 0.0, True)
    publish("lmd_storage", "\n".join(text) + "\n")


def main() -> None:
    """LRs first, then seeds."""
    args = study.arguments(__doc__ or "")
    if not args.verdict:
        study.run_cells("lmd_storage", tuning(), args.workers, lmd_runs.run)
        study.run_cells("lmd_storage", seeds(study.read("lmd_storage")), args.workers, lmd_runs.run)
    judge(study.read("lmd_storage"))


if __name__ == "__main__":
    main()
