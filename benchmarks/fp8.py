"""What u-muP's FP8 costs against its fp32 twin, and what breaks when its parts are taken away.

Pre-registered (before any row was run):
  F1  u-muP, recipe fp8: final validation loss within 0.005 nats/byte of fp32 (paired seeds and data; the 95 % interval
      of the mean difference lies inside +-0.005), and the difference is not exactly 0 (the casts happened).
  F2  must fail: the same with gradients pushed 2^-12 down (loss_scale) ends >= 0.05 worse. If it does not, F1 says
      nothing about gradients.
  F3  SP under the same plain cast ends >= 0.02 worse than its fp32 twin; a loss scale repairs at least half of it.
Beside them, without a prediction: all layers in FP8, LR x 4, the small-scale recipe (E4M3 gradients), muP.
Setting: width 128, 4 blocks, 200 steps of 8 x 128 bytes; seeds 0 to 4 for F1's pair, 0 and 1 for the other arms; LRs are
each scheme's own at this size to an octave
(see transfer.md). Emulated casts, exact on any machine.

    OMP_NUM_THREADS=1 python benchmarks/fp8.py --workers 2
"""

from __future__ import annotations

from typing import Any

import numpy as np
from study import Cell, finite, main, publish, verdict

BASE = {"train.steps": 200, "train.batch": 8, "data.seq_len": 128, "model.width": 128}
UMUP = {"rules.parametrisation": "u-mup", "hps.weight_decay": 2.0**-13, "hps.lr": 2.0**1}
SP = {"rules.parametrisation": "sp", "hps.weight_decay": 0.1, "hps.lr": 2.0**-8}
MUP = {"rules.parametrisation": "mup", "hps.weight_decay": 0.1, "hps.lr": 2.0**-7, "base.width": 64}
FP8 = {"numerics.recipe": "fp8", "numerics.log_casts": True}
ARMS: dict[str, dict[str, Any]] = {
    "u-mup fp32": UMUP,
    "u-mup fp8": {**UMUP, **FP8},
    "u-mup fp8, gradients x 2^-12": {**UMUP, **FP8, "numerics.loss_scale": 2.0**-12},
    "u-mup fp8-all": {**UMUP, **FP8, "numerics.recipe": "fp8-all"},
    "u-mup fp8-small-scale": {**UMUP, **FP8, "numerics.recipe": "fp8-small-scale"},
    "u-mup LR x4 fp32": {**UMUP, "hps.lr": 2.0**3},
    "u-mup LR x4 fp8": {**UMUP, **FP8, "hps.lr": 2.0**3},
    "mup fp32": MUP,
    "mup fp8": {**MUP, **FP8},
    "sp fp32": SP,
    "sp fp8": {**SP, **FP8},
    "sp fp8, loss scale 2^14": {**SP, **FP8, "numerics.loss_scale": 2.0**14},
}
TWIN = {
    "u-mup fp8": "u-mup fp32", "u-mup fp8, gradients x 2^-12": "u-mup fp32", "u-mup fp8-all": "u-mup fp32",
    "u-mup fp8-small-scale": "u-mup fp32", "u-mup LR x4 fp8": "u-mup LR x4 fp32", "mup fp8": "mup fp32",
    "sp fp8": "sp fp32", "sp fp8, loss scale 2^14": "sp fp32",
}  # fmt: skip
SEEDS = (0, 1, 2, 3, 4)
MAIN = ("u-mup fp32", "u-mup fp8")


def cells() -> list[Cell]:
    """One cell per arm and seed, seed 0 of everything first."""
    picked = [(arm, seed) for seed in SEEDS for arm in ARMS if seed < 2 or arm in MAIN]
    return [
        {"label": {"arm": arm, "seed": seed}, "config": {**BASE, **ARMS[arm], "seed": seed}} for arm, seed in picked
    ]


def gaps(loss: dict[tuple[str, int], float], arm: str) -> np.ndarray:
    """Paired differences arm - twin, one per seed."""
    return np.array([loss[arm, s] - loss[TWIN[arm], s] for s in SEEDS if (arm, s) in loss and (TWIN[arm], s) in loss])


