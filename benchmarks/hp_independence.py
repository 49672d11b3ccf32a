"""How much does the best value of one hyperparameter depend on another? The paper's transfer error, all HP pairs.

Transfer error of an ordered pair (fixed f, transferred t), arXiv 2407.17465 algorithm 1: on a 2-D grid, for each value
of f other than its best, take the t that is best there, and measure how much is lost by using that t at f's best value,
against the grid's best. The error is the mean over those values of f; an HP pair that does not interact has error 0.
Pre-registered (before any row was run):
  H1  the mean over all ordered pairs is lower for u-muP than for muP by at least a factor 2 (paper: 0.005 and 0.03).
Setting: proxy of width 32, 2 blocks, 150 steps of 8 x 64 bytes, seed 0; 3 x 3 grids centred on the defaults, x4 apart
for the alphas and x2 for the LR; a diverged run counts as 1 nat above the grid's best.

    OMP_NUM_THREADS=1 python benchmarks/hp_independence.py --workers 2
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
from study import Cell, key, main, publish, verdict

FIXED = {"train.steps": 150, "train.batch": 8, "data.seq_len": 64, "model.width": 32, "model.depth": 2, "seed": 0,
         "train.eval_batches": 32}  # fmt: skip
ALPHAS = (0.25, 1.0, 4.0)
SCHEMES: dict[str, tuple[dict[str, Any], dict[str, tuple[float, ...]]]] = {
    "u-mup": (
        {"rules.parametrisation": "u-mup", "hps.lr": 2.0},
        {"lr": (1.0, 2.0, 4.0), "alpha_attn": ALPHAS, "alpha_ffn_act": ALPHAS, "alpha_res": ALPHAS,
         "alpha_res_attn_ratio": ALPHAS, "alpha_loss": ALPHAS},
    ),
    "mup": (
        {"rules.parametrisation": "mup", "base.width": 32, "hps.lr": 2.0**-7},
        {"lr": (2.0**-8, 2.0**-7, 2.0**-6), "init_std": (0.005, 0.02, 0.08), "alpha_emb": ALPHAS,
         "alpha_attn": ALPHAS, "alpha_out": ALPHAS, "lr_embedding": ALPHAS},
    ),
}  # fmt: skip


def cell(scheme: str, values: dict[str, float]) -> Cell:
    """One run; its identity is its settings, so pairs that share a point share the run."""
    base, _ = SCHEMES[scheme]
    config = {**FIXED, **base, **{f"hps.{name}": value for name, value in sorted(values.items())}}
    return {
        "label": {"scheme": scheme, **{k: v for k, v in sorted(config.items()) if k.startswith("hps.")}},
        "config": config,
    }


def default(scheme: str, name: str) -> float:
    """The value used when an HP is not varied."""
    return {"lr": SCHEMES[scheme][0]["hps.lr"], "init_std": 0.02}.get(name, 1.0)


def grid(scheme: str, a: str, b: str) -> list[list[Cell]]:
    """The cells of a pair: rows over a, columns over b. HPs at their default are left out, so points are shared."""
    space = SCHEMES[scheme][1]
    return [
        [cell(scheme, {n: v for n, v in ((a, x), (b, y)) if v != default(scheme, n)}) for y in space[b]]
        for x in space[a]
    ]


def pairs(scheme: str) -> list[tuple[str, str]]:
    """Unordered pairs of HPs."""
    return list(combinations(SCHEMES[scheme][1], 2))


def cells() -> list[Cell]:
    """Every distinct point, pair by pair, the two schemes in turn."""
    out: dict[str, Cell] = {}
    for left, right in zip(pairs("u-mup"), pairs("mup")):
        for scheme, pair in (("u-mup", left), ("mup", right)):
            for row in grid(scheme, *pair):
                for c in row:
                    out.setdefault(key(c), c)
    return list(out.values())


def error(loss: np.ndarray) -> float:
    """Transfer error of the pair (rows fixed, columns transferred)."""
    best_row, best_col = np.unravel_index(int(np.argmin(loss)), loss.shape)
    floor = loss[best_row, best_col]
    others = [r for r in range(loss.shape[0]) if r != best_row]
    return float(np.mean([loss[best_row, int(np.argmin(loss[r]))] - floor for r in others]))


def judge(rows: dict[str, dict[str, Any]]) -> None:
    """Matrices and the verdict into docs/results/hp_independence.md."""
    text = [
        "# Do hyperparameters interact?",
        "",
        "Command and pre-registration: `benchmarks/hp_independence.py`.",
        "Rows: the HP whose value is held wrong; columns: the HP that is transferred.",
        "",
    ]
    means: dict[str, tuple[float, int, int]] = {}
    for scheme, (_, space) in SCHEMES.items():
        errors: dict[tuple[str, str], float] = {}
        for a, b in pairs(scheme):
            cells_ = grid(scheme, a, b)
            if not all(key(c) in rows for row in cells_ for c in row):
                continue
            loss = np.array([[float(rows[key(c)]["val_loss"]) for c in row] for row in cells_])
            loss = np.minimum(loss, np.nanmin(loss[np.isfinite(loss)]) + 1.0)
            errors[a, b], errors[b, a] = error(loss), error(loss.T)
        names = list(space)
        text += [
            f"## {scheme}",
            "",
            "| fixed \\ transferred | " + " | ".join(names) + " |",
            "|" + "---|" * (len(names) + 1),
        ]
        for f in names:
            shown = [f"{errors[f, t]:.3f}" if (f, t) in errors else "" for t in names]
            text.append(f"| {f} | " + " | ".join(shown) + " |")
        means[scheme] = (
            float(np.mean(list(errors.values()))) if errors else float("nan"),
            len(errors),
            2 * len(pairs(scheme)),
        )
        text += [
            "",
            f"Mean transfer error: {means[scheme][0]:.4f} over {means[scheme][1]} of {means[scheme][2]} ordered pairs.",
            "",
        ]
    whole = all(done == total for _, done, total in means.values())
    h1 = means["u-mup"][0] * 2 <= means["mup"][0] if whole else None
    text += ["## Verdict", "", f"- **H1** u-muP's mean transfer error is at most half of muP's: **{verdict(h1)}**"]
    text += ["", "Caveats: one seed a cell, and single runs scatter by about 0.01 (fp8.md), the size of both means; several "
             "of muP's best values lie at an end of its three, where an error of 0 says little; 150 steps against the paper's 8192."]
    publish("hp_independence", "\n".join(text) + "\n")


if __name__ == "__main__":
    main("hp_independence", __doc__ or "", cells(), judge)
