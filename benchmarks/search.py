"""Does a per-module search pay, and which strategy finds what it finds?

Pre-registered before any row of this study was run. Proxy: Llama-style decoder with separate projections (14 module types),
complete-d at alpha 1, width 32, 2 blocks, 64 tokens x 8 sequences x 300 steps, byte-level Austen + WEB, AdamW. The validation
text is cut in two: searches see its first half, results are losses on the second (a third split). Every arm gets 128 points,
4 at a time, on seed 0; its best 4 points run again on seeds 10 and 11, and the lowest mean is its winner; winners run on
five fresh seeds (20 ... 24), all paired.
  global       trust region over the eight global HPs, from the best of a line of nine LRs; its winner is where all below start
  more         the same again from there: the global baseline with the trial budget of the per-module search
  kronecker    trust region over 79 factors: lr, decay, beta1, beta2, init by type and depth, residual branches by both
  random, tpe, gp   the same space and box (1/8 ... 8) by other strategies
  types        without depth curves;   free: a factor for each type in each block
  P1  tokens: kronecker's winner at T tokens has a lower loss than the best global arm at 1.3 T (a separately decayed run; the
      duration rule on or off, whichever is better): the 95 % interval of the paired difference lies below 0. The paper: 2.31.
  P2  the same at width 128 and 4 blocks (4x, 2x), 600 steps, no retuning, seeds 20 ... 22; depth curves interpolated
      (cut for time, before any such row of kronecker: horizons 1 and 1.3 only, run after all searches).
  P3  kronecker's final loss is below that of random, TPE and GP each (intervals of the paired differences below 0).
  P4  its winner among the first 64 points has at least 90 % of the gain over `more`. The paper: 99 % in the first 47 %.
  P5  kronecker is at least as good as types and as free: the difference to each is below +0.005 (upper end).
P1 was undecided after its five seeds; fifteen more (25 ... 39) were then added, and its verdict is that of all twenty.
Controls: plain random in the box must be worse than the start it was given for most points; `more` must not gain from the
extra budget what kronecker gains. Break-even: tokens of search over the share of tokens saved.

    OMP_NUM_THREADS=1 python benchmarks/search.py
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence
from typing import Any

import optuna
import study
import torch
from study import Cell

from isoscale._base.errors import IsoscaleError
from isoscale.config import RunConfig
from isoscale.optim import lr_factor
from isoscale.optim.make import make_optimizer
from isoscale.sweep.space import Point, Space, trial_config
from isoscale.sweep.strategies import Trial, make
from isoscale.train.data import TokenStream, eval_batches, load_corpus
from isoscale.train.setup import build

NAME, STEPS, POINTS, TARGET_STEPS = "search", 300, 128, 600
BASE: dict[str, object] = {
    "model.separate": True, "model.qk_norm": True, "model.norm": "trainable", "model.width": 32, "model.depth": 2,
    "data.seq_len": 64, "train.batch": 8, "train.steps": STEPS, "rules.parametrisation": "complete-d", "base.width": 32,
    "base.depth": 2, "base.batch": 8, "base.steps": STEPS, "hps.weight_decay": 0.1, "hps.init_std": 0.06,
}  # fmt: skip
TARGET: dict[str, object] = {"model.width": 128, "model.depth": 4, "train.steps": TARGET_STEPS, "base.steps": TARGET_STEPS}
SPLIT = ("lr", "weight_decay", "beta1", "beta2", "init_std", "residual")
LINE = tuple(2.0**e for e in range(-11, -2))
ARMS = {"global": ("trust-region", ""), "kronecker": ("trust-region", "kronecker"), "more": ("trust-region", ""),
        "random": ("random", "kronecker"), "tpe": ("tpe", "kronecker"), "types": ("trust-region", "types"),
        "gp": ("gp", "kronecker"), "free": ("trust-region", "free")}  # fmt: skip
HORIZONS = (1.0, 1.3, 1.7, 2.3)
SEARCH, CONFIRM, FINAL = 0, (10, 11), (20, 21, 22, 23, 24)
MORE_SEEDS = tuple(range(25, 40))
Rows = dict[str, dict[str, Any]]


@functools.cache
def corpus() -> Any:
    """The text; a fifth of each part is held out."""
    return load_corpus("builtin:austen+web", "bytes", val_fraction=0.2, seq_len=64)


def run(cell: Cell) -> dict[str, Any]:
    """Train one cell; its loss on both halves of what is held out."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    config = RunConfig().with_values(**cell["config"])
    try:
        val, test = _losses(config)
    except IsoscaleError:
        val = test = math.inf
    told = {"val_loss": val if math.isfinite(val) else "inf", "test_loss": test if math.isfinite(test) else "inf"}
    return {"key": study.key(cell), **cell, **told, "seconds": round(time.perf_counter() - started, 1)}


