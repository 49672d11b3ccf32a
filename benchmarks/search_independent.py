"""Independent search: do nine LR runs under u-muP find what a hundred random runs find?

Pre-registered before any row of this study was run. Llama-style decoder, width 64, 2 blocks, 64 tokens x 8 sequences x 300
steps, byte-level Austen + WEB, AdamW, weight decay 0. Each scheme: a line of nine LRs with every other HP at its default;
100 random runs over its HPs (log-uniform: LR over the line's ends, the others over 1/8 ... 8; muP's init_std too), seed 0;
winner of each (the lowest loss) again on seeds 10, 11, 12.
  I1  u-muP: the line's winner is at most 0.01 nats/byte above the random winner (mean of three seeds; upper end of the 95 %
      interval of the paired difference below +0.01: confirmed; lower end above: refuted).
  I2  muP at its defaults: the same difference is above +0.01 (the control: there a line is not enough). Tuned muP is the
      random winner of muP, and stands beside.
The paper: nine runs against about 340 (arXiv 2407.17465, figure 1).

Added before any of its rows was run, when the lines and a tenth of the random runs were there and said that the other HPs
matter: the whole independent search (the LR line, then each other HP at 1/4, 1/2, 2 and 4 times its default at the best LR,
then the winners together; 30 runs), its lowest run on seed 0 again on the same three seeds.
  I3  u-muP: its winner is at most 0.01 above the random winner (as I1).

    OMP_NUM_THREADS=1 python benchmarks/search_independent.py
"""

from __future__ import annotations

import math
from itertools import zip_longest
from typing import Any

import numpy as np
import study
from lmd_formats import interval, paired
from study import Cell, publish, verdict

from isoscale.config import RunConfig
from isoscale.sweep.space import Point, Space, show
from isoscale.sweep.strategies import make
from isoscale.sweep.strategies.base import Trial

NAME, RANDOM, AGAIN = "search_independent", 100, (10, 11, 12)
FIXED: dict[str, object] = {"model.width": 64, "model.depth": 2, "data.seq_len": 64, "train.batch": 8, "train.steps": 300,
                            "train.eval_batches": 64}  # fmt: skip
WIDE = (0.125, 8.0)
FEW, PHASES = (0.25, 0.5, 2.0, 4.0), 3  # of the independent search
COUNTS = (1, 3, 9, 30, 100)
SCHEMES: dict[str, tuple[dict[str, object], tuple[float, ...], tuple[str, ...]]] = {
    "u-mup": ({"rules.parametrisation": "u-mup"}, tuple(2.0**e for e in range(-3, 6)),
              ("alpha_attn", "alpha_ffn_act", "alpha_res", "alpha_res_attn_ratio", "alpha_loss")),
    "mup": ({"rules.parametrisation": "mup", "base.width": 64}, tuple(2.0**e for e in range(-11, -2)),
            ("init_std", "alpha_emb", "alpha_attn", "alpha_out", "lr_embedding")),
}  # fmt: skip


def points(scheme: str) -> tuple[list[Point], list[Point]]:
    """The line and the random points."""
    _, line, others = SCHEMES[scheme]
    default = {"init_std": 0.02}
    space = {"lr": (line[0], line[-1]), **{name: tuple(default.get(name, 1.0) * x for x in WIDE) for name in others}}
    config = RunConfig().with_values(**{"sweep.strategy": "random", "sweep.trials": RANDOM, "sweep.space": space})
    drawn = make(config, Space.of(config)).ask([], RANDOM)
    return [{"lr": lr} for lr in line], list(drawn or ())


def cell(scheme: str, kind: str, point: Point, seed: int) -> Cell:
    """One run."""
    config = {**FIXED, **SCHEMES[scheme][0], **{f"hps.{name}": value for name, value in point.items()}, "seed": seed}
    return {"label": {"scheme": scheme, "kind": kind, "point": show(point), "seed": seed}, "config": config}


def asked(scheme: str, rows: dict[str, dict[str, Any]]) -> tuple[list[Point], bool]:
    """The points of the independent search that its rows lead to, those to be run next among them; whether it is over."""
    _, line, others = SCHEMES[scheme]
    default = {"init_std": 0.02}
    space = {"lr": line, **{name: tuple(default.get(name, 1.0) * x for x in FEW) for name in others}}
    config = RunConfig().with_values(**{"sweep.strategy": "independent", "sweep.space": space})
    strategy, trials = make(config, Space.of(config)), list[Trial]()
    while fresh := strategy.ask(trials, 1):
        found = [rows.get(study.key(cell(scheme, kind_of(point), point, 0))) for point in fresh]
        points = [*(trial.point for trial in trials), *fresh]
        if not all(found):
            return points, False
        trials += [Trial(point, "done", float(row["val_loss"])) for point, row in zip(fresh, found) if row]
    return [trial.point for trial in trials], True


def kind_of(point: Point) -> str:
    """The label of a point of the independent search: its first runs are the line's."""
    return "line" if set(point) == {"lr"} else "independent"


def searches(scheme: str, rows: dict[str, dict[str, Any]]) -> dict[str, list[tuple[str, Point]]]:
    """Search -> (label, point) of its runs, as far as they are known."""
    line, drawn = points(scheme)
    return {"line": [("line", p) for p in line], "independent": [(kind_of(p), p) for p in asked(scheme, rows)[0]],
            "random": [("random", p) for p in drawn]}  # fmt: skip


