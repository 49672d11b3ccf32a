"""Shared by the long studies: cells (one training run each), resumable, paired, two pinned workers; and the statistics
(which are those of `isoscale check --transfer`).

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
from pathlib import Path
from typing import Any

from isoscale.check.fit import Optimum, cost_of, optimum  # noqa: F401 - the studies take them from here

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


def _renamed(config: dict[str, Any]) -> dict[str, Any]:
    """Settings under the names of today; a cell keeps the one it was first written with, which its key hangs on."""
    return {{"train.optimizer": "optim.name"}.get(name, name): value for name, value in config.items()}


def _run(cell: Cell) -> dict[str, Any]:
    from isoscale._base.errors import NonFiniteError
    from isoscale.config import RunConfig
    from isoscale.train import train

    out = Path(tempfile.mkdtemp(prefix="isoscale-study-"))
    started = time.perf_counter()
    config = RunConfig().with_values(**{
        "train.checkpoint_every": 10**6, "train.eval_every": 10**6, **_renamed(cell["config"]),
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


def run_cells(
    name: str, cells: Sequence[Cell], workers: int = 1, run: Callable[[Cell], dict[str, Any]] | None = None
) -> None:
    """Run what is missing, in the order given; append each row as it comes. `run` trains a cell, by default its config."""
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
        for count, row in enumerate(pool.imap_unordered(run or _run, todo), 1):
            log.write(json.dumps(row) + "\n")
            log.flush()
            left = (time.perf_counter() - begun) / count * (len(todo) - count)
            label = " ".join(f"{k}={v}" for k, v in row["label"].items())
            print(f"{count}/{len(todo)} {label} loss {row['val_loss']} {row['seconds']}s, {left / 60:.0f} min left",
                  flush=True)  # fmt: skip


def append(name: str, row: dict[str, Any]) -> None:
    """One more finished row, told in a line; for studies whose next cell hangs on the last."""
    DATA.mkdir(parents=True, exist_ok=True)
    with (DATA / f"{name}.jsonl").open("a") as log:
        log.write(json.dumps(row) + "\n")
    print(" ".join(f"{k}={v}" for k, v in row["label"].items()), f"loss {row['val_loss']} {row['seconds']}s", flush=True)


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
    name: str, description: str, cells: Sequence[Cell], judge: Callable[[dict[str, dict[str, Any]]], None],
    run: Callable[[Cell], dict[str, Any]] | None = None,
) -> None:  # fmt: skip
    """Run what is missing, then judge what is there."""
    args = arguments(description)
    if not args.verdict:
        run_cells(name, cells, args.workers, run)
    wanted = {key(cell) for cell in cells}
    judge({k: row for k, row in read(name).items() if k in wanted})
