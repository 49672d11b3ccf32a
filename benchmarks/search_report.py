"""The page of `search.py`: final losses, tokens saved, what strategies find, verdicts."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import search
import study
from lmd_formats import interval, paired
from search import ARMS, FINAL, HORIZONS, MORE_SEEDS, POINTS, STEPS, TARGET_STEPS, Rows, final, trials, winner
from study import publish, verdict

TOKENS = STEPS * 8 * 64
CAVEATS = """What to keep in mind: a knot of a depth curve that stayed at 1 was not named in the points of this study, so that the
other of two held at any depth (the package names a curve whole by now); P1's twenty seeds were reached by adding fifteen
after five had left it undecided, and its baseline is the best of four by the same seeds; at the target's size seeds are
three; the Gaussian process repeats its points only up to rounding, and its arm holds the rows of whichever points a replay
finds."""


def losses(rows: Rows, arm: str, horizon: float = 1.0, rule: bool = True, target: bool = False,
           seeds: tuple[int, ...] = FINAL) -> np.ndarray:  # fmt: skip
    """Third-split losses of an arm's winner on the fresh seeds that are there."""
    among = POINTS // 2 if arm.endswith("half") else POINTS
    point = winner(rows, arm.partition(",")[0], among)
    if point is None:
        return np.array([])
    found = [rows.get(study.key(final(arm, point, seed, horizon, rule, target))) for seed in seeds]
    return np.array([float(row["test_loss"]) for row in found if row])


def said(values: np.ndarray) -> str:
    """Mean and interval."""
    low, high = interval(values)
    return f"{values.mean():+.4f} ({low:+.4f} to {high:+.4f}, {len(values)} seeds)" if len(values) > 1 else "too few rows"


def told(values: np.ndarray, bound: float = 0.0) -> str:
    """Whether a mean lies below a bound, by its interval."""
    if len(values) < 3:
        return verdict(None)
    low, high = interval(values)
    return verdict(True if high < bound else False if low > bound else None)


def baseline(rows: Rows, horizon: float, target: bool = False, seeds: tuple[int, ...] = FINAL) -> tuple[str, np.ndarray]:
    """The best global arm at a horizon."""
    choices = {f"{arm}, duration rule {'on' if rule else 'off'}": losses(rows, arm, horizon, rule, target, seeds)
               for arm in ("global", "more") for rule in ((True, False) if horizon > 1 and not target else (True,))}  # fmt: skip
    full = {name: values for name, values in choices.items() if len(values) >= 3}
    name = min(full, key=lambda n: full[n].mean()) if full else ""
    return name, full.get(name, np.array([]))


def ratio(rows: Rows) -> float | None:
    """Tokens at which the best global arm reaches kronecker's loss, over kronecker's: linear in log tokens; None: not reached."""
    mine = losses(rows, "kronecker")
    line = [(math.log(h), baseline(rows, h)[1]) for h in HORIZONS]
    if not len(mine) or any(not len(values) for _, values in line):
        return None
    at = [(x, float(values.mean())) for x, values in line]
    for (x0, y0), (x1, y1) in pairwise(at):
        if y1 <= mine.mean() <= y0:
            return math.exp(x0 + (x1 - x0) * (y0 - mine.mean()) / (y0 - y1))
    return math.exp(at[0][0]) if mine.mean() > at[0][1] else None


def table(rows: Rows) -> list[str]:
    """A line per arm."""
    text = ["| arm | points | best on the search's seed | winner on two more seeds | third split, five fresh seeds | against `more` |",
            "|---|---|---|---|---|---|"]  # fmt: skip
    more = losses(rows, "more")
    for arm in ARMS:
        known, _ = trials(rows, arm)
        if len(known) < POINTS:
            continue
        point = winner(rows, arm)
        again = [rows.get(study.key(search.cell({"arm": f"{arm}, again"}, point, seed))) for seed in search.CONFIRM] if point else []
        mean = f"{np.mean([float(row['val_loss']) for row in again if row]):.4f}" if all(again) and again else ""
        mine = losses(rows, arm)
        gap = said(paired(mine, more)) if len(mine) > 1 and len(more) > 1 and arm != "more" else ""
        shown = f"{mine.mean():.4f}" if len(mine) else ""
        text.append(f"| {arm} | {len(known)} | {min(t.loss for t in known):.4f} | {mean} | {shown} | {gap} |")
    return text


def horizons(rows: Rows, target: bool) -> list[str]:
    """Losses of the global arms by length."""
    text = ["| run | tokens x | " + " | ".join(("loss",)) + " |", "|---|---|---|"]
    for arm in ("global", "more"):
        for horizon in HORIZONS:
            for rule in (True, False) if horizon > 1 and not target else (True,):
                values = losses(rows, arm, horizon, rule, target)
                if len(values):
                    text.append(f"| {arm}, duration rule {'on' if rule else 'off'} | {horizon:g} | {values.mean():.4f} ({len(values)}) |")
    mine = losses(rows, "kronecker", 1.0, True, target)
    if len(mine):
        text.append(f"| kronecker | 1 | {mine.mean():.4f} ({len(mine)}) |")
    return text


