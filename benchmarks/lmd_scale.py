"""Where would LMD's advantage appear? A decoder four times as big, trained four times as long as in `lmd_formats.py`.

Pre-registered (before any row of this study was run). Llama-style, width 128, 4 blocks, 0.9 million parameters, 1600 steps
of 8 x 64 tokens; settings as tuned at the small size; LRs: the small size's optimum in fp32, once over sqrt(2) for LMD (its
width rule) and over 2 for AdamW (muP's), and that over 2 again (longer run); the better one counts.
  C1  With an MXFP4 forward LMD's loss minus its own fp32 is smaller than AdamW's (both at their better LR, one seed each:
      a difference of at least 0.02 counts, less is undecided).
  C2  LMD's absolute loss with an MXFP4 forward is at most AdamW's + 0.01.
Predicted from the small size: both refuted.

    OMP_NUM_THREADS=1 python benchmarks/lmd_scale.py --workers 1
"""

from __future__ import annotations

from typing import Any

import lmd_runs
import study
from lmd_runs import TUNED
from study import Cell, finite, publish, verdict

LRS = {"adamw": (-8.0, -9.0), "lmd": (-5.5, -6.5), "hypentropy": (-5.5, -6.5)}
FORMATS = ("fp32", "4/16", "6/16")


def one(kind: str, formats: str, lr: float) -> Cell:
    """A cell."""
    return lmd_runs.cell("llama", kind, formats, lr, 0, steps=1600, width=128, depth=4, batch=8, optimizer=TUNED.get(kind, {}))


def cells() -> list[Cell]:
    """fp32 and MXFP4 first."""
    return [one(kind, formats, LRS[kind][at]) for formats in FORMATS for at in (0, 1) for kind in LRS]


def judge(rows: dict[str, dict[str, Any]]) -> None:
    """Table and verdicts into docs/results/lmd_scale.md."""
    best: dict[tuple[str, str], float] = {}
    text = ["# LMD at four times the size and length", "", "Setting and pre-registration: `benchmarks/lmd_scale.py`; command: "
            "`OMP_NUM_THREADS=1 python benchmarks/lmd_scale.py`. nats/byte on held-out text, one seed.", "",
            "| optimiser | log2 LR | fp32 | MXFP4 forward | MXFP6 forward |", "|---|---|---|---|---|"]  # fmt: skip
    for kind, lrs in LRS.items():
        for lr in lrs:
            found = [rows.get(study.key(one(kind, formats, lr))) for formats in FORMATS]
            values = [None if row is None else float(row["val_loss"]) for row in found]
            for formats, value in zip(FORMATS, values):
                if value is not None:
                    best[kind, formats] = min(value, best.get((kind, formats), 1e9))
            text.append(f"| {kind} | {lr:g} | " + " | ".join("" if v is None else finite(v) for v in values) + " |")
    text += ["", "## Verdicts", ""]
    if all((kind, formats) in best for kind in ("adamw", "lmd") for formats in FORMATS[:2]):
        cost = {kind: best[kind, "4/16"] - best[kind, "fp32"] for kind in ("adamw", "lmd")}
        gap = cost["adamw"] - cost["lmd"]
        told = True if gap >= 0.02 else False if gap <= -0.02 else None
        text.append(f"- C1 LMD's cost of MXFP4 {cost['lmd']:+.3f} is below AdamW's {cost['adamw']:+.3f}: **{verdict(told)}**")
        over = best["lmd", "4/16"] - best["adamw", "4/16"]
        text.append(f"- C2 LMD's loss with MXFP4 is AdamW's {over:+.3f}: **{verdict(over <= 0.01)}**")
    else:
        text.append("- undecided: rows are missing")
    publish("lmd_scale", "\n".join(text) + "\n")


if __name__ == "__main__":
    study.main("lmd_scale", __doc__ or "", cells(), judge, lmd_runs.run)
