"""Does the learning rate carry over depth under u-muP? Known to be weaker than over width.

Pre-registered (before any row was run):
  D1  u-muP: the fitted optimum moves at most 0.5 octave from depth 2 to depth 16.
  D2  u-muP: the LR tuned at depth 2 costs <= 0.01 nats/byte at depth 16 (upper end of the interval <= 0.02).
Setting: width 64, otherwise as transfer.py; seeds 0 1.

    OMP_NUM_THREADS=1 python benchmarks/depth.py --workers 2
"""

from __future__ import annotations

from typing import Any

from study import Cell, cost_of, finite, losses, main, optimum, publish, verdict

DEPTHS, LRS, SEEDS = (2, 4, 8, 16), range(-1, 5), (0, 1)


def cells() -> list[Cell]:
    """Ends first."""
    return [
        {
            "label": {"depth": depth, "log2_lr": e, "seed": seed},
            "config": {"train.steps": 200, "train.batch": 8, "data.seq_len": 128, "model.depth": depth, "seed": seed,
                       "hps.weight_decay": 2.0**-13, "hps.lr": 2.0**e},
        }
        for seed in SEEDS for depth in (2, 16, 4, 8) for e in LRS
    ]  # fmt: skip


def judge(rows: dict[str, dict[str, Any]]) -> None:
    """Table and verdicts into docs/results/depth.md."""
    curves = losses(rows.values(), "depth")
    text = [
        "# LR transfer over depth (u-muP)",
        "",
        "Command and pre-registration: `benchmarks/depth.py`.",
        "",
        "| depth | seeds | " + " | ".join(f"2^{e}" for e in LRS) + " | optimum log2 (95 %) | loss | interior |",
        "|" + "---|" * (len(LRS) + 5),
    ]
    best = {}
    for depth in DEPTHS:
        curve = curves.get((depth,), {})
        if len(curve) < 3:
            continue
        o = best[depth] = optimum(curve)
        cells_ = [finite(sum(curve[e].values()) / len(curve[e])) if e in curve else "" for e in map(float, LRS)]
        seeds = len({s for by in curve.values() for s in by})
        text.append(
            f"| {depth} | {seeds} | "
            + " | ".join(cells_)
            + f" | {o.at:.2f} ({o.low:.2f} to {o.high:.2f}) | {o.loss:.3f} | {'yes' if o.interior else 'no'} |"
        )
    d1 = d2 = None
    move = price = None
    if 2 in best and 16 in best:
        move = abs(best[16].at - best[2].at)
        d1 = move <= 0.5
        price = cost_of(curves[16,], best[2].at)
        d2 = True if price[0] <= 0.01 and price[2] <= 0.02 else (False if price[0] > 0.01 else None)
    text += [
        "",
        "## Verdicts",
        "",
        f"- **D1** moves {'-' if move is None else f'{move:.2f}'} octaves from depth 2 to 16 (limit 0.5): "
        f"**{verdict(d1)}**",
        f"- **D2** depth 2's LR costs {'-' if price is None else f'{price[0]:.4f} ({price[1]:.4f} to {price[2]:.4f})'}"
        f" at depth 16 (limit 0.01, upper 0.02): **{verdict(d2)}**",
    ]
    publish("depth", "\n".join(text) + "\n")


if __name__ == "__main__":
    main("depth", __doc__ or "", cells(), judge)