def _losses(config: RunConfig) -> tuple[float, float]:
    cfg, length = config.train, config.data.seq_len
    model, plan = build(config, 256, torch.device("cpu"))
    optimizer = make_optimizer(plan, model, config.optim, config.seed)
    peaks = [group["lr"] for group in optimizer.param_groups]
    stream = TokenStream(corpus().train, length, cfg.batch, config.seed)
    for step in range(cfg.steps):
        factor = lr_factor(step, cfg.steps, warmup=0.1, kind="cosine", final=0.05)
        for group, peak in zip(optimizer.param_groups, peaks):
            group["lr"] = peak * factor
        inputs, targets = (torch.from_numpy(part) for part in stream.span(step * cfg.batch, cfg.batch))
        optimizer.zero_grad()
        loss = model(inputs, targets)
        loss.backward()
        optimizer.step()
        if not math.isfinite(float(loss.detach())):
            return math.inf, math.inf
    model.eval()
    half = len(corpus().val) // 2
    out = []
    with torch.no_grad():
        for part in (corpus().val[:half], corpus().val[half:]):
            batches = list(eval_batches(part, length, 32, 16))
            out.append(sum(float(model(*map(torch.from_numpy, pair))) for pair in batches) / len(batches))
    return (out[0], out[1]) if all(map(math.isfinite, out)) else (math.inf, math.inf)


def cell(label: dict[str, Any], point: Point, seed: int, **values: object) -> Cell:
    """A point of the study at some seed and size."""
    made = trial_config(RunConfig().with_values(**{**BASE, **values}), point, seed)
    config = {**BASE, **values, "seed": seed, "modules": dict(made.modules)}
    config |= {f"hps.{name}": getattr(made.hps, name) for name in made.hps.model_fields_set}
    return {"label": label, "config": config}


def start(rows: Rows, arm: str) -> dict[str, float] | None:
    """Where an arm starts: the best LR of the line, or the winner of `global`."""
    if arm != "global":
        return winner(rows, "global")
    line = {lr: rows.get(study.key(cell({"arm": "line"}, {"lr": lr}, SEARCH))) for lr in LINE}
    if not all(line.values()):
        return None
    return {"lr": min(line, key=lambda lr: float(line[lr]["val_loss"]))}  # type: ignore[index]


class Loose(Space):
    """As the study was run: a knot that stays at 1 is not named, so that of a curve of two the other holds at any depth.

    The package names a curve whole by now; the rows of this study are of the points as they were.
    """

    def point(self, octaves: Sequence[float]) -> Point:
        """What stays at the config's value is left out, knot by knot."""
        values = {dim: min(max(dim.value(at), dim.low), dim.high) for dim, at in zip(self.dims, octaves)}
        return {dim.name: value for dim, value in values.items() if not math.isclose(value, dim.start, rel_tol=1e-12)}


@functools.cache
def _search(arm: str, begin: tuple[tuple[str, float], ...]) -> tuple[RunConfig, Space, Any]:
    kind, form = ARMS[arm]
    config = trial_config(RunConfig().with_values(**BASE), dict(begin), SEARCH)
    near: dict[str, object] = {}
    if not form:
        h = config.hps
        near = {name: (getattr(h, name) / 8, getattr(h, name) * 8) for name in
                ("lr", "weight_decay", "init_std", "alpha_res", "alpha_attn", "eps")}  # fmt: skip
        near |= {name: (max(0.0, 1 - 8 * (1 - beta)) if 8 * (1 - beta) < 0.95 else 0.05, 1 - (1 - beta) / 8)
                 for name, beta in (("beta1", h.beta1), ("beta2", h.beta2))}  # fmt: skip
    config = config.with_values(**{
        "sweep.space": near, "sweep.strategy": kind, "sweep.trials": POINTS, "sweep.batch": 4,
        "sweep.modules": {"hps": SPLIT, "form": form, "reach": 8.0} if form else {},
        "seed": SEARCH + (1 if arm == "more" else 0),  # other draws than global's
    })  # fmt: skip
    space = Loose(Space.of(config).dims)
    return config, space, make(config, space)


