"""Which law LMD's medians follow, and what keeps weights bounded.

Pre-registered (before any row of this study was run). Llama-style decoder, 0.25 million parameters, 1500 steps, three
seeds, LRs as tuned; `constant` runs hold the LR, so that nothing but the regulariser can stop growth.
  G1  The medians are log-normal: the correlation of sorted ln m (both signs, all matrices, each standardised in its
      matrix) with normal quantiles is above 0.99 at the end, in every seed.
  G2  Net weights are not: the same of ln |w| is below the medians', in every seed; AdamW's |w| (control) below 0.99.
  G3  Bounded: with lambda 0.1 at a constant LR max |w| grows by less than 1.3 over the last third of the run; without a
      regulariser (control) by more than that, in every seed.
  G4  (Registered after G3's rows, which were still growing: the time 1 / (lr lambda) is 1280 steps there.) The same with
      lambda 0.2, whose bound e^(1 / lambda) b is 15 times the initial rms and whose time is 640 steps.

    OMP_NUM_THREADS=1 python benchmarks/lmd_law.py --workers 1
"""

from __future__ import annotations

import time
from typing import Any

import lmd_runs
import numpy as np
import study
import torch
from lmd_runs import build, corpus, loss_of, optimizer
from scipy import stats
from lmd_runs import NOISE
from study import Cell, publish, verdict

from isoscale.optim import LMD, lr_factor, split_parameters
from isoscale.train.data import TokenStream

STEPS, BATCH = 1500, 8
ARMS: dict[str, dict[str, Any]] = {
    "lmd": {"kind": "lmd", "lr": -6}, "hypentropy": {"kind": "hypentropy", "lr": -6}, "adamw": {"kind": "adamw", "lr": -8},
    "lmd constant": {"kind": "lmd", "lr": -7, "constant": True},
    "lmd constant, lambda 0.2": {"kind": "lmd", "lr": -7, "constant": True, "more": {"decay": 0.2}},
    "lmd constant, lambda 0.03": {"kind": "lmd", "lr": -7, "constant": True, "more": {"decay": 0.03}},
    "lmd constant, lambda 0": {"kind": "lmd", "lr": -7, "constant": True, "more": {"decay": 0.0}},
}  # fmt: skip
QUANTILES = 99


def straight(logs: list[torch.Tensor]) -> tuple[float, list[float]]:
    """Correlation of the sorted values, standardised by matrix, with normal quantiles; and 99 of their quantiles."""
    x = np.sort(torch.cat([((a - a.mean()) / a.std()).flatten() for a in logs]).numpy())
    at = (np.arange(len(x)) + 0.5) / len(x)
    r = float(np.corrcoef(x, stats.norm.ppf(at))[0, 1])
    return r, [round(float(q), 4) for q in np.quantile(x, np.arange(1, 100) / 100)]


def run(cell: Cell) -> dict[str, Any]:
    """One run; its laws at the end, and max |w| on the way."""
    torch.set_num_threads(1)
    arm, seed = ARMS[cell["label"]["arm"]], cell["label"]["seed"]
    started = time.perf_counter()
    model = build("llama", 64, 4, seed)
    moves = optimizer(arm["kind"], model, 2.0 ** arm["lr"], **arm.get("more", {}))
    matrices = [p for group in split_parameters(model) if group["optimizer"] == "lmd" for _, p in group["params"]]
    peaks = [group["lr"] for group in moves.param_groups]
    stream, largest, recent = TokenStream(corpus().train, lmd_runs.SEQ, BATCH, seed), [], []
    for step in range(STEPS):
        kind = "constant" if arm.get("constant") else "cosine"
        for group, peak in zip(moves.param_groups, peaks):
            group["lr"] = peak * lr_factor(step, STEPS, warmup=0.05, kind=kind, final=0.05)
        loss = loss_of("llama", model, *(torch.from_numpy(part) for part in stream.span(step * BATCH, BATCH)))
        moves.zero_grad()
        loss.backward()
        moves.step()
        recent = [*recent, float(loss.detach())][-100:]
        if (step + 1) % 50 == 0:
            largest.append(round(max(float(p.detach().abs().max()) for p in matrices), 3))
    row: dict[str, Any] = {"largest": largest, "val_loss": sum(recent) / len(recent)}
    if isinstance(moves, LMD):
        keys = ("log_pos", "log_neg") if arm["kind"] == "lmd" else ("theta",)
        medians = [moves.state[p][key].float() for p in matrices for key in keys]
        row["medians"], row["medians_quantiles"] = straight(medians)
        row["spread"] = [round(float(a.std()), 3) for a in medians]
        with moves.mean():
            row["net"], row["net_quantiles"] = straight([p.detach().abs().clamp(min=1e-12).log() for p in matrices])
    else:
        row["net"], row["net_quantiles"] = straight([p.detach().abs().clamp(min=1e-12).log() for p in matrices])
    return {"key": study.key(cell), **cell, **row, "seconds": round(time.perf_counter() - started, 1)}


def cells() -> list[Cell]:
    """Three seeds of each arm."""
    return [{"label": {"arm": arm, "seed": seed}, "config": {"steps": STEPS, **ARMS[arm]}} for seed in range(3) for arm in ARMS]


