"""Does the base learning rate carry over each axis alone? Complete(d)P (alpha 1 and 1/2, QK norm on and off) and u-muP
completed; for each axis the same cells with that axis' rule switched off, which must drift.

Pre-registered (before any row of this study was run):
  A1  per scheme and axis end: the fitted optimum of the base LR lies within 0.5 octave of the base's.
  A2  the base's fitted LR costs <= 0.01 nats/byte at that end (upper end of the interval <= 0.02).
  A3  control: with the axis' rule off, the optimum drifts >= 1 octave or the base's LR costs > 0.02 at that end. An axis
      whose control does not drift says nothing about its rule, and its verdict is undecided whatever A1 and A2 say.
Axes, ends only: width 64 -> 256, depth 2 -> 16, batch 8 -> 2 and 32 (tokens fixed), duration x 1/4 and x 4 (batch fixed).
Setting: decoder, head size 16, FFN ratio 3, trainable RMSNorm, byte-level Austen + WEB, 128 tokens a sequence, AdamW
(0.9, 0.95), betas linear, 10 % warm-up, cosine to 10 %, no clipping. Width and depth: 200 steps of 8 sequences. Batch and
duration: 400 steps of 8 at the base. Base HPs other than the LR were chosen by a screen at the base alone (init_std 0.02
to 0.125, lr_embedding 1 to 16, one seed). The longest run reads 1.6 M of 7.3 M training bytes: no text repeats.
A curve's grid is five LRs around the base's optimum, seven at the base.

    OMP_NUM_THREADS=1 python benchmarks/axes.py --workers 2
"""

from __future__ import annotations

from typing import Any

from study import Cell, Optimum, cost_of, finite, losses, main, optimum, publish, verdict

COMMON = {"data.seq_len": 128, "model.norm": "trainable", "model.width": 64, "model.depth": 2, "train.batch": 8}
SIZE = {**COMMON, "train.steps": 200, "base.width": 64, "base.depth": 2, "base.batch": 8, "base.steps": 200}
RUN = {**COMMON, "train.steps": 400, "base.width": 64, "base.depth": 2, "base.batch": 8, "base.steps": 400}
D = {"rules.parametrisation": "complete-d", "hps.weight_decay": 0.1, "hps.init_std": 0.06, "hps.lr_embedding": 16.0}
U = {"rules.parametrisation": "u-complete-d", "hps.weight_decay": 2.0**-13}
SCHEMES: dict[str, tuple[dict[str, object], int]] = {  # settings, log2 LR in the middle of the grid
    "d-1-qk": ({**D, "rules.alpha": 1.0, "model.qk_norm": True}, -6),
    "d-half-qk": ({**D, "rules.alpha": 0.5, "model.qk_norm": True}, -6),
    "u-1": ({**U, "rules.alpha": 1.0}, 0),
    "u-half": ({**U, "rules.alpha": 0.5}, 0),
    "d-1": ({**D, "rules.alpha": 1.0}, -6),
    "d-half": ({**D, "rules.alpha": 0.5}, -6),
}  # fmt: skip
ENDS: dict[str, tuple[str, str, dict[str, object]]] = {  # end -> base, axis, what differs
    "width x4": ("size", "width", {"model.width": 256}),
    "depth x8": ("size", "depth", {"model.depth": 16}),
    "batch x4": ("run", "batch", {"train.batch": 32, "train.steps": 100}),
    "batch /4": ("run", "batch", {"train.batch": 2, "train.steps": 1600}),
    "duration x4": ("run", "duration", {"train.steps": 1600}),
    "duration /4": ("run", "duration", {"train.steps": 100}),
}
BASES = {"size": SIZE, "run": RUN}
AXES = ("width", "depth", "batch", "duration")


def cell(scheme: str, end: str, log2_lr: int, seed: int, off: bool = False) -> Cell:
    """One run; `off` switches the end's own rule off."""
    settings, _ = SCHEMES[scheme]
    base, axis, changes = ENDS.get(end, (end, "", {}))
    rule = {"rules.axes": [name for name in AXES if name != axis]} if off else {}
    return {
        "label": {"scheme": scheme, "end": end, "off": off, "log2_lr": log2_lr, "seed": seed},
        "config": {**BASES[base], **settings, **changes, **rule, "hps.lr": 2.0**log2_lr, "seed": seed},
    }


def curve(scheme: str, end: str, seed: int, off: bool = False) -> list[Cell]:
    """One LR curve."""
    middle = SCHEMES[scheme][1]
    reach = 3 if end in BASES else 2
    return [cell(scheme, end, e, seed, off) for e in range(middle - reach, middle + reach + 1)]


def controlled(scheme: str, end: str) -> bool:
    """Whether there is a rule to switch off: unit scaling holds its width rule in its ops."""
    return not (scheme.startswith("u-") and end.startswith("width"))


