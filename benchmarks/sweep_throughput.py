"""Trials per hour of a small LR sweep on two cores: isoscale's fused step and shared workers against the usual way.

Claim, set before the first run (PREDICTION): 16 learning rates of a u-muP decoder of width 64 and 4 blocks, 300 steps
of 8 x 128 bytes each, float32, two workers on two cores. The usual way is two worker processes of one Optuna study,
each with a plain loop: the same `Decoder`, the same plan, data and schedule, `torch.optim.AdamW` as torch defaults it.
It runs once with one thread a process (pinned) and once as torch starts it (unpinned). Ours runs from an empty cache
(no kernels built, nothing tokenised) and with a full one, by `isoscale.sweep.sweep`, with its storage, workers and run
folders. Wall time counts from the call to its end, the workers' imports and building included. Validation losses of equal points must agree within BOUND.

    python benchmarks/sweep_throughput.py                # whatever rows are missing, then the page
    python benchmarks/sweep_throughput.py --report       # the page alone

Sides take turns; rows are kept, so that an interrupted run goes on. What is lost: on a machine that does other work the
seconds are not reproducible, only the ratios of neighbouring runs are worth something, and an unpinned run suffers from
the other work far more than a pinned one; each row has the load at its start, and the CPU seconds of its processes,
which other work hardly touches: their ratio is what an idle machine of two cores would show.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROWS = HERE.parent / "docs" / "results" / "data" / "sweep_throughput.jsonl"
PAGE = HERE.parent / "docs" / "results" / "sweep_throughput.md"
LRS = tuple(round(0.125 * 2 ** (k / 3), 4) for k in range(16))  # 0.125 to 4
STEPS, WORKERS, BOUND, NUDGES = 300, 2, 1e-3, 6
SIDES = ("pinned", "cold", "warm", "unpinned")
PREDICTION = {("cold", "pinned"): 1.2, ("warm", "pinned"): 1.6, ("cold", "unpinned"): 1.2, ("warm", "unpinned"): 1.6}
ONE = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def config(lr: float, steps: int, fused: bool) -> Any:
    """One trial."""
    from isoscale.config import RunConfig
    from isoscale.train.setup import resolved

    return resolved(RunConfig().with_values(**{
        "model.width": 64, "model.depth": 4, "train.batch": 8, "data.seq_len": 128, "train.steps": steps,
        "train.eval_every": steps, "train.checkpoint_every": steps, "train.fused": fused, "hps.lr": lr,
        "train.device": "cpu",
    }))  # fmt: skip


def plain_loop(lr: float, steps: int, tokens: Any, val: Any, *, nudge: int = 0) -> float:
    """A trial as one writes it without a library for the loop; the model and the plan are isoscale's.

    `nudge` moves the initial weight of that number by one unit in its last place, to see what rounding alone does.
    """
    import torch

    from isoscale._base.rng import stream
    from isoscale.optim import lr_factor
    from isoscale.train.data import TokenStream, eval_batches
    from isoscale.train.setup import build

    cfg = config(lr, steps, False)
    model, plan = build(cfg, 256, torch.device("cpu"))
    if nudge:
        first = model.get_parameter("head.weight").data[97:98, nudge - 1 : nudge]  # of the letter a
        first.copy_(torch.nextafter(first, first + 1))
    optimizer = torch.optim.AdamW(plan.param_groups(model))
    peaks = [group["lr"] for group in optimizer.param_groups]
    data = TokenStream(tokens, 128, 8, stream(cfg.seed, "data"))
    for step in range(steps):
        factor = lr_factor(step, steps, warmup=cfg.train.warmup, kind=cfg.train.schedule, final=cfg.train.final,
                           decay_share=cfg.train.decay_share)  # fmt: skip
        for group, peak in zip(optimizer.param_groups, peaks):
            group["lr"] = peak * factor
        ids, targets = (torch.from_numpy(part) for part in data.batch(step))
        optimizer.zero_grad()
        loss = model(ids, targets, tokens=1024)
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        batches = [[torch.from_numpy(part) for part in pair] for pair in eval_batches(val, 128, 8, 16)]
        return sum(float(model(ids, targets)) for ids, targets in batches) / len(batches)


def optuna_worker(storage: str, steps: int, done: Any) -> None:
    """A process of the usual way: takes trials of the study until none is left."""
    import optuna
    from optuna.trial import TrialState

    from isoscale.train.data import load_corpus

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    corpus = load_corpus("builtin:austen+web", seq_len=128)
    study = optuna.load_study(study_name="lr", storage=storage)

    def objective(trial: Any) -> float:
        lr = trial.suggest_float("lr", 0.01, 100, log=True)
        loss = plain_loop(lr, steps, corpus.train, corpus.val)
        done.put((lr, loss))
        return loss

    while study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        study.optimize(objective, n_trials=1)


def counted(job: Any, report: Any) -> Any:
    """A trial as `isoscale sweep` runs it; how many graphs this worker has compiled goes beside the run."""
    from isoscale.sweep.one import objective

    outcome = objective(job, report)
    compiler = sys.modules.get("torch._dynamo.utils")  # not imported: nothing was compiled
    graphs = compiler.counters["stats"].get("unique_graphs", 0) if compiler else 0
    (Path(job.folder) / f"compiled_{os.getpid()}").write_text(str(graphs))
    return outcome


def isoscale_sweep(folder: Path, steps: int) -> tuple[dict[str, float], int]:
    """The sweep as a user of isoscale starts it; losses by LR, and graphs compiled by the workers."""
    from isoscale.sweep import sweep

    whole = config(1.0, steps, True).with_values(**{
        "sweep.strategy": "grid", "sweep.space": {"lr": LRS}, "sweep.executor": "processes", "sweep.workers": WORKERS,
    })  # fmt: skip
    result = sweep(whole, folder, objective="sweep_throughput:counted")
    most: dict[str, int] = {}
    for file in (folder / "trials").glob("*/compiled_*"):
        most[file.name] = max(most.get(file.name, 0), int(file.read_text()))
    return {f"{row.point['lr']:g}": row.loss for row in result.trials}, sum(most.values())


def optuna_sweep(storage: str, steps: int) -> dict[str, float]:
    """The usual way: a study and two processes on it; losses by LR."""
    import optuna

    context = multiprocessing.get_context("spawn")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(study_name="lr", storage=storage)
    for lr in LRS:
        study.enqueue_trial({"lr": lr})
    done = context.Queue()
    jobs = [context.Process(target=optuna_worker, args=(storage, steps, done)) for _ in range(WORKERS)]
    for job in jobs:
        job.start()
    losses = dict(done.get(timeout=3600) for _ in LRS)
    for job in jobs:
        job.join(timeout=60)
    return {f"{lr:g}": loss for lr, loss in losses.items()}


def run(side: str, steps: int, warm_cache: str) -> dict[str, Any]:
    """One sweep of one side; its row."""
    importlib.import_module("isoscale.sweep.study")  # the parent's imports are neither side's
    kept = dict(os.environ)
    row: dict[str, Any] = {"side": side, "steps": steps, "load": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as folder:
        for name in (*ONE, "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
            os.environ.pop(name, None)
        os.environ.update(ONE if side == "pinned" else {})  # isoscale pins its workers itself
        cache = str(Path(folder) / "cache") if side == "cold" else warm_cache
        os.environ.update({"ISOSCALE_CACHE": cache, "TORCHINDUCTOR_CACHE_DIR": str(Path(folder) / "inductor")})
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        begun = time.perf_counter()
        if side in ("cold", "warm"):
            losses, row["compiled"] = isoscale_sweep(Path(folder) / "sweep", steps)
        else:
            losses = optuna_sweep(f"sqlite:///{folder}/study.db", steps)
        row["seconds"] = time.perf_counter() - begun
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        row["cpu_seconds"] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    os.environ.clear()
    os.environ.update(kept)
    assert len(losses) == len(LRS), losses
    return {**row, "losses": losses}


def control(steps: int, nudge: int) -> dict[str, Any]:
    """The plain loop with one weight nudged, at two large LRs; a row."""
    import torch

    from isoscale.train.data import load_corpus

    torch.set_num_threads(1)
    corpus = load_corpus("builtin:austen+web", seq_len=128)
    losses = {f"{lr:g}": plain_loop(lr, steps, corpus.train, corpus.val, nudge=nudge) for lr in LRS[12::3]}
    return {"side": "nudged", "steps": steps, "losses": losses}


def read() -> list[dict[str, Any]]:
    """The rows so far."""
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []


def append(row: dict[str, Any]) -> None:
    """One row more."""
    ROWS.parent.mkdir(parents=True, exist_ok=True)
    with ROWS.open("a") as file:
        file.write(json.dumps(row) + "\n")


def apart(one: dict[str, float], other: dict[str, float]) -> float:
    """Largest difference of the losses of equal points."""
    return max(abs(one[lr] - other[lr]) for lr in one)


def page(rows: list[dict[str, Any]]) -> str:
    """The result in words and tables."""
    rows = [row for row in rows if row["steps"] == STEPS]
    by = {side: [row for row in rows if row["side"] == side] for side in SIDES}
    lines = ["# Trials per hour of a small sweep", "", *(__doc__ or "").split("\n\n")[1].splitlines(), "",
             f"Two cores, {len(LRS)} trials of {STEPS} steps. `python benchmarks/sweep_throughput.py`", "",
             "| side | runs | seconds (median) | trials / hour | load at start |", "|---|---|---|---|---|"]  # fmt: skip
    for side, found in by.items():
        if found:
            seconds = statistics.median(row["seconds"] for row in found)
            load = ", ".join(f"{row['load']:.1f}" for row in found)
            lines.append(f"| {side} | {len(found)} | {seconds:.0f} | {3600 * len(LRS) / seconds:.0f} | {load} |")
    lines += ["", "| ratio of trials / hour | predicted | by pairs of neighbours | median | verdict | of CPU seconds |",
              "|---|---|---|---|---|---|"]  # fmt: skip
    for (ours, theirs), least in PREDICTION.items():
        ratios = [b["seconds"] / a["seconds"] for a, b in zip(by[ours], by[theirs])]
        if not ratios:
            lines.append(f"| {ours} / {theirs} | >= {least} | | | not run | |")
            continue
        middle = statistics.median(ratios)
        verdict = "confirmed" if min(ratios) >= least else "refuted" if max(ratios) < least else "undecided"
        shown = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        cpu = [[row["cpu_seconds"] for row in by[side] if "cpu_seconds" in row] for side in (theirs, ours)]
        idle = f"{statistics.median(cpu[0]) / statistics.median(cpu[1]):.2f}" if all(cpu) else ""
        lines.append(f"| {ours} / {theirs} | >= {least} | {shown} | {middle:.2f} | {verdict} | {idle} |")
    reference = (by["pinned"] or by["unpinned"] or [None])[0]
    if reference:
        gap = max((apart(row["losses"], reference["losses"]) for row in rows if row["side"] in SIDES), default=0.0)
        verdict = "confirmed" if gap <= BOUND else "refuted"
        lines += ["", f"Largest difference of a validation loss: {gap:.1e} nats (bound {BOUND:g}): {verdict}.", "",
                  "| LR | " + " | ".join(side for side in SIDES if by[side]) + " |",
                  "|---|" + "---|" * sum(bool(by[side]) for side in SIDES)]  # fmt: skip
        lines += [f"| {lr} | " + " | ".join(f"{by[s][0]['losses'][lr]:.5f}" for s in SIDES if by[s]) + " |"
                  for lr in sorted(reference["losses"], key=float)]  # fmt: skip
        nudged = [row["losses"] for row in rows if row["side"] == "nudged"]
        for lr in nudged[0] if nudged else ():
            moved = ", ".join(f"{losses[lr] - reference['losses'][lr]:+.1e}" for losses in nudged)
            lines += ["", f"The plain loop at LR {lr} against itself with one initial weight moved by one ulp, one after "
                      f"another of {len(nudged)} weights: {moved}."]  # fmt: skip
        if nudged:
            lines += ["", "Where that is above the bound, no two orders of summation agree."]
    graphs = sum(row.get("compiled", 0) for row in rows)
    return "\n".join([*lines, "", f"Graphs compiled by torch in all of our runs together: {graphs}.", ""])


def main() -> None:
    """Run what is missing, write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--steps", type=int, default=STEPS, help="other than the claim's: to try the script")
    parser.add_argument("--control", action="store_true", help="what rounding alone does to the losses")
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    if args.control:
        for nudge in range(1, NUDGES + 1):
            append(control(args.steps, nudge))
        args.report = True
    with tempfile.TemporaryDirectory() as cache:
        filled = args.report
        for repeat in range(0 if args.report else args.repeats):
            for side in args.sides:
                if sum(row["side"] == side and row["steps"] == args.steps for row in read()) > repeat:
                    continue
                if not filled:  # texts and kernels of the warm side
                    run("warm", 10, cache)
                    filled = True
                row = run(side, args.steps, cache)
                append(row)
                print(side, f"{row['seconds']:.0f} s, load {row['load']:.1f}", flush=True)
    if rows := read():
        PAGE.write_text(page(rows))
        print(page(rows))


if __name__ == "__main__":
    sys.exit(main())