def picture(rows: list[dict[str, Any]]) -> str:
    """QQ plot of seed 0: sorted values against normal quantiles."""
    side, colours = 300, {"ln m, LMD": "#2563eb", "ln m, LMD at a constant LR": "#16a34a", "ln |w|, LMD": "#93c5fd", "ln |w|, AdamW": "#dc2626"}
    want = stats.norm.ppf(np.arange(1, 100) / 100)
    lines = {"ln m, LMD": ("lmd", "medians_quantiles"), "ln m, LMD at a constant LR": ("lmd constant", "medians_quantiles"), "ln |w|, LMD": ("lmd", "net_quantiles"), "ln |w|, AdamW": ("adamw", "net_quantiles")}
    parts = [f'<line x1="0" y1="{side}" x2="{side}" y2="0" stroke="#999" stroke-dasharray="4"/>']
    for number, (name, (arm, key)) in enumerate(lines.items()):
        row = next((r for r in rows if r["label"] == {"arm": arm, "seed": 0} and key in r), None)
        if row is None:
            continue
        points = " ".join(f"{(x + 4) / 8 * side:.1f},{side - (min(4, max(-4, y)) + 4) / 8 * side:.1f}" for x, y in zip(want, row[key]))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colours[name]}" stroke-width="2"/>')
        parts.append(f'<text x="8" y="{16 + 16 * number}" font-size="12" fill="{colours[name]}">{name}</text>')
    parts.append(f'<text x="{side / 2}" y="{side + 18}" font-size="11" text-anchor="middle">normal quantiles, -4 to 4</text>')
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-10 -10 {side + 20} {side + 40}" font-family="sans-serif">'
            '<rect x="-10" y="-10" width="100%" height="100%" fill="white"/>' + "".join(parts) + "</svg>\n")  # fmt: skip


def judge(rows: dict[str, dict[str, Any]]) -> None:
    """Table, picture and verdicts into docs/results/lmd_law.md."""
    found = list(rows.values())

    def of(arm: str, key: str) -> list[Any]:
        return [row[key] for row in found if row["label"]["arm"] == arm and key in row]

    def growth(arm: str) -> list[float]:
        return [row[-1] / row[2 * len(row) // 3 - 1] for row in of(arm, "largest")]

    text = ["# The law of LMD's medians, and what bounds weights", "",
            "Setting and pre-registration: `benchmarks/lmd_law.py`; command: `OMP_NUM_THREADS=1 python benchmarks/lmd_law.py`. "
            "r: correlation of the sorted logs with normal quantiles; 1 is log-normal." + NOISE, "",
            "| arm | seeds | loss, last 100 steps | r of ln m | sd of ln m, by matrix | r of ln \\|w\\| | max \\|w\\| at 500, 1000, 1500 steps | growth over the last third |",
            "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for arm in ARMS:
        losses, net = of(arm, "val_loss"), of(arm, "net")
        if not losses:
            continue
        medians, spread = of(arm, "medians"), [x for row in of(arm, "spread") for x in row]
        way = np.mean([[row[9], row[19], row[29]] for row in of(arm, "largest")], axis=0)
        text.append(
            f"| {arm} | {len(losses)} | {np.mean(losses):.3f} | {f'{np.mean(medians):.4f}' if medians else ''} | "
            f"{f'{min(spread):.2f} to {max(spread):.2f}' if spread else ''} | {np.mean(net):.4f} | "
            f"{', '.join(f'{x:.1f}' for x in way)} | {np.mean(growth(arm)):.2f} |"
        )
    text += ["", "![quantiles of ln m and ln |w| against a normal's](lmd_law.svg)", "", "## Verdicts", ""]

    def told(name: str, values: list[Any], passed: Any) -> None:
        if len(values) < 2:
            text.append(f"- {name}: undecided, rows are missing")
            return
        answers = [bool(passed(value)) for value in values]
        word = verdict(True if all(answers) else False if not any(answers) else None)
        text.append(f"- {name}: {', '.join(str(np.round(v, 4)) for v in values)}: **{word}**")

    told("G1 the medians' r is above 0.99", of("lmd", "medians"), lambda r: r > 0.99)
    pairs = list(zip(of("lmd", "net"), of("lmd", "medians")))
    told("G2 net weights' r is below the medians'", pairs, lambda pair: pair[0] < pair[1])
    told("G2, control: AdamW's r is below 0.99", of("adamw", "net"), lambda r: r < 0.99)
    told("G3 with lambda 0.1 max |w| grows by less than 1.3", growth("lmd constant"), lambda x: x < 1.3)
    told("G3, control: without it by more", growth("lmd constant, lambda 0"), lambda x: x > 1.3)
    told("G4 with lambda 0.2 max |w| grows by less than 1.3", growth("lmd constant, lambda 0.2"), lambda x: x < 1.3)
    (study.ROOT / "docs" / "results" / "lmd_law.svg").write_text(picture(found))
    publish("lmd_law", "\n".join(text) + "\n")


if __name__ == "__main__":
    study.main("lmd_law", __doc__ or "", cells(), judge, run)
