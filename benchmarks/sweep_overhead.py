"""What a search costs beside its trials: the machinery's time per trial, and whether it grows with the study.

The objective returns a number at once, so that all that is left is the machinery: strategy, storage (SQLite in the
folder, each trial created, claimed and ended in it), job, worker, messages, status. The figure is the time between two
ends of trials, by the storage's own stamps: medians over blocks of ten, of the first hundred trials and of the last
hundred, and the middle one of the repeats. The status callback is on, twice a second. Other jobs share the machine.

Predicted before the first run: at 1,000 trials in one study, grid and random cost at most 50 ms a trial, inline and in
processes, and the last hundred at most 1.5 times the first (flat in the number of trials). TPE and the Gaussian process
are listed apart, since the time is the sampler's: no line.

    OMP_NUM_THREADS=1 python benchmarks/sweep_overhead.py --out docs/results/data/sweep_overhead.jsonl \
        --table docs/results/sweep_overhead.md
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import optuna

from isoscale.config import RunConfig
from isoscale.sweep import sweep
from isoscale.sweep.job import Job, Report
from isoscale.sweep.store import url

LINE, FLAT = 50.0, 1.5  # milliseconds a trial; last hundred over first
CELLS = (("grid", "inline", 1000), ("grid", "processes", 1000), ("random", "inline", 1000), ("random", "processes", 1000),
         ("tpe", "inline", 200), ("gp", "inline", 60))  # fmt: skip
LRS = tuple(2.0 ** (e / 2) for e in range(10))
SPACE = {"lr": LRS, "alpha_res": LRS, "alpha_ffn_act": LRS}


def blank(job: Job, report: Report) -> float:
    """A trial of no cost: a valley inside the space, so that no sampler ends in a corner."""
    return sum((math.log2(value) - 2) ** 2 for value in job.point.values())


def once(strategy: str, executor: str, trials: int) -> dict[str, Any]:
    """One search; milliseconds a trial."""
    config = RunConfig().with_values(**{
        "sweep.strategy": strategy, "sweep.executor": executor, "sweep.space": SPACE,
        "sweep.trials": None if strategy == "grid" else trials,
    })  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        wall, cpu = time.perf_counter(), time.process_time()
        sweep(config, folder, objective="sweep_overhead:blank", on_status=lambda status: None)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        stored = optuna.load_study(study_name="isoscale", storage=url(Path(folder))).get_trials()
    ends = sorted(trial.datetime_complete for trial in stored if trial.datetime_complete is not None)
    assert len(ends) == trials, (strategy, len(ends))

    def middle(first: int, last: int) -> float:
        blocks = [(ends[i + 10] - ends[i]).total_seconds() * 100 for i in range(first, last - 10, 10)]
        return statistics.median(blocks)

    part = min(100, trials // 3)
    return {"first": middle(0, part), "last": middle(trials - part, trials), "mean": wall / trials * 1e3, "cpu": cpu / trials * 1e3}


def row_of(strategy: str, executor: str, trials: int, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The repeats together, with the verdict."""
    row: dict[str, Any] = {"strategy": strategy, "executor": executor, "trials": trials, "repeats": len(runs)}
    row |= {key: round(statistics.median(run[key] for run in runs), 2) for key in runs[0]}
    row["growth"] = round(statistics.median(run["last"] / run["first"] for run in runs), 2)
    row["worst"] = round(max(run["last"] for run in runs), 2)
    held = strategy in ("grid", "random")
    row["verdict"] = "" if not held else "pass" if row["last"] <= LINE and row["growth"] <= FLAT else "fail"
    return row


def table(rows: list[dict[str, Any]], where: str) -> str:
    """The results page."""
    lines = [
        "# What a search costs beside its trials", "",
        "Method and prediction: `benchmarks/sweep_overhead.py`; all runs: `data/sweep_overhead.jsonl`. The table is the",
        "latest run.", "",
        "    OMP_NUM_THREADS=1 python benchmarks/sweep_overhead.py --out docs/results/data/sweep_overhead.jsonl \\",
        "        --table docs/results/sweep_overhead.md", "",
        f"Trials that cost nothing, SQLite in the folder, {where}; other jobs shared the machine. Milliseconds a trial,",
        "medians over blocks of ten, the middle one of the repeats. Line for grid and random: the last hundred at most",
        f"{LINE:g} ms, and at most {FLAT:g} times the first hundred.", "",
        "| strategy | executor | trials | first 100 | last 100 | last / first | worst repeat | whole search | CPU of the driver | verdict |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for r in rows:
        cells = [r["strategy"], r["executor"], r["trials"], f"{r['first']:.1f}", f"**{r['last']:.1f}**", f"{r['growth']:.2f}",
                 f"{r['worst']:.1f}", f"{r['mean']:.1f}", f"{r['cpu']:.1f}", r["verdict"]]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", "`whole search` holds the start, the end and the result's file too. TPE and the Gaussian process have no",
              "line: their time is the sampler's own (`first` and `last` are a third of their trials, at most 100)."]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON lines; each row is appended")
    parser.add_argument("--table", type=Path, help="the results page")
    said = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))  # where workers find the objective
    runs: dict[tuple[str, str, int], list[dict[str, Any]]] = {cell: [] for cell in CELLS}
    for _ in range(said.repeats):  # in turns, so that a busy minute hits all alike
        for cell, found in runs.items():
            found.append(once(*cell))
            print(cell, found[-1], flush=True)
    rows = [row_of(*cell, found) for cell, found in runs.items()]
    where = f"{platform.machine()}, {os.cpu_count()} cores, {datetime.date.today()}, {said.repeats} repeats"
    page = table(rows, where)
    print(page)
    if said.out:
        said.out.parent.mkdir(parents=True, exist_ok=True)
        with said.out.open("a") as file:
            file.writelines(json.dumps({**row, "machine": where}) + "\n" for row in rows)
    if said.table:
        said.table.write_text(page)


if __name__ == "__main__":
    main()