def interval(diffs: np.ndarray) -> tuple[float, float, float]:
    """Mean and 95 % t interval of paired differences."""
    mean = float(diffs.mean())
    if len(diffs) < 2:
        return mean, float("-inf"), float("inf")
    t = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}.get(len(diffs), 2.0)
    half = t * float(diffs.std(ddof=1)) / len(diffs) ** 0.5
    return mean, mean - half, mean + half


def judge(rows: dict[str, dict[str, Any]]) -> None:
    """Table and verdicts into docs/results/fp8.md."""
    loss = {(r["label"]["arm"], r["label"]["seed"]): float(r["val_loss"]) for r in rows.values()}
    text = [
        "# FP8 by plain cast",
        "",
        "Command and pre-registration: `benchmarks/fp8.py`. Backend: emulated (exact).",
        "Losses: nats per byte, validation; the gap is paired by seed and data.",
        "",
        "| arm | loss (mean) | gap to its fp32 twin (95 %) | seeds |",
        "|---|---|---|---|",
    ]
    gap: dict[str, tuple[float, float, float]] = {}
    for arm in ARMS:
        values = [loss[arm, s] for s in SEEDS if (arm, s) in loss]
        if not values:
            continue
        shown = ""
        if arm in TWIN and len(gaps(loss, arm)):
            gap[arm] = interval(gaps(loss, arm))
            shown = f"{gap[arm][0]:+.4f} ({gap[arm][1]:+.4f} to {gap[arm][2]:+.4f})"
        text.append(f"| {arm} | {finite(float(np.mean(values)))} | {shown} | {len(values)} |")
    f1 = f2 = f3 = None
    if "u-mup fp8" in gap and len(gaps(loss, "u-mup fp8")) >= 2:
        mean, low, high = gap["u-mup fp8"]
        inside = low >= -0.005 and high <= 0.005
        f1 = (True if inside else (False if low > 0.005 or high < -0.005 else None)) if mean != 0 else False
    if "u-mup fp8, gradients x 2^-12" in gap:
        f2 = gap["u-mup fp8, gradients x 2^-12"][0] >= 0.05
    if "sp fp8" in gap and "sp fp8, loss scale 2^14" in gap:
        f3 = gap["sp fp8"][0] >= 0.02 and gap["sp fp8, loss scale 2^14"][0] <= gap["sp fp8"][0] / 2
    text += [
        "",
        "## Verdicts",
        "",
        f"- **F1** fp8 within 0.005 of fp32, and not equal: **{verdict(f1)}**",
        f"- **F2** gradients pushed 2^-12 down must fail (>= 0.05): **{verdict(f2)}**",
        f"- **F3** SP under the plain cast loses >= 0.02 and a loss scale repairs half: **{verdict(f3)}**",
        "",
    ]
    text += [
        "## Clipped and flushed share at the end of training",
        "",
        "Largest over the layers of each kind and the seeds.",
        "",
        "| arm | layer | operand | format | clipped | flushed | rms |",
        "|---|---|---|---|---|---|---|",
    ]
    worst: dict[tuple[str, str, str, str], list[float]] = {}
    for row in rows.values():
        for c in row.get("casts", []):
            kind = ".".join("*" if part.isdigit() else part for part in c["layer"].split("."))
            at = worst.setdefault((row["label"]["arm"], kind, c["operand"], c["format"]), [0.0, 0.0, 0.0])
            for i, name in enumerate(("clipped", "flushed", "rms")):
                at[i] = max(at[i], float(c[name]))
    for (arm, kind, operand, fmt), (clipped, flushed, rms) in worst.items():
        if fmt != "bf16" and arm in ("u-mup fp8", "u-mup fp8, gradients x 2^-12", "sp fp8", "mup fp8"):
            text.append(f"| {arm} | {kind} | {operand} | {fmt} | {clipped:.2%} | {flushed:.2%} | {rms:.3g} |")
    publish("fp8", "\n".join(text) + "\n")


if __name__ == "__main__":
    main("fp8", __doc__ or "", cells(), judge)