def cells() -> list[Cell]:
    """One seed of the main scheme with controls, its other seeds, one seed of the rest, then what makes it complete."""
    out: list[Cell] = []
    cheap = ["size", "run", "batch x4", "duration /4", "batch /4", "duration x4", "depth x8", "width x4"]
    main_scheme, others = "d-1-qk", ["u-1", "d-half-qk", "u-half", "d-1", "d-half"]
    out += [c for end in cheap for c in curve(main_scheme, end, 0)]
    out += [c for end in cheap[2:] for c in curve(main_scheme, end, 0, off=True)]
    for seed in (1, 2):
        out += [c for end in cheap for c in curve(main_scheme, end, seed)]
    for scheme in others:
        out += [c for end in cheap for c in curve(scheme, end, 0)]
    for scheme in others[:2]:
        out += [c for end in cheap[2:] if controlled(scheme, end) for c in curve(scheme, end, 0, off=True)]
    for seed in (1, 2):
        for scheme in others:
            out += [c for end in cheap for c in curve(scheme, end, seed)]
        out += [c for end in cheap[2:] for c in curve(main_scheme, end, seed, off=True)]
    return out


def _line(name: str, points: dict[float, dict[int, float]], best: Optimum, base: Optimum | None) -> str:
    grid = " ".join(f"2^{e:g}: {finite(sum(by.values()) / len(by))}" for e, by in sorted(points.items()))
    seeds = len({seed for by in points.values() for seed in by})
    out = f"| {name} | {seeds} | {grid} | {best.at:.2f} ({best.low:.2f} to {best.high:.2f}) | {best.loss:.3f} |"
    if base is None:
        return f"{out}  |  |"
    price = cost_of(points, base.at)
    return f"{out} {best.at - base.at:+.2f} | {price[0]:.4f} ({price[1]:.4f} to {price[2]:.4f}) |"


def _holds(points: dict[float, dict[int, float]], base: Optimum) -> tuple[bool | None, float, float]:
    """A1 and A2 together, the drift in octaves, the cost in nats."""
    best, price = optimum(points), cost_of(points, base.at)
    drift = best.at - base.at
    good = abs(drift) <= 0.5 and price[0] <= 0.01 and price[2] <= 0.02
    bad = abs(drift) > 0.5 and price[0] > 0.01
    seeds = len({seed for by in points.values() for seed in by})
    return (True if good else False if bad else None) if seeds >= 3 else (False if bad else None), drift, price[0]


def judge(rows: dict[str, dict[str, Any]]) -> None:
    """Tables and verdicts into docs/results/axes.md."""
    curves = losses(rows.values(), "scheme", "end", "off")
    text = ["# Transfer over one axis at a time", "",
            "Command, setting and pre-registration: `benchmarks/axes.py`. Losses in nats/byte, mean over seeds; *drift* "
            "is in octaves against the base's optimum, *cost* is of the base's LR there, with a 95 % interval over "
            "seeds. A verdict of *confirmed* needs three seeds.", "",
            "Two things to read beside the verdicts. The gradient noise scale of this base is 7 to 18 sequences over the first "
            "half of the run, 89 at its end ([noise_scale](noise_scale.md)): a batch of 32 lies above it there, where no square-root rule is "
            "claimed to hold, 2 and 8 lie below or at it. And a control that does not drift can still be far worse: "
            "compare the losses with the rule on and off.", ""]  # fmt: skip
    said = []
    for scheme in SCHEMES:
        if not any(group[0] == scheme for group in curves):
            continue
        text += [f"## {scheme}", "", "| where | seeds | loss by base LR | optimum, log2 | loss | drift | cost |",
                 "|---|---|---|---|---|---|---|"]  # fmt: skip
        found = {}
        for end in [*BASES, *ENDS]:
            for off in (False, True):
                points = curves.get((scheme, end, off), {})
                if len(points) < 3:
                    continue
                base = found.get(ENDS[end][0]) if end in ENDS else None
                best = optimum(points)
                if end in BASES:
                    found[end] = best
                text.append(_line(f"{end}{', rule off' if off else ''}", points, best, base))
        for end, (base_name, axis, _) in ENDS.items():
            on, off_points = curves.get((scheme, end, False), {}), curves.get((scheme, end, True), {})
            if len(on) < 5 or base_name not in found:
                continue
            holds, drift, price = _holds(on, found[base_name])
            words = f"drift {drift:+.2f}, cost {price:.4f}"
            if len(off_points) >= 5:
                _, off_drift, off_price = _holds(off_points, found[base_name])
                drifts = abs(off_drift) >= 1 or off_price > 0.02
                words += f"; rule off: drift {off_drift:+.2f}, cost {off_price:.4f}, the control " \
                    f"{'drifts' if drifts else 'does not drift'}"  # fmt: skip
                if not drifts and holds:
                    holds = None
            elif holds:
                holds = None
                words += "; control not run"
            said.append(f"- {scheme}, {end} ({axis}): {words}: **{verdict(holds)}**")
        text.append("")
    publish("axes", "\n".join([*text, "## Verdicts", "", *said]) + "\n")


if __name__ == "__main__":
    main("axes", __doc__ or "", cells(), judge)
