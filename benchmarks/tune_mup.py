"""muP's own hyperparameters, tuned at the proxy (width 64), so that the comparison is not against an untuned rival.

Independent search as in arXiv 2407.17465: at the best LR of the default, one line per hyperparameter; then the LR line
again under all winners together, and the better of (combined, best single) is kept.

    OMP_NUM_THREADS=1 python benchmarks/tune_mup.py
"""

from __future__ import annotations

import json

from study import DATA, Cell, key, read, run_cells
from transfer import SCHEMES, STEPS

LINES: dict[str, tuple[float, ...]] = {
    "hps.init_std": (0.01, 0.04, 0.08, 0.16),
    "hps.alpha_emb": (2.0, 4.0, 8.0, 16.0),
    "hps.lr_embedding": (2.0, 4.0, 16.0),
    "hps.alpha_out": (2.0, 4.0, 8.0),
    "hps.alpha_attn": (0.5, 2.0, 4.0),
}


def cell(changes: dict[str, float], log2_lr: float) -> Cell:
    """One proxy run of muP with some hyperparameters changed."""
    settings = {**STEPS, **SCHEMES["mup"][0], "model.width": 64, "seed": 0, "hps.lr": 2.0**log2_lr, **changes}
    return {"label": {"stage": "tune", "log2_lr": log2_lr, **changes}, "config": settings}


def best(cells: list[Cell]) -> tuple[float, Cell]:
    """The cell of lowest loss, after running what is missing."""
    run_cells("tune_mup", cells, 1)
    rows = read("tune_mup")
    return min(((float(rows[key(c)]["val_loss"]), c) for c in cells), key=lambda pair: pair[0])


if __name__ == "__main__":
    base_loss, base = best([cell({}, e) for e in SCHEMES["mup"][1]])
    lr = base["label"]["log2_lr"]
    winners: dict[str, float] = {}
    single: list[tuple[float, Cell]] = [(base_loss, base)]
    for name, values in LINES.items():
        loss, winner = best([cell({name: value}, lr) for value in values])
        single.append((loss, winner))
        if loss < base_loss:
            winners[name] = winner["config"][name]
    combined = best([cell(winners, e) for e in (lr - 1, lr, lr + 1)])
    loss, choice = min([*single, combined], key=lambda pair: pair[0])
    tuned = {name: value for name, value in choice["config"].items() if name in LINES}
    (DATA / "mup_tuned.json").write_text(json.dumps(tuned) + "\n")
    print(f"default {base_loss:.4f}, tuned {loss:.4f}: {tuned}")