def verdicts(rows: Rows) -> list[str]:
    """P1 to P5 and the controls."""
    kron, more = losses(rows, "kronecker"), losses(rows, "more")
    every = (*FINAL, *MORE_SEEDS)
    name, far = baseline(rows, 1.3, seeds=every)
    gap = paired(losses(rows, "kronecker", seeds=every), far)
    text = [f"- P1 kronecker at T below the best global at 1.3 T ({name}): {said(gap)}: **{told(gap)}**"]
    found = ratio(rows)
    text.append(f"  Tokens the best global arm takes to kronecker's loss: {'not reached at 2.3' if found is None else f'{found:.2f}'} x.")
    name, far = baseline(rows, 1.3, True)
    gap = paired(losses(rows, "kronecker", 1.0, True, True), far)
    text.append(f"- P2 the same at width 128 and 4 blocks ({name}): {said(gap)}: **{told(gap)}**")
    near = paired(losses(rows, "kronecker", 1.0, True, True), baseline(rows, 1.0, True)[1])
    text.append(f"  Against the best global at the same tokens there: {said(near)}.")
    for arm in ("random", "tpe", "gp"):
        gap = paired(kron, losses(rows, arm))
        text.append(f"- P3 kronecker's trust region against {arm}: {said(gap)}: **{told(gap)}**")
    half = losses(rows, "kronecker, half")
    if len(half) > 2 and len(more) > 2:
        gain, at_half = float((more - kron).mean()), float((more - half).mean())
        passed = at_half / gain >= 0.9 if gain > 0 else None
        text.append(f"- P4 gain over `more` after half of the search: {at_half:+.4f} of {gain:+.4f}: **{verdict(passed)}**")
    else:
        text.append(f"- P4: **{verdict(None)}**")
    for arm in ("types", "free"):
        gap = paired(kron, losses(rows, arm))
        text.append(f"- P5 kronecker minus {arm} below +0.005: {said(gap)}: **{told(gap, 0.005)}**")
    known, _ = trials(rows, "random")
    if known:
        start = known[0].loss
        worse = [t.loss > start for t in known[1:]]
        text.append(f"- Control: plain random points worse than the start: {sum(worse)} of {len(worse)}.")
    if len(more) and len(losses(rows, "global")):
        text.append(f"- Control: what a second budget gains globally: {said(paired(more, losses(rows, 'global')))}.")
    if found is not None and found > 1:
        cost = POINTS * TOKENS
        text += ["", f"Break-even: the search took {cost / 1e6:.1f} million tokens at the proxy's size; with {1 - 1 / found:.0%} of a "
                 f"run's tokens saved it pays when the run costs more than {cost / (1 - 1 / found) / 1e6:.0f} million of the proxy's "
                 "tokens in FLOPs, or sooner where its factors are used again."]  # fmt: skip
    return text


def factors(rows: Rows) -> list[str]:
    """The winner's factors by module type."""
    point = winner(rows, "kronecker")
    if point is None:
        return []
    types: dict[str, dict[str, float]] = {}
    for name, value in point.items():
        hp, mark, kind = name.partition("/")
        if not mark:
            hp, mark, kind = name.partition("@")
            kind = f"l/L = {kind}"
        if mark:
            types.setdefault(kind, {})[hp] = value
    hps = search.SPLIT
    text = ["| module type | " + " | ".join(hps) + " |", "|---" * (len(hps) + 1) + "|"]
    return text + [f"| {kind} | " + " | ".join(f"{found[hp]:.2f}" if hp in found else "1" for hp in hps) + " |"
                   for kind, found in sorted(types.items())]  # fmt: skip


def write(rows: dict[str, dict[str, Any]]) -> None:
    """docs/results/search.md."""
    text = ["# Does a per-module search pay?", "",
            "Setting and pre-registration: `benchmarks/search.py`; command: `OMP_NUM_THREADS=1 python benchmarks/search.py`. "
            "nats/byte; T is 300 steps of 512 tokens at the proxy, "
            f"{TARGET_STEPS} at the target.", "", CAVEATS, "", "## Arms", "", *table(rows), "", "## Longer runs of the global arms, proxy", "",
            *horizons(rows, False), "", "## At 4x the width and 2x the depth", "", *horizons(rows, True), "", "## Verdicts", "",
            *verdicts(rows), "", "## The winner's factors", "", *factors(rows)]  # fmt: skip
    publish("search", "\n".join(text).rstrip() + "\n")
