"""Shared by the long studies: cells (one training run each), resumable, paired, two pinned workers; and the statistics.

A cell is a dict of config values plus labels. Finished cells are rows in `docs/results/data/NAME.jsonl`, keyed by the
cell's content, and are never run again. Workers are processes of one thread. A diverged run is a row with loss "inf".
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing as mp
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "docs" / "results" / "data"
Cell = dict[str, Any]


def key(cell: Cell) -> str:
    """The cell's identity: a hash of its content."""
    return hashlib.sha256(json.dumps(cell, sort_keys=True).encode()).hexdigest()[:16]


def read(name: str) -> dict[str, dict[str, Any]]:
    """Finished rows of a study, by key."""
    path = DATA / f"{name}.jsonl"
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return {row["key"]: row for row in rows}


def _run(cell: Cell) -> dict[str, Any]:
    from isoscale._base.errors import NonFiniteError
    from isoscale.config import RunConfig
    from isoscale.train import train

    out = Path(tempfile.mkdtemp(prefix="isoscale-study-"))
    started = time.perf_counter()
    config = RunConfig().with_values(**{
        "train.checkpoint_every": 10**6, "train.eval_every": 10**6, **cell["config"],
    })  # fmt: skip
    try:
        result = train(config, out / "run")
        row = {"val_loss": result.val_loss, "train_loss": result.train_loss, "parameters": result.parameters}
        casts = [json.loads(x) for x in (out / "run" / "metrics.jsonl").read_text().splitlines() if '"cast"' in x]
        if casts:
            row["casts"] = casts
    except NonFiniteError:
        row = {"val_loss": "inf", "train_loss": "inf"}
    finally:
        shutil.rmtree(out, ignore_errors=True)
    return {"key": key(cell), **cell, **row, "seconds": round(time.perf_counter() - started, 1)}


def run_cells(name: str, cells: Sequence[Cell], workers: int = 1) -> None:
    """Run what is missing, in the order given; append each row as it comes."""
    done = read(name)
    todo = [cell for cell in cells if key(cell) not in done]
    print(f"{name}: {len(cells)} cells, {len(cells) - len(todo)} done, {len(todo)} to run", flush=True)
    if not todo:
        return
    # glibc gives freed pages back at once by default; keeping them saves a fifth of a step at width 128 and up.
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", MALLOC_MMAP_THRESHOLD_="2000000000",
                      MALLOC_TRIM_THRESHOLD_="2000000000")  # fmt: skip
    DATA.mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()
    with mp.get_context("spawn").Pool(workers) as pool, (DATA / f"{name}.jsonl").open("a") as log:
        for count, row in enumerate(pool.imap_unordered(_run, todo), 1):
            log.write(json.dumps(row) + "\n")
            log.flush()
            left = (time.perf_counter() - begun) / count * (len(todo) - count)
            label = " ".join(f"{k}={v}" for k, v in row["label"].items())
            print(f"{count}/{len(todo)} {label} loss {row['val_loss']} {row['seconds']}s, {left / 60:.0f} min left",
                  flush=True)  # fmt: skip