def winner(rows: dict[str, dict[str, Any]], scheme: str, kind: str) -> Point | None:
    """The lowest on seed 0; None: not all there."""
    found = [(rows.get(study.key(cell(scheme, label, p, 0))), p) for label, p in searches(scheme, rows)[kind]]
    if not all(row for row, _ in found) or (kind == "independent" and not asked(scheme, rows)[1]):
        return None
    return min(found, key=lambda pair: float(pair[0]["val_loss"]))[1]  # type: ignore[index]


def again(rows: dict[str, dict[str, Any]], scheme: str, kind: str) -> np.ndarray:
    """Losses of a winner on the fresh seeds."""
    point = winner(rows, scheme, kind)
    found = [rows.get(study.key(cell(scheme, f"{kind}, again", point, seed))) for seed in AGAIN] if point else []
    return np.array([float(row["val_loss"]) for row in found if row])


def judge(rows: dict[str, dict[str, Any]]) -> None:
    """Table and verdicts into docs/results/search_independent.md."""
    text = ["# Nine runs or a hundred?", "", "Command, setting and pre-registration: `benchmarks/search_independent.py`. nats/byte.",
            "", "| scheme | search | runs | best on seed 0 | winner | mean of three fresh seeds |", "|---|---|---|---|---|---|"]  # fmt: skip
    gaps = {}
    for scheme in SCHEMES:
        for kind, all_of_them in searches(scheme, rows).items():
            known = [rows[k] for label, p in all_of_them if (k := study.key(cell(scheme, label, p, 0))) in rows]
            if not known:
                continue
            point, fresh = winner(rows, scheme, kind), again(rows, scheme, kind)
            lowest = min(float(row["val_loss"]) for row in known)
            text.append(f"| {scheme} | {kind} | {len(known)} | {lowest:.4f} | {show(point) if point else ''} | "
                        f"{f'{fresh.mean():.4f}' if len(fresh) else ''} |")  # fmt: skip
        for kind in ("line", "independent"):
            gaps[scheme, kind] = paired(again(rows, scheme, kind), again(rows, scheme, "random"))
    text += ["", "## The best of the first n random runs, as expected over their order (seed 0)", "",
             f"| scheme | {' | '.join(f'n = {n}' for n in COUNTS)} |", f"|---|{'---|' * len(COUNTS)}"]  # fmt: skip
    for scheme in SCHEMES:
        drawn = [rows.get(study.key(cell(scheme, label, p, 0))) for label, p in searches(scheme, rows)["random"]]
        losses = np.sort([float(row["val_loss"]) for row in drawn if row])
        cells = [f"{best_of(losses, n):.4f}" if n <= len(losses) else "" for n in COUNTS]
        text.append(f"| {scheme} | {' | '.join(cells)} |")
    text += ["", "## Verdicts", ""]
    for name, scheme, kind, below, words in (
        ("I1", "u-mup", "line", True, "u-muP: the line's winner minus the random winner is at most 0.01"),
        ("I2", "mup", "line", False, "muP at its defaults: it is more"),
        ("I3", "u-mup", "independent", True, "u-muP: the whole independent search, the same"),
    ):
        gap = gaps[scheme, kind]
        low, high = interval(gap)
        passed = None if len(gap) < 3 else (high < 0.01 or None if low <= 0.01 else False)
        if not below and len(gap) == 3:
            passed = True if low > 0.01 else False if high < 0.01 else None
        shown = f"{gap.mean():+.4f} ({low:+.4f} to {high:+.4f})" if len(gap) > 1 else "rows are missing"
        text.append(f"- {name} {words}: {shown}: **{verdict(passed)}**")
    publish(NAME, "\n".join(text).rstrip() + "\n")


def best_of(losses: np.ndarray, count: int) -> float:
    """The expected lowest of `count` losses drawn from these (sorted) without putting any back."""
    n = len(losses)
    shares = [math.comb(n - 1 - k, count - 1) / math.comb(n, count) for k in range(n - count + 1)]
    return float(np.dot(shares, losses[: n - count + 1]))


def main() -> None:
    """Lines first, then the independent search, then random points; winners on fresh seeds."""
    args = study.arguments(__doc__ or "")
    if not args.verdict:
        for kind in ("line", "independent", "random"):
            for _ in range(PHASES if kind == "independent" else 1):
                rows = study.read(NAME)
                runs = {scheme: searches(scheme, rows)[kind] for scheme in SCHEMES}
                turns = zip_longest(*([(scheme, *run) for run in found] for scheme, found in runs.items()))
                every = [cell(scheme, label, p, 0) for turn in turns for scheme, label, p in filter(None, turn)]
                study.run_cells(NAME, every, args.workers)
            rows = study.read(NAME)
            winners = [(s, winner(rows, s, kind)) for s in SCHEMES]
            study.run_cells(NAME, [cell(s, f"{kind}, again", p, seed) for s, p in winners if p for seed in AGAIN], args.workers)
    judge(study.read(NAME))


if __name__ == "__main__":
    main()
