"""The page and the picture of `lmd_formats.py`: stability map, tuned losses, degradation, best-of-n, verdicts."""

from __future__ import annotations

import json
import math
from typing import Any

import lmd_formats as study_of
import lmd_runs
import numpy as np
import study
from lmd_formats import KINDS, LRS, MAP, SEEDS, SIZES, cell, interval, judge_bound, losses, paired, valley
from study import publish, verdict

NAMES = {"fp32": "fp32", "6/16": "MXFP6 E3M2 forward", "6b/16": "MXFP6 E2M3 forward", "4/16": "MXFP4 forward",
         "6/8": "MXFP6 forward, MXFP8 backward", "6/6": "MXFP6 both", "6/4": "MXFP6 forward, MXFP4 backward",
         "4/4": "MXFP4 both, plain", "4/4 sr": "MXFP4 both, recipe mxfp4"}  # fmt: skip
SHADES = ((0.03, "#166534"), (0.1, "#4ade80"), (0.3, "#fde68a"), (1.0, "#fb923c"), (math.inf, "#b91c1c"))
Rows = dict[str, dict[str, Any]]


def loss(rows: Rows, model: str, kind: str, formats: str, lr: int) -> float | None:
    """On seed 0."""
    row = rows.get(study.key(cell(model, kind, formats, lr, 0, **SIZES[model])))
    return None if row is None else float(row["val_loss"])


def picture(rows: Rows) -> str:
    """Heat map: LR against format, one panel for each optimiser; the number is the loss."""
    box, high, left, parts = 62, 30, 150, []
    y = 30
    for kind in ("adamw", "lmd"):
        parts.append(f'<text x="{left}" y="{y}" font-size="14" font-weight="bold">{ {"adamw": "AdamW", "lmd": "LMD"}[kind] }</text>')
        y += 8
        known = [loss(rows, "llama", kind, "fp32", lr) for lr in LRS[kind]]
        floor = min((x for x in known if x is not None), default=math.nan)
        for formats in ("fp32", "6/16", "6/6", "4/16", "4/4"):
            parts.append(f'<text x="{left - 8}" y="{y + 20}" font-size="11" text-anchor="end">{NAMES[formats]}</text>')
            for place, lr in enumerate(LRS[kind]):
                value = loss(rows, "llama", kind, formats, lr)
                if value is None:
                    continue
                shade = next(colour for bound, colour in SHADES if value - floor <= bound)
                ink = "white" if shade in (SHADES[0][1], SHADES[-1][1]) else "black"
                x = left + place * box
                parts.append(f'<rect x="{x}" y="{y}" width="{box - 2}" height="{high - 2}" fill="{shade}"/>')
                text = f"{value:.2f}" if math.isfinite(value) else "inf"
                parts.append(f'<text x="{x + box / 2 - 1}" y="{y + 19}" font-size="12" text-anchor="middle" fill="{ink}">{text}</text>')
            y += high
        for place, lr in enumerate(LRS[kind]):
            parts.append(f'<text x="{left + place * box + box / 2}" y="{y + 12}" font-size="11" text-anchor="middle">2^{lr}</text>')
        y += 44
    x = left
    for (bound, colour), below in zip(SHADES, (0, *(bound for bound, _ in SHADES))):
        told = f"+{below:g} to {bound:g}" if math.isfinite(bound) else f"above +{below:g}"
        parts.append(f'<rect x="{x}" y="{y - 12}" width="12" height="12" fill="{colour}"/><text x="{x + 16}" y="{y - 2}" font-size="11">{told}</text>')
        x += 92
    parts.append(f'<text x="{left - 8}" y="{y - 2}" font-size="11" text-anchor="end">over its own best fp32</text>')
    width = left + 7 * box + 20
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y + 10}" font-family="sans-serif">'
            '<rect width="100%" height="100%" fill="white"/>' + "".join(parts) + "</svg>\n")  # fmt: skip


def _mean(values: np.ndarray) -> str:
    if not len(values):
        return ""
    return f"{values.mean():.3f}" + ("" if len(values) == len(SEEDS) else f" ({len(values)})")


def _said(values: np.ndarray) -> str:
    low, high = interval(values)
    return f"{values.mean():+.3f} ({low:+.3f} to {high:+.3f}, {len(values)} seeds)" if math.isfinite(high) else "too few seeds"


