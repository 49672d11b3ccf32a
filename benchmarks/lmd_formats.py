"""LMD against AdamW, Lion and Madam in low precision: loss over (LR x format), and tuned losses on fresh seeds.

Pre-registered before any row of this file's data was run, but with knowledge of a first round (`lmd_first.jsonl`: AdamW
and LMD at usual, untuned settings, nine LRs, five formats, seed 0), in which LMD lost. So all were tuned first
(`lmd_tune.py`: nine LRs and fourteen other settings each). All at 0.22 to 0.25 million parameters, 400 steps (ViT 200); each
optimiser gets seven LRs a factor of 2 apart on seed 0 (equal tuning FLOPs); a format's LR is that of the lowest loss on
seed 0 in that format (Llama-style, AdamW and LMD) or in fp32 (else); final losses over three seeds, seed 0 among them.
  F1  LMD does not degrade with an MXFP6 forward: its loss in `6/16` minus its own fp32 is below +0.01 nats/byte
      (Llama-style, GPT-2) and +0.03 nats/image (ViT), upper end of the 95 % interval over paired seeds.
  F2  AdamW does: the same difference is above +0.01 (+0.03), lower end. (The paper's contrast; the prototype saw none.)
  F3  MXFP4: LMD's degradation in `4/16` is smaller than AdamW's (interval of the difference of differences below 0).
  F4  Absolute: LMD's loss in `4/16` is at most AdamW's (interval of the difference below +0.01).
  F5  Stable valley (Llama-style, seed 0): octaves of LR within 0.1 nats/byte of the optimiser's own best in that format;
      LMD's is wider than AdamW's by at least one octave in `4/16` and in `4/4`.
  F6  Quantised backward: LMD's degradation in `6/6` is below +0.02 nats/byte, upper end (Llama-style).
Controls: fp32 itself; the smallest and the largest LRs must be worse than the best by 0.05 for an optimum to count.

    OMP_NUM_THREADS=1 python benchmarks/lmd_formats.py --workers 1
"""

from __future__ import annotations

import math
from typing import Any

import lmd_runs
import numpy as np
import study
from lmd_runs import FORMATS, TUNED
from scipy import stats
from study import Cell

SEEDS = (0, 1, 2)
MAP = ("fp32", "6/16", "4/16", "6/6", "4/4", "6b/16", "6/8", "6/4", "4/4 sr")
KINDS = ("adamw", "lmd", "hypentropy", "lion", "madam", "ivon")
LRS = {kind: lrs[1:-1] for kind, lrs in lmd_runs.LRS.items()}  # the ends of nine had said nothing
SIZES = {"llama": {"batch": 8}, "gpt2": {"batch": 8}, "vit": {"batch": 64, "steps": 200}}


def cell(model: str, kind: str, formats: str, lr: int, seed: int, **size: Any) -> Cell:
    """A cell at tuned settings."""
    return lmd_runs.cell(model, kind, formats, lr, seed, optimizer=TUNED.get(kind, {}), **size)


def tuning() -> list[list[Cell]]:
    """Seed 0, every LR: all formats for AdamW and LMD on the decoder, else fp32; in parts, the ones with claims first."""
    maps = [cell("llama", kind, formats, lr, 0, **SIZES["llama"]) for formats in ("fp32", "4/16", "6/16", "4/4", "6/6")
            for kind in KINDS[:2] for lr in LRS[kind]]  # fmt: skip
    parts = [maps]
    for models, kinds in ((("gpt2", "vit"), KINDS[:2]), (("llama",), KINDS[2:]), (("gpt2", "vit"), KINDS[2:5])):
        parts.append([cell(m, kind, "fp32", lr, 0, **SIZES[m]) for m in models for kind in kinds for lr in LRS[kind]])
    return parts


