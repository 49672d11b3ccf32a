"""All four axes at once: does a base LR tuned on the proxy serve a target that is wider, deeper, longer and batched more?

Pre-registered (before any row of this study was run):
  J1  the proxy's fitted LR, carried by Complete(d)P (alpha 1, QK norm), costs at most 0.02 nats/byte against the target's
      own tuned optimum.
  J2  control: the same LR without any rule (SP from the same base values) costs more than 0.05 there.
Proxy: width 64, depth 2, 200 steps of 8 x 128 tokens (the curve `size` of axes.py, same HPs). Target: width 256, depth 4,
200 steps of 16 x 128: 4 x width, 2 x depth, 2 x batch, 2 x tokens, the largest that this machine trains five times.
Setting otherwise as axes.py. The saving counts training FLOPs: a sweep at the target against one at the proxy.

    OMP_NUM_THREADS=1 python benchmarks/joint.py --workers 1
"""

from __future__ import annotations

from typing import Any

import axes
from study import Cell, cost_of, finite, losses, main, optimum, publish, read, verdict

TARGET = {"model.width": 256, "model.depth": 4, "train.batch": 16, "train.steps": 200}
SETTINGS = {**axes.SIZE, **axes.SCHEMES["d-1-qk"][0], **TARGET}
GRID = (-6, -7, -5, -8, -4)


def cells() -> list[Cell]:
    """The target's curve, most telling first; then the control."""
    out: list[Cell] = [
        {"label": {"rule": "complete-d", "log2_lr": e, "seed": 0}, "config": {**SETTINGS, "hps.lr": 2.0**e, "seed": 0}}
        for e in GRID
    ]
    plain = {key: value for key, value in SETTINGS.items() if not key.startswith(("base.", "rules."))}
    return out + [
        {"label": {"rule": "sp", "log2_lr": e, "seed": 0},
         "config": {**plain, "rules.parametrisation": "sp", "hps.lr": 2.0**e, "seed": 0}}
        for e in (-6, -8)
    ]  # fmt: skip


def flops(width: int, depth: int, tokens: int) -> float:
    """Training FLOPs of one run: 6 per matmul parameter and token, plus causal attention."""
    from isoscale.config import RunConfig
    from isoscale.planning import cost
    from isoscale.train.setup import meta_plan

    config = RunConfig().with_values(**{**axes.SIZE, **axes.SCHEMES["d-1-qk"][0], "model.width": width,
                                        "model.depth": depth})  # fmt: skip
    return cost(meta_plan(config).rows, width=width, depth=depth, seq_len=128).flops_per_token * tokens


def judge(rows: dict[str, dict[str, Any]]) -> None:
    """Table and verdicts into docs/results/joint.md."""
    curves = losses(rows.values(), "rule")
    base = losses(read("axes").values(), "scheme", "end", "off").get(("d-1-qk", "size", False), {})
    points = curves.get(("complete-d",), {})
    if len(points) < 3 or len(base) < 5:
        print("not enough rows yet")
        return
    proxy, target = optimum(base), optimum(points)
    price = cost_of(points, proxy.at)[0]
    single = min(points, key=lambda e: abs(e - proxy.at))
    plain = {e: min(by.values()) for e, by in curves.get(("sp",), {}).items()}
    control = min((value for e, value in plain.items() if e == single), default=float("nan")) - target.loss
    big = flops(256, 4, 200 * 16 * 128)
    small = flops(64, 2, 200 * 8 * 128)
    text = [
        "# All axes at once", "",
        "Command, setting and pre-registration: `benchmarks/joint.py`. Losses in nats/byte; one seed at the target.", "",
        "| rule | " + " | ".join(f"2^{e:g}" for e in sorted(points)) + " |", "|---|" + "---|" * len(points),
        "| complete-d | " + " | ".join(finite(min(points[e].values())) for e in sorted(points)) + " |",
        "| sp | " + " | ".join(finite(plain[e]) if e in plain else "" for e in sorted(points)) + " |", "",
        f"Proxy's optimum 2^{proxy.at:.2f} ({len({s for by in base.values() for s in by})} seeds), target's own 2^{target.at:.2f}"
        f" at {target.loss:.3f}. One run at the target costs {big:.3g} FLOPs, at the proxy {small:.3g}: the same sweep is "
        f"{big / small:.0f} times cheaper there.", "", "## Verdicts", "",
        f"- **J1** the proxy's LR costs {price:.4f} at the target (limit 0.02, one seed): **{verdict(price <= 0.02)}**",
        f"- **J2** without a rule it costs {control:.4f} (must exceed 0.05): "
        f"**{verdict(None if control != control else control > 0.05)}**",
    ]  # fmt: skip
    publish("joint", "\n".join(text) + "\n")


if __name__ == "__main__":
    main("joint", __doc__ or "", cells(), judge)