def trials(rows: Rows, arm: str) -> tuple[list[Trial], list[Point] | None]:
    """An arm's points so far, and those that come next (None: it is over, or cannot begin)."""
    begin = start(rows, arm)
    if begin is None:
        return [], None
    _, _, strategy = _search(arm, tuple(sorted(begin.items())))
    known: list[Trial] = []
    while (points := strategy.ask(known, 4)) is not None:
        found = [rows.get(study.key(cell({"arm": arm}, {**begin, **point}, SEARCH))) for point in points]
        if not all(found):
            return known, points
        known += [Trial(point, "done", float(row["val_loss"])) for point, row in zip(points, found) if row]
    return known, None


def best_points(rows: Rows, arm: str, among: int = POINTS) -> list[dict[str, float]] | None:
    """The four best of the first points of a search that has come so far; None: not yet."""
    begin = start(rows, arm)
    known, _ = trials(rows, arm)
    if begin is None or len(known) < among:
        return None
    return [{**begin, **trial.point} for trial in sorted(known[:among], key=lambda t: t.loss)[:4]]


def winner(rows: Rows, arm: str, among: int = POINTS) -> dict[str, float] | None:
    """The point of the lowest mean over the confirming seeds."""
    points = best_points(rows, arm, among)
    if points is None:
        return None
    means = []
    for point in points:
        found = [rows.get(study.key(cell({"arm": f"{arm}, again"}, point, seed))) for seed in CONFIRM]
        if not all(found):
            return None
        means.append(sum(float(row["val_loss"]) for row in found if row))
    return points[means.index(min(means))]


def final(arm: str, point: Point, seed: int, horizon: float = 1.0, rule: bool = True, target: bool = False) -> Cell:
    """A run of a winner on a fresh seed."""
    values: dict[str, object] = dict(TARGET) if target else {}
    steps = round((TARGET_STEPS if target else STEPS) * horizon)
    values |= {"train.steps": steps, "rules.duration": "iso-horizon" if rule else "none"}
    label = {"arm": arm, "horizon": horizon, "rule": rule, "target": target, "seed": seed}
    return cell(label, point, seed, **values)


def missing(rows: Rows) -> list[Cell]:
    """What could run now, the most wanted first."""
    out = [cell({"arm": "line"}, {"lr": lr}, SEARCH) for lr in LINE]
    for arm in ARMS:
        begin = start(rows, arm)
        _, points = trials(rows, arm)
        if begin is not None and points:
            return [*out, *(cell({"arm": arm}, {**begin, **point}, SEARCH) for point in points)]
        for among in (POINTS // 2, POINTS) if arm == "kronecker" else (POINTS,):
            for point in best_points(rows, arm, among) or ():
                out += [cell({"arm": f"{arm}, again"}, point, seed) for seed in CONFIRM]
        if any(study.key(c) not in rows for c in out):
            return out
        out += finals(rows, arm)
    for arm in ("kronecker", "global", "more"):
        if point := winner(rows, arm):
            at = [(1.0, True)] if arm == "kronecker" else [(1.3, True), (1.3, False)]
            out += [final(arm, point, seed, horizon, rule) for horizon, rule in at for seed in MORE_SEEDS]
    return out + [c for arm in ("kronecker", "more", "global") for c in large(rows, arm)]


def finals(rows: Rows, arm: str) -> list[Cell]:
    """The runs of an arm's winner that claims need."""
    point = winner(rows, arm)
    if point is None:
        return []
    out = [final(arm, point, seed) for seed in FINAL]
    if arm == "kronecker" and (half := winner(rows, arm, POINTS // 2)):
        out += [final("kronecker, half", half, seed) for seed in FINAL]
    if arm in ("global", "more"):
        out += [final(arm, point, seed, horizon, rule) for horizon in HORIZONS[1:] for rule in (True, False) for seed in FINAL]
    return out


def large(rows: Rows, arm: str) -> list[Cell]:
    """The same at the target's size: a per-module winner at T, global ones at T and 1.3 T."""
    point = winner(rows, arm)
    horizons = HORIZONS[:1] if arm == "kronecker" else HORIZONS[:2]
    return [final(arm, point, seed, horizon, True, True) for horizon in horizons for seed in FINAL[:3]] if point else []


def main() -> None:
    """Until nothing is missing, then the page."""
    args = study.arguments(__doc__ or "")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    while not args.verdict:
        rows = study.read(NAME)
        todo = [c for c in missing(rows) if study.key(c) not in rows]
        if not todo:
            break
        for one in todo:
            study.append(NAME, run(one))
    from search_report import write

    write(study.read(NAME))


if __name__ == "__main__":
    main()
