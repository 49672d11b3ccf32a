"""Does training with MXNorm end where RMSNorm does, under MXFP8?

Pre-registered (before any row of this study was run):
  N1  p = 2, recipe mxfp8: mean final validation loss minus RMSNorm's under the same recipe lies within the spread of
      seeds (the standard deviation of RMSNorm's losses over seeds), at D = 1024 (K = 32 blocks a row). The paper itself
      is 0.025 worse at 125M parameters and better at 8B.
  N2  the same at D = 256, K = 8, where the estimate of each row scatters by 5 %.
  N3  control: the study sees a real loss of precision: RMSNorm under mxfp4-bare ends worse than under mxfp8 by more
      than that spread. If not, N1 and N2 say little.
Beside them, without a prediction: p = 1, the form that rides (1 / r on the product's rows), and the estimate from
rounded scales. `noise`: RMSNorm with the LR raised by 0.01 %, what two runs differ by when nothing differs.
Setting: u-muP with trainable gains, LR 2^0, byte-level Austen + WEB, 128 bytes a sequence, paired seeds. D = 1024: 2
blocks, 100 steps of 4 sequences. D = 256: 4 blocks, 200 steps of 8.

    OMP_NUM_THREADS=1 python benchmarks/mxnorm.py --workers 1
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import stats
from study import Cell, finite, main, publish, verdict

SIZES: dict[int, dict[str, Any]] = {
    1024: {"model.width": 1024, "model.depth": 2, "model.head_size": 64, "train.steps": 100, "train.batch": 4},
    256: {"model.width": 256, "model.depth": 4, "model.head_size": 32, "train.steps": 200, "train.batch": 8},
}
BASE = {"data.seq_len": 128, "model.norm": "trainable", "rules.parametrisation": "u-mup", "hps.weight_decay": 2.0**-13,
        "hps.lr": 1.0, "numerics.recipe": "mxfp8"}  # fmt: skip
ARMS: dict[str, dict[str, Any]] = {
    "rmsnorm": {},
    "mxnorm p=2": {"numerics.norm": "mxnorm"},
    "mxnorm p=1": {"numerics.norm": "mxnorm-p1"},
    "rmsnorm, noise": {"hps.lr": 1.0001},
    "mxnorm p=2, rides": {"numerics.norm": "mxnorm-ride"},
    "mxnorm, rounded": {"numerics.norm": "mxnorm-rounded"},
    "rmsnorm bf16": {"numerics.recipe": "bf16"},
    "rmsnorm mxfp4-bare": {"numerics.recipe": "mxfp4-bare"},
}
SEEDS = (0, 1, 2)


def cell(width: int, arm: str, seed: int) -> Cell:
    """One run."""
    return {"label": {"width": width, "arm": arm, "seed": seed},
            "config": {**BASE, **SIZES[width], **ARMS[arm], "seed": seed}}  # fmt: skip


def cells() -> list[Cell]:
    """The pairs of N1 and N2 first; D = 256 has all arms."""
    first = ("rmsnorm", "mxnorm p=2", "mxnorm p=1", "mxnorm, rounded")
    rest = [arm for arm in ARMS if arm not in first]
    wide = [cell(1024, arm, seed) for seed in SEEDS for arm in first]
    return [*(cell(256, arm, seed) for seed in SEEDS for arm in first), *wide,
            *(cell(256, arm, seed) for seed in SEEDS for arm in rest)]  # fmt: skip


def judge(rows: dict[str, dict[str, Any]]) -> None:
    """Table and verdicts into docs/results/mxnorm_training.md."""
    losses: dict[tuple[int, str], dict[int, float]] = {}
    for row in rows.values():
        label = row["label"]
        losses.setdefault((label["width"], label["arm"]), {})[label["seed"]] = float(row["val_loss"])
    text = ["# Training with MXNorm", "", "Command, setting and pre-registration: `benchmarks/mxnorm.py`. Losses in "
            "nats/byte; the difference is paired by seed, with a 95 % interval of its mean (t, so few seeds make it wide).",
            "", "| D | K | arm | seeds | loss by seed | minus RMSNorm under mxfp8 |", "|---|---|---|---|---|---|"]
    said: list[str] = []
    for width in SIZES:
        base = losses.get((width, "rmsnorm"), {})
        spread = float(np.std(list(base.values()), ddof=1)) if len(base) > 1 else float("nan")
        for arm in ARMS:
            found = losses.get((width, arm), {})
            if not found:
                continue
            pairs = [found[seed] - base[seed] for seed in found if seed in base]
            mean = float(np.mean(pairs)) if pairs else float("nan")
            half = float(stats.t.ppf(0.975, len(pairs) - 1) * stats.sem(pairs)) if len(pairs) > 1 else float("nan")
            told = "" if arm == "rmsnorm" else f"{mean:+.4f} ± {half:.4f}"
            each = ", ".join(finite(found[seed]) for seed in sorted(found))
            text.append(f"| {width} | {width // 32} | {arm} | {len(found)} | {each} | {told} |")
            claim = {("mxnorm p=2", 1024): "N1", ("mxnorm p=2", 256): "N2", ("rmsnorm mxfp4-bare", 256): "N3"}.get((arm, width))
            if claim is None:
                continue
            enough = len(pairs) >= 3
            holds = (mean > spread if claim == "N3" else abs(mean) <= spread) if enough else None
            said.append(f"- {claim}, D = {width}: {arm} minus RMSNorm {mean:+.4f} over {len(pairs)} seeds, spread of "
                        f"RMSNorm's losses over seeds {spread:.4f}: **{verdict(holds)}**")  # fmt: skip
    publish("mxnorm_training", "\n".join([*text, "", "## Verdicts", "", *said]) + "\n")


if __name__ == "__main__":
    main("mxnorm", __doc__ or "", cells(), judge)
