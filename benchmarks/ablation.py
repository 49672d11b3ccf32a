"""Weight decay and eps: does each rule matter at the far corner, at values where it can?

Pre-registered (before any row of this study was run):
  E1  eps at 1x and 0.1x the proxy's median sqrt(v) (2.7e-4 and 2.7e-5, measured after 200 steps at the base): with the
      eps rule on, the corner's LR optimum is within 0.5 octave of the proxy's at that eps and the proxy's LR costs
      <= 0.01 nats/byte there; with eps held constant it costs > 0.01 more at 1x.
  W1  coupled decay with 1 / (LR x decay) = 0.1, 0.3 and 1 of the run (at the base's optimum 2^-6.3): the same two
      statements for the decay rule against a constant decay, at 0.1.
Base and setting: `size` and d-1-qk of axes.py. Corner: width 128, depth 4, 200 steps of 16 sequences (every ratio 2).

    OMP_NUM_THREADS=1 python benchmarks/ablation.py --workers 2
"""

from __future__ import annotations

from typing import Any

import axes
from study import Cell, cost_of, finite, losses, main, optimum, publish, verdict

BASE = {**axes.SIZE, **axes.SCHEMES["d-1-qk"][0]}
CORNER = {"model.width": 128, "model.depth": 4, "train.batch": 16}
MEDIAN, BEST, STEPS = 2.7e-4, 2.0**-6.3, 200
LEVELS: dict[str, tuple[str, dict[str, object]]] = {
    "eps 1x": ("eps", {"hps.eps": MEDIAN}), "eps 0.1x": ("eps", {"hps.eps": 0.1 * MEDIAN}),
    **{f"tau {share:g}": ("weight_decay", {"hps.weight_decay": 1 / (BEST * share * STEPS)}) for share in (0.1, 0.3, 1.0)},
}  # fmt: skip
GRID = range(-8, -3)


def cell(level: str, where: str, log2_lr: int, seed: int) -> Cell:
    """One run; `where` is base, corner or off (the corner without the rule)."""
    quantity, changes = LEVELS[level]
    there = {} if where == "base" else CORNER
    off = {"rules.constant": [quantity]} if where == "off" else {}
    return {
        "label": {"level": level, "where": where, "log2_lr": log2_lr, "seed": seed},
        "config": {**BASE, **changes, **there, **off, "hps.lr": 2.0**log2_lr, "seed": seed},
    }


def cells() -> list[Cell]:
    """The levels where a rule can matter most first, one seed; then the others and more seeds."""
    order = ["eps 1x", "tau 0.1", "eps 0.1x", "tau 0.3", "tau 1"]
    return [cell(level, where, e, seed) for seed in (0, 1, 2) for level in order for where in ("base", "corner", "off")
            for e in GRID]  # fmt: skip


def judge(rows: dict[str, dict[str, Any]]) -> None:
    """Table and verdicts into docs/results/ablation.md."""
    curves = losses(rows.values(), "level", "where")
    text = ["# Ablation of the eps and decay rules at the far corner", "",
            "Command, setting and pre-registration: `benchmarks/ablation.py`. *off* is the corner with that rule switched "
            "off. Drift in octaves against the base at the same level, cost of the base's LR in nats/byte.", "",
            "| level | where | seeds | loss by base LR | optimum, log2 | drift | cost |", "|---|---|---|---|---|---|---|"]
    said: list[str] = []
    edges: dict[str, list[bool]] = {}
    for level in LEVELS:
        base = curves.get((level, "base"), {})
        if len(base) < 5:
            continue
        at, found = optimum(base).at, {}
        for where in ("base", "corner", "off"):
            points = curves.get((level, where), {})
            if len(points) < 5:
                continue
            best, price = optimum(points), cost_of(points, at)[0]
            found[where] = (best.at - at, price, best.loss)
            edges.setdefault(level, []).append(best.at <= min(points) or best.at >= max(points))
            seeds = len({seed for by in points.values() for seed in by})
            grid = " ".join(f"2^{e:g}: {finite(sum(by.values()) / len(by))}" for e, by in sorted(points.items()))
            text.append(f"| {level} | {where} | {seeds} | {grid} | {best.at:.2f} | {best.at - at:+.2f} | {price:.4f} |")
        if "corner" in found and "off" in found:
            (drift, price, loss), (off_drift, off_price, off_loss) = found["corner"], found["off"]
            if any(edges[level]):
                said.append(f"- {level}: the best LR lies on the grid's edge, so no drift can be read: **{verdict(None)}**; "
                            f"with the rule off the loss at the base's LR is {off_price + off_loss - price - loss:+.4f} "
                            "against the rule on")  # fmt: skip
                continue
            holds = abs(drift) <= 0.5 and price <= 0.01
            matters = (off_price + off_loss) - (price + loss) > 0.01
            said.append(
                f"- {level}: rule on drift {drift:+.2f}, cost {price:.4f}: **{verdict(holds)}**; rule off drift {off_drift:+.2f}, "
                f"cost {off_price:.4f}, loss at the base's LR higher by {off_price + off_loss - price - loss:+.4f}: that "
                f"the rule matters is **{verdict(matters)}**"
            )  # fmt: skip
    publish("ablation", "\n".join([*text, "", "## Verdicts (single seeds are context, not proof)", "", *said]) + "\n")


if __name__ == "__main__":
    main("ablation", __doc__ or "", cells(), judge)
