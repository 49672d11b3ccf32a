"""What each optimiser's other settings should be before LMD is compared: one at a time, equal budgets, seed 0, fp32.

Nine LRs first, then fourteen other settings (Madam, whose step has no momentum, eleven), each varied alone from the usual
values at the best of these LRs; what gains more than 0.02 is taken, and LRs are tried again with all of it by
`lmd_formats.py`. First rows had shown why: LMD at its assumed values (lambda 0.1, betas 0.9 and 0.99) lost everywhere.

    OMP_NUM_THREADS=1 python benchmarks/lmd_tune.py --workers 1
"""

from __future__ import annotations

import math
from typing import Any

import lmd_runs
import study
from lmd_runs import LRS, cell
from study import Cell

ONE = [0.9]
OTHERS: dict[str, list[dict[str, Any]]] = {
    "lmd": [{"decay": 0.3}, {"decay": 1.0}, {"decay": 3.0}, {"offset": 0.03}, {"offset": 0.3}, {"betas": ONE},
            {"betas": [0.9, 0.95]}, {"betas": [0.95, 0.98]}, {"sigma": 0.02}, {"sigma": 0.1}, {"gradient": "median"}],
    "adamw": [{"weight_decay": 0.0}, {"weight_decay": 0.3}, {"weight_decay": 1.0}, {"betas": [0.9, 0.99]},
              {"betas": [0.9, 0.98]}, {"betas": [0.95, 0.95]}, {"betas": [0.95, 0.99]}, {"betas": [0.8, 0.95]},
              {"eps": 1e-6}, {"eps": 1e-10}, {"weight_decay": 3.0}],
    "lion": [{"weight_decay": 0.0}, {"weight_decay": 0.2}, {"weight_decay": 1.0}, {"weight_decay": 3.0},
             {"weight_decay": 10.0}, {"betas": [0.9, 0.95]}, {"betas": [0.95, 0.98]}, {"betas": [0.9, 0.9]},
             {"betas": [0.8, 0.95]}, {"betas": [0.95, 0.99]}, {"betas": [0.8, 0.9]}],
    "madam": [{"bound": 1.0}, {"bound": 2.0}, {"bound": 10.0}, {"bound": 30.0}, {"bound": 1e9}, {"beta": 0.99},
              {"beta": 0.95}, {"beta": 0.9}, {"clip": 3.0}, {"clip": 1.0}, {"clip": 30.0}],
}  # fmt: skip
SHORTER: dict[str, list[dict[str, Any]]] = {
    "lmd": [{"betas": [0.8, 0.9]}, {"betas": [0.8, 0.95]}, {"betas": [0.7, 0.9]}],
    "adamw": [{"betas": [0.7, 0.95]}, {"betas": [0.8, 0.99]}, {"betas": [0.8, 0.9]}],
    "lion": [{"betas": [0.7, 0.9]}, {"betas": [0.6, 0.9]}, {"betas": [0.8, 0.8]}],
}  # fmt: skip
"""A second round of three, as the first had shown that all want short momenta."""
for _kind, _more in SHORTER.items():
    OTHERS[_kind] += _more
OTHERS["hypentropy"] = OTHERS["lmd"]


def base(kind: str) -> list[Cell]:
    """The LRs at usual settings."""
    return [cell("llama", kind, "fp32", lr, 0) for lr in LRS[kind]]


def others(rows: dict[str, dict[str, Any]], kind: str) -> list[Cell]:
    """The other settings at the best LR; nothing before that is known."""
    found = {c["label"]["log2_lr"]: rows.get(study.key(c)) for c in base(kind)}
    if not all(found.values()):
        return []
    lr = min(found, key=lambda x: float(found[x]["val_loss"]))
    return [cell("llama", kind, "fp32", lr, 0, optimizer=said, label={"said": str(said)}) for said in OTHERS[kind]]


def main() -> None:
    """Runs both rounds, prints the table."""
    args = study.arguments(__doc__ or "")
    kinds = ("lmd", "adamw", "lion", "madam", "hypentropy")
    if not args.verdict:
        for kind in kinds:
            study.run_cells("lmd_tune", base(kind), args.workers, lmd_runs.run)
            study.run_cells("lmd_tune", others(study.read("lmd_tune"), kind), args.workers, lmd_runs.run)
    rows = study.read("lmd_tune")
    for kind in kinds:
        start = [rows.get(study.key(c)) for c in base(kind)]
        best = min((float(row["val_loss"]) for row in start if row), default=math.nan)
        print(f"{kind}: usual settings {best:.4f}")
        for c in others(rows, kind):
            row = rows.get(study.key(c))
            if row:
                print(f"  {c['label']['said']:28} {float(row['val_loss']) - best:+.4f}")


if __name__ == "__main__":
    main()