def tables(rows: Rows) -> list[str]:
    """Tuned losses by model, and each format's cost."""
    text = []
    for model, unit in (("llama", "Llama-style decoder, nats/byte"), ("gpt2", "GPT-2, nats/byte"), ("vit", "ViT, nats/image")):
        kinds = [kind for kind in KINDS if len(losses(rows, model, kind, "fp32"))]
        if not kinds:
            continue
        text += [f"### {unit}", "", "| formats | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
        for formats in MAP:
            cells = []
            for kind in kinds:
                found, plain = losses(rows, model, kind, formats), losses(rows, model, kind, "fp32")
                cost = f" ({paired(found, plain).mean():+.3f})" if formats != "fp32" and len(found) else ""
                cells.append(_mean(found) + cost)
            if any(cells):
                text.append(f"| {NAMES[formats]} | " + " | ".join(cells) + " |")
        text.append("")
    return text


def best_of(rows: Rows) -> list[str]:
    """Expected best loss after n tuning runs in a random order, Llama-style, seed 0."""
    text = ["| formats | optimiser | 1 run | 2 | 4 | 7 |", "|---|---|---|---|---|---|"]
    for formats in ("fp32", "6/16", "4/16", "6/6", "4/4"):
        for kind in ("adamw", "lmd"):
            found = [loss(rows, "llama", kind, formats, lr) for lr in LRS[kind]]
            if any(x is None for x in found):
                continue
            y = np.sort([min(x, 10.0) for x in found if x is not None])
            n = len(y)
            cells = [sum(y[i] * math.comb(n - 1 - i, k - 1) for i in range(n - k + 1)) / math.comb(n, k) for k in (1, 2, 4, n)]
            text.append(f"| {NAMES[formats]} | {kind} | " + " | ".join(f"{x:.3f}" for x in cells) + " |")
    return text


def verdicts(rows: Rows) -> list[str]:
    """F1 to F6."""
    text = []

    def claim(name: str, values: np.ndarray, bound: float, below: bool) -> None:
        passed = judge_bound(values, bound, below) if len(values) > 1 else None
        text.append(f"- {name}: {_said(values) if len(values) else 'no rows'}: **{verdict(passed)}**")

    def cost(model: str, kind: str, formats: str) -> np.ndarray:
        return paired(losses(rows, model, kind, formats), losses(rows, model, kind, "fp32"))

    for model in SIZES:
        bound = 0.03 if model == "vit" else 0.01
        claim(f"F1 {model}: LMD loses less than {bound} with an MXFP6 forward", cost(model, "lmd", "6/16"), bound, True)
        claim(f"F2 {model}: AdamW loses more than {bound}", cost(model, "adamw", "6/16"), bound, False)
        claim(f"F3 {model}: with an MXFP4 forward LMD loses less than AdamW",
              paired(cost(model, "lmd", "4/16"), cost(model, "adamw", "4/16")), 0.0, True)  # fmt: skip
        claim(f"F4 {model}: with it LMD's loss is at most AdamW's + 0.01",
              paired(losses(rows, model, "lmd", "4/16"), losses(rows, model, "adamw", "4/16")), 0.01, True)  # fmt: skip
    for formats in ("4/16", "4/4"):
        wide = [valley(rows, kind, formats) for kind in ("lmd", "adamw")]
        passed = wide[0] - wide[1] >= 1 if None not in wide else None
        said = " against ".join("?" if w is None else f"{w:.1f}" for w in wide)
        text.append(f"- F5 {NAMES[formats]}: LMD's valley is an octave wider than AdamW's: {said} octaves: **{verdict(passed)}**")
    claim("F6 LMD loses less than 0.02 with MXFP6 in both passes", cost("llama", "lmd", "6/6"), 0.02, True)
    return text


def write() -> None:
    """docs/results/lmd.md and its picture."""
    rows = study.read("lmd_formats")
    wanted = {study.key(c) for part in (*study_of.tuning(), study_of.finals(rows)) for c in part}
    rows = {key: row for key, row in rows.items() if key in wanted}
    text = [
        "# LMD against AdamW, Lion, Madam and IVON in low precision", "",
        "Setting and pre-registration: `benchmarks/lmd_formats.py`; command: `OMP_NUM_THREADS=1 python benchmarks/lmd_formats.py`. "
        "Settings beside the LR were tuned before with fourteen runs each (`benchmarks/lmd_tune.py`). Losses on held-out data under "
        "the formats of training, mean weights where an optimiser samples." + lmd_runs.NOISE, "",
        "## Stability map: loss over LR and format, Llama-style decoder, seed 0", "",
        "![loss over LR and format for AdamW and LMD](lmd.svg)", "",
        "Valley: octaves of LR within 0.1 nats/byte of the best in that format.", "",
        "| formats | AdamW | LMD |", "|---|---|---|",
    ]  # fmt: skip
    for formats in ("fp32", "6/16", "6/6", "4/16", "4/4"):
        found = [valley(rows, kind, formats) for kind in ("adamw", "lmd")]
        if None not in found:
            text.append(f"| {NAMES[formats]} | {found[0]:.1f} | {found[1]:.1f} |")
    text += ["", "## Tuned losses, mean of three seeds", "", "In brackets: minus its own fp32, paired by seed; a number of seeds "
             "where it is not three.", "", *tables(rows), "## Best of n tuning runs", "",
             "Expected lowest loss after n of the seven LRs in a random order, seed 0.", "", *best_of(rows), "", "## Verdicts", "",
             *verdicts(rows), ""]  # fmt: skip
    diverged = [r["label"] for r in rows.values() if not math.isfinite(float(r["val_loss"]))]
    text += [f"Diverged (a loss that is not finite): {len(diverged)} of {len(rows)} runs. " + "; ".join(json.dumps(x) for x in diverged[:6])]
    (study.ROOT / "docs" / "results" / "lmd.svg").write_text(picture(rows))
    publish("lmd", "\n".join(text).rstrip() + "\n")


if __name__ == "__main__":
    write()