def best(rows: dict[str, dict[str, Any]], model: str, kind: str, formats: str) -> int | None:
    """log2 of the LR with the lowest loss on seed 0, in that format where it was tuned, else in fp32; None: not yet."""
    for told in (formats, "fp32"):
        found = {lr: rows.get(study.key(cell(model, kind, told, lr, 0, **SIZES[model]))) for lr in LRS[kind]}
        if all(found.values()):
            return min(found, key=lambda lr: float(found[lr]["val_loss"]))
    return None


def finals(rows: dict[str, dict[str, Any]]) -> list[Cell]:
    """Three seeds of each arm at its LR, those with a claim first."""
    claims = [(m, k, f, s) for f in ("fp32", "6/16", "4/16") for m in SIZES for k in ("adamw", "lmd") for s in SEEDS]
    claims += [("llama", k, f, s) for f in MAP[3:] for k in ("adamw", "lmd") for s in SEEDS]
    claims += [(m, k, f, s) for m in SIZES for k in KINDS[2:5] for f in ("fp32", "6/16", "4/16") for s in SEEDS]
    claims += [("llama", "ivon", f, s) for f in ("fp32", "6/16", "4/16") for s in SEEDS]
    claims += [("llama", k, f, s) for f in MAP[3:] for k in KINDS[2:5] for s in SEEDS]
    claims += [(m, k, f, s) for m in ("gpt2", "vit") for f in MAP[3:] for k in KINDS[:5] for s in SEEDS]
    out = []
    for model, kind, formats, seed in claims:
        lr = best(rows, model, kind, formats)
        if lr is not None:
            out.append(cell(model, kind, formats, lr, seed, **SIZES[model]))
    return out


def losses(rows: dict[str, dict[str, Any]], model: str, kind: str, formats: str) -> np.ndarray:
    """Final losses of the seeds that are there."""
    lr = best(rows, model, kind, formats)
    found = [rows.get(study.key(cell(model, kind, formats, lr, seed, **SIZES[model]))) for seed in SEEDS] if lr is not None else []
    return np.array([float(row["val_loss"]) for row in found if row])


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of a mean; infinite where it cannot be said."""
    if len(values) < 2 or not np.isfinite(values).all():
        return -math.inf, math.inf
    half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
    return float(values.mean()) - half, float(values.mean()) + half


def paired(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Differences of paired seeds."""
    n = min(len(a), len(b))
    return a[:n] - b[:n]


def judge_bound(values: np.ndarray, bound: float, below: bool) -> bool | None:
    """Whether the mean lies below (above) a bound, by its interval; None where the interval holds it."""
    low, high = interval(values)
    if below:
        return True if high < bound else False if low > bound else None
    return True if low > bound else False if high < bound else None


def valley(rows: dict[str, dict[str, Any]], kind: str, formats: str) -> float | None:
    """Octaves within 0.1 of the best, linear between the LRs; None: not all there."""
    found = [rows.get(study.key(cell("llama", kind, formats, lr, 0, **SIZES["llama"]))) for lr in LRS[kind]]
    if not all(found):
        return None
    y = np.array([min(float(row["val_loss"]), 10.0) for row in found if row])
    fine = np.interp(np.linspace(0, len(y) - 1, 801), np.arange(len(y)), y)
    return float((fine <= y.min() + 0.1).mean() * (len(y) - 1))


def judge(rows: dict[str, dict[str, Any]]) -> None:
    """Tables, heat map and verdicts into docs/results/lmd.md."""
    from lmd_report import write

    write()


def main() -> None:
    """Each part: tuning, then the seeds at the LRs found."""
    args = study.arguments(__doc__ or "")
    name = "lmd_formats"
    if not args.verdict:
        for part in tuning():
            study.run_cells(name, part, args.workers, lmd_runs.run)
            study.run_cells(name, finals(study.read(name)), args.workers, lmd_runs.run)
    judge(study.read(name))


assert set(MAP) == set(FORMATS)
if __name__ == "__main__":
    main()
