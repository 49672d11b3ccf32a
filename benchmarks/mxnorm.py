"""MXNorm's estimate of the RMS, and whether training with it ends where RMSNorm does, under MXFP8.

Pre-registered (before any row of this study was run):
  E   Gaussian rows: mean of estimate / RMS within 0.2 % of 1 for K >= 32, standard deviation 0.154 / sqrt(K) within 12 %.
  N1  p = 2, recipe mxfp8: mean final validation loss minus RMSNorm's under the same recipe lies within the spread of
      seeds (the standard deviation of RMSNorm's losses over seeds), at D = 1024 (K = 32 blocks a row). The paper itself
      is 0.025 worse at 125M parameters and better at 8B.
  N2  the same at D = 256, K = 8, where the estimate of each row scatters by 5 %.
  N3  control: the study sees a real loss of precision: RMSNorm under mxfp4-bare ends worse than under mxfp8 by more
      than that spread. If not, N1 and N2 say little.
  N4  (added after N2's first seeds had been seen to be worse by 0.06 and 0.01, and one trial run) p = 2 with statistic
      blocks of 8, ours: closer to RMSNorm than p = 2 at D = 256, mean over the seeds.
Beside them, without a prediction: p = 1, the form that rides (1 / r on the product's rows), and the estimate from
rounded scales. `noise`: RMSNorm with the LR raised by 0.01 %, what two runs differ by when nothing differs.
Setting: u-muP with trainable gains, LR 2^0, byte-level Austen + WEB, 128 bytes a sequence, paired seeds. D = 1024: 2
blocks, 100 steps of 4 sequences. D = 256: 4 blocks, 200 steps of 8.

    OMP_NUM_THREADS=1 python benchmarks/mxnorm.py --workers 1
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy import stats
from study import Cell, finite, main, publish, verdict

from isoscale.nn import mxnorm_bound
from isoscale.nn.mxnorm import estimator_for, norm_format

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
    "mxnorm p=2, blocks of 8": {"numerics.norm": "mxnorm-fine"},
    "mxnorm p=2, rides": {"numerics.norm": "mxnorm-ride"},
    "mxnorm, rounded": {"numerics.norm": "mxnorm-rounded"},
    "rmsnorm bf16": {"numerics.recipe": "bf16"},
    "rmsnorm mxfp4-bare": {"numerics.recipe": "mxfp4-bare"},
}
SEEDS = (0, 1, 2)
CLAIMS = {("mxnorm p=2", 1024): "N1", ("mxnorm p=2", 256): "N2", ("rmsnorm mxfp4-bare", 256): "N3",
          ("mxnorm p=2, blocks of 8", 256): "N4"}  # fmt: skip


def cell(width: int, arm: str, seed: int) -> Cell:
    """One run."""
    return {"label": {"width": width, "arm": arm, "seed": seed},
            "config": {**BASE, **SIZES[width], **ARMS[arm], "seed": seed}}  # fmt: skip


def cells() -> list[Cell]:
    """The pairs of N1, N2 and N3 first; the arms without a prediction have one seed at D = 1024."""
    pair = ("rmsnorm", "mxnorm p=2")
    first = [cell(width, arm, seed) for seed in SEEDS for width in (256, 1024) for arm in pair]
    control = [cell(256, arm, seed) for seed in SEEDS for arm in ("mxnorm p=2, blocks of 8", "rmsnorm mxfp4-bare")]
    wide = [cell(1024, arm, 0) for arm in ("mxnorm p=1", "mxnorm, rounded")]
    known = {str(one["label"]) for one in (*first, *control, *wide)}
    rest = [cell(256, arm, seed) for seed in SEEDS for arm in ARMS]
    return [*first, *control, *wide, *(one for one in rest if str(one["label"]) not in known)]


def draws(name: str, dim: int) -> torch.Tensor:
    """2000 rows of one distribution."""
    torch.manual_seed(0)
    shape = (2000, dim)
    if name == "Laplace":
        return torch.distributions.Laplace(0.0, 1.0).sample(shape)
    if name == "Student t, 4 d.o.f.":
        return torch.distributions.StudentT(4.0).sample(shape)
    x = torch.randn(shape)
    if name == "Gaussian + one of 50 sigma":
        x[:, 5] = 50.0
    return x


def estimator() -> list[str]:
    """The estimate against the true RMS, and its verdict."""
    fmt = norm_format("mxfp8_e4m3")
    text = ["| rows of | D | K | p = 1, estimate / RMS | p = 2 | p = 1 from rounded scales |", "|---|---|---|---|---|---|"]
    holds = True
    cases = [("Gaussian", dim) for dim in (128, 256, 1024, 4096)]
    cases += [(name, 4096) for name in ("Laplace", "Student t, 4 d.o.f.", "Gaussian + one of 50 sigma")]
    for name, dim in cases:
        x = draws(name, dim)
        true, found = x.double().square().mean(-1, keepdim=True).sqrt(), []
        for p, kind in ((1, "raw"), (2, "raw"), (1, "rounded")):
            ratio = estimator_for(dim, fmt, p, 0.0, estimate=kind).rms(x).double() / true
            mean, sd = float(ratio.mean()), float(ratio.std())
            found.append(f"{mean:.4f} ± {sd:.4f}")
            if name == "Gaussian" and kind == "raw":
                close = dim < 1024 or abs(mean - 1) < 2e-3
                holds = holds and close and (dim < 1024 or abs(sd / (0.154 / (dim / 32) ** 0.5) - 1) < 0.12)
        text.append(f"| {name} | {dim} | {dim // 32} | " + " | ".join(found) + " |")
    bounds = ", ".join(f"p = {p}: {mxnorm_bound(p, 32, 4096):.1f}" for p in (2, 1))
    return [*text, "", f"Bound of the output at D = 4096, B = 32: {bounds}; RMSNorm: 64.0. Reached by a row with one "
            "element, never passed (tests).", "", f"- E: **{verdict(holds)}**"]  # fmt: skip


def judge(rows: dict[str, dict[str, Any]]) -> None:
    """Tables and verdicts into docs/results/mxnorm.md."""
    losses: dict[tuple[int, str], dict[int, float]] = {}
    for row in rows.values():
        label = row["label"]
        losses.setdefault((label["width"], label["arm"]), {})[label["seed"]] = float(row["val_loss"])
    text = ["# MXNorm", "", "Speed: [mxnorm_speed.md](mxnorm_speed.md).", "", "## The estimate", "", *estimator(), "",
            "## Training", "", "Command, setting and pre-registration: `benchmarks/mxnorm.py`. Losses in "
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
            claim = CLAIMS.get((arm, width))
            if claim is None:
                continue
            enough = len(pairs) >= 3
            if claim == "N4":
                coarse = losses.get((width, "mxnorm p=2"), {})
                gap = float(np.mean([coarse[seed] - base[seed] for seed in coarse if seed in base]))
                holds = abs(mean) < abs(gap) if enough and len(coarse) >= 3 else None
                said.append(f"- N4, D = {width}: {arm} minus RMSNorm {mean:+.4f}, p = 2 {gap:+.4f}: **{verdict(holds)}**")
                continue
            holds = (mean > spread if claim == "N3" else abs(mean) <= spread) if enough else None
            said.append(f"- {claim}, D = {width}: {arm} minus RMSNorm {mean:+.4f} over {len(pairs)} seeds, spread of "
                        f"RMSNorm's losses over seeds {spread:.4f}: **{verdict(holds)}**")  # fmt: skip
    publish("mxnorm", "\n".join([*text, "", "## Verdicts of the training", "", *said]) + "\n")


if __name__ == "__main__":
    main("mxnorm", __doc__ or "", cells(), judge)
