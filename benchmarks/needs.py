"""What does LR transfer need? Each ingredient of u-muP's setting switched off alone.

Pre-registered (before any row was run). An ingredient is *needed* here if, without it, the optimum moves at least 0.5
octave more between widths 32 and 128 than with it, or the width-32 LR costs at least 0.01 nats/byte more at width 128.
  N1  non-parametric norms are needed      (against trainable gains)
  N2  independent weight decay is needed   (against coupled; both of the same strength at width 32, LR 2^1)
  N3  the embedding LR 1/sqrt(fan_out) is needed  (against a constant LR of the same value at width 32)
Short runs at small widths may well show none of this: then the verdict is *refuted at this scale*, which is not the
same as refuted at the paper's (widths to 4096, 8192 steps).
Setting: as transfer.py, seed 0; independent decay 2^-9 in every arm but "coupled".

    OMP_NUM_THREADS=1 python benchmarks/needs.py --workers 2
"""

from __future__ import annotations

from typing import Any

from study import Cell, cost_of, finite, losses, main, optimum, publish, verdict

LRS = range(-1, 4)
# Coupled: lr_row x decay must equal 2^-9 at width 32, LR 2: a hidden row's LR is 2 x 32^-1/2 x 4^-1/2 = 0.177.
ARMS: dict[str, dict[str, Any]] = {
    "all ingredients": {"hps.weight_decay": 2.0**-9},
    "trainable norms": {"hps.weight_decay": 2.0**-9, "model.norm": "trainable"},
    "coupled decay": {"hps.weight_decay": 2.0**-9 * 32**0.5, "rules.decay": "coupled"},
    "constant embedding LR": {"hps.weight_decay": 2.0**-9, "rules.embedding_lr": "constant", "hps.lr_embedding": 32**-0.5},
}


def cells() -> list[Cell]:
    """One seed at each width."""
    out = []
    for width, seeds in ((32, (0,)), (128, (0,))):
        for arm, settings in ARMS.items():
            for seed in seeds:
                for e in LRS:
                    out.append({
                        "label": {"arm": arm, "width": width, "log2_lr": e, "seed": seed},
                        "config": {"train.steps": 200, "train.batch": 8, "data.seq_len": 128, "model.width": width,
                                   "seed": seed, "hps.lr": 2.0**e, **settings},
                    })  # fmt: skip
    return out


def judge(rows: dict[str, dict[str, Any]]) -> None:
    """Table and verdicts into docs/results/needs.md."""
    curves = losses(rows.values(), "arm", "width")
    text = [
        "# What transfer needs",
        "",
        "Command and pre-registration: `benchmarks/needs.py`.",
        "",
        "| arm | width | " + " | ".join(f"2^{e}" for e in LRS) + " | optimum log2 | loss |",
        "|" + "---|" * (len(LRS) + 4),
    ]
    shift: dict[str, tuple[float, float]] = {}
    for arm in ARMS:
        best = {}
        for width in (32, 128):
            curve = curves.get((arm, width), {})
            if len(curve) < 3:
                continue
            best[width] = optimum(curve)
            shown = [finite(sum(curve[e].values()) / len(curve[e])) if e in curve else "" for e in map(float, LRS)]
            text.append(
                f"| {arm} | {width} | " + " | ".join(shown) + f" | {best[width].at:.2f} | {best[width].loss:.3f} |"
            )
        if len(best) == 2:
            shift[arm] = (abs(best[128].at - best[32].at), cost_of(curves[arm, 128], best[32].at)[0])
    text += ["", "## Verdicts", ""]
    for claim, arm in (("N1", "trainable norms"), ("N2", "coupled decay"), ("N3", "constant embedding LR")):
        needed = None
        shown = "-"
        if arm in shift and "all ingredients" in shift:
            (m0, c0), (m1, c1) = shift["all ingredients"], shift[arm]
            needed = m1 - m0 >= 0.5 or c1 - c0 >= 0.01
            shown = f"moves {m1:.2f} against {m0:.2f} octaves, costs {c1:.4f} against {c0:.4f}"
        text.append(
            f"- **{claim}** {arm}: {shown}: needed: **{verdict(needed)}**"
            + (" at this scale" if needed is False else "")
        )
    publish("needs", "\n".join(text) + "\n")


if __name__ == "__main__":
    main("needs", __doc__ or "", cells(), judge)