def arguments(description: str) -> argparse.Namespace:
    """The flags all studies share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--verdict", action="store_true", help="only evaluate the rows that are there")
    return parser.parse_args()


def losses(rows: Iterable[dict[str, Any]], *by: str) -> dict[tuple[Any, ...], dict[float, dict[int, float]]]:
    """Group labels -> log2 LR -> seed -> loss."""
    out: dict[tuple[Any, ...], dict[float, dict[int, float]]] = {}
    for row in rows:
        label = row["label"]
        group = out.setdefault(tuple(label[name] for name in by), {})
        group.setdefault(float(label["log2_lr"]), {})[label["seed"]] = float(row["val_loss"])
    return out


@dataclass(frozen=True)
class Optimum:
    """A fitted optimum with its bootstrap interval (95 %).

    Args:
        at, low, high: log2 LR of the fitted minimum, and the interval's ends.
        loss: fitted loss there.
        interior: whether both ends of the grid are at least 0.05 nats worse than the minimum.
    """

    at: float
    low: float
    high: float
    loss: float
    interior: bool


@dataclass(frozen=True)
class Basin:
    """A parabola through the points around a curve's minimum.

    Args:
        at: log2 LR of its vertex, inside the grid.
        loss: there.
        curvature: nats per octave squared; 0 when no parabola fits.
        low: lowest log2 LR that was fitted.
        high: highest.
    """

    at: float
    loss: float
    curvature: float
    low: float
    high: float


def basin(x: np.ndarray, y: np.ndarray) -> Basin:
    """Least-squares parabola through up to five points around the lowest; points 0.35 above it follow the divergence
    cliff, not the basin, and are left out while three remain."""
    best = int(np.argmin(y))
    lo, hi = max(0, min(best - 2, len(x) - 5)), min(len(x), max(best + 3, 5))
    xs, ys = x[lo:hi], y[lo:hi]
    near = ys < ys.min() + 0.35
    if near.sum() >= 3:
        xs, ys = xs[near], ys[near]
    else:
        xs, ys = x[max(0, best - 1) : best + 2], y[max(0, best - 1) : best + 2]
    if len(xs) >= 3:
        a, b, c = np.polyfit(xs, ys, 2)
        if a > 0:
            at = float(np.clip(-b / (2 * a), x[0], x[-1]))
            return Basin(at, float(np.polyval((a, b, c), at)), float(a), float(xs[0]), float(xs[-1]))
    return Basin(float(x[best]), float(y[best]), 0.0, float(x[best]), float(x[best]))


def optimum(curve: dict[float, dict[int, float]], rounds: int = 500) -> Optimum:
    """Quadratic in log2 LR through seed means, near the minimum; seeds resampled for the interval."""
    usable = dict(sorted(curve.items()))
    x = np.array(list(usable))
    mean = np.array([np.mean([min(v, 20.0) for v in by.values()]) for by in usable.values()])
    fit = basin(x, mean)
    at, loss = fit.at, fit.loss
    rng = np.random.default_rng(0)
    seeds = sorted({s for by in usable.values() for s in by})
    draws = []
    for _ in range(rounds):
        picked = rng.choice(seeds, len(seeds))
        y = []
        for by in usable.values():
            have = [min(by[s], 20.0) for s in picked if s in by] or [min(v, 20.0) for v in by.values()]
            y.append(np.mean(have))
        draws.append(basin(x, np.array(y)).at)
    low, high = np.percentile(draws, [2.5, 97.5])
    return Optimum(at, float(low), float(high), loss, bool(mean[0] >= loss + 0.05 and mean[-1] >= loss + 0.05))


def cost_of(curve: dict[float, dict[int, float]], at: float, rounds: int = 500) -> tuple[float, float, float]:
    """Loss at the LR `at` minus the curve's own best; (mean, low, high) over seed resamples.

    Inside the fitted basin both are read off the parabola (linear interpolation between octaves would charge a cost
    even to the curve's own optimum); outside it, `at` is interpolated between the measured points.
    """
    x = np.array(sorted(curve))
    rng = np.random.default_rng(1)
    seeds = sorted({s for by in curve.values() for s in by})

    def one(picked: Sequence[int]) -> float:
        y = []
        for lr in x:
            by = curve[lr]
            have = [min(by[s], 20.0) for s in picked if s in by] or [min(v, 20.0) for v in by.values()]
            y.append(float(np.mean(have)))
        values = np.array(y)
        fit = basin(x, values)
        if fit.low <= at <= fit.high:
            return fit.curvature * (at - fit.at) ** 2
        return float(np.interp(at, x, values)) - min(fit.loss, float(values.min()))

    draws = [one(list(rng.choice(seeds, len(seeds)))) for _ in range(rounds)]
    return one(seeds), float(np.percentile(draws, 2.5)), float(np.percentile(draws, 97.5))


def verdict(passed: bool | None) -> str:
    """The word a claim ends with."""
    return {True: "confirmed", False: "refuted", None: "undecided"}[passed]


def publish(name: str, text: str) -> None:
    """Print and write `docs/results/NAME.md`."""
    print(text)
    (ROOT / "docs" / "results" / f"{name}.md").write_text(text)


def finite(value: float) -> str:
    """A loss for a table."""
    return f"{value:.3f}" if math.isfinite(value) else "diverged"


def main(
    name: str, description: str, cells: Sequence[Cell], judge: Callable[[dict[str, dict[str, Any]]], None]
) -> None:
    """Run what is missing, then judge what is there."""
    args = arguments(description)
    if not args.verdict:
        run_cells(name, cells, args.workers)
    wanted = {key(cell) for cell in cells}
    judge({k: row for k, row in read(name).items() if k in wanted})
