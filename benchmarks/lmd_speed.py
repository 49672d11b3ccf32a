"""What a step of LMD costs on a CPU beside AdamW's, and what both keep in memory.

19.9 M float32 parameters in 25 matrices (six blocks of width 512, and a head), float32 gradients, one thread on one core.
AdamW is `torch.optim.AdamW(fused=True)`. LMD is `isoscale.optim.LMD.step()`: the look at all gradients for inf and NaN,
the update, and the draw of the next weights. All sides take turns in one process, in alternating order; a ratio is the
median of the paired ratios of CPU times (other jobs may share the machine), with a bootstrap 95 % interval.

Lines: two vectors, fp32 and bf16 momenta: pass 2.6, goal 2.0; one vector: pass 1.6, goal 1.2. `undecided` while the
interval straddles the line. The rows without a line say where the time goes: the gradient at the median (half of the
noise), the kernel alone with no noise at all, the finite check alone, the plain torch reference.

Bytes are those that must move a step and parameter: the gradient twice (for the check), all else once in and once out.

    OMP_NUM_THREADS=1 python benchmarks/lmd_speed.py --out docs/results/data/lmd_speed.jsonl \
        --table docs/results/lmd_speed.md
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cast import machine
from scalify_static import interval

from isoscale.kernels import cpu_lmd
from isoscale.kernels.lmd import Draw, Numbers, Spec
from isoscale.kernels.normals import Place
from isoscale.optim import LMD

SHAPES = [(1536, 512), (512, 512), (2048, 512), (512, 2048)] * 6 + [(2048, 512)]
COUNT = sum(a * b for a, b in SHAPES)
# name: (settings of LMD, bytes a parameter, line to pass, goal)
CASES: dict[str, tuple[dict[str, Any], int, float | None, float | None]] = {
    "two vectors, fp32": ({}, 44, 2.6, 2.0),
    "two vectors, bf16 momenta": ({"momentum": "bf16"}, 36, 2.6, 2.0),
    "one vector, fp32": ({"form": "hypentropy"}, 28, 1.6, 1.2),
    "one vector, bf16 momenta": ({"form": "hypentropy", "momentum": "bf16"}, 24, 1.6, 1.2),
    "two vectors, fp32, gradient at the median": ({"gradient": "median"}, 44, None, None),
    "one vector, fp32, gradient at the sample": ({"form": "hypentropy", "gradient": "sample"}, 28, None, None),
    "two vectors, state bf16": ({"state": "bf16"}, 28, None, None),
    "two vectors, state int8-log": ({"state": "int8-log"}, 20, None, None),
    "one vector, state int8-log": ({"form": "hypentropy", "state": "int8-log"}, 16, None, None),
}  # fmt: skip
KEPT: dict[str, tuple[str, torch.dtype, dict[str, Any]]] = {
    "AdamW, fp32": ("adamw", torch.float32, {}),
    "LMD, two vectors, fp32": ("lmd", torch.float32, {}),
    "LMD, two vectors, state bf16": ("lmd", torch.float32, {"state": "bf16"}),
    "LMD, two vectors, state int8-log, bf16 weights": ("lmd", torch.bfloat16, {"state": "int8-log"}),
    "one vector, fp32": ("lmd", torch.float32, {"form": "hypentropy"}),
    "one vector, state int8-log, bf16 weights": ("lmd", torch.bfloat16, {"form": "hypentropy", "state": "int8-log"}),
}


def parameters(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[torch.nn.Parameter]:
    """The matrices, with gradients."""
    generator = torch.Generator(device).manual_seed(0)
    found = []
    for shape in SHAPES:
        p = torch.nn.Parameter((torch.randn(shape, generator=generator, device=device) * 0.04).to(dtype))
        p.grad = (torch.randn(shape, generator=generator, device=device) * 1e-3).to(dtype)
        found.append(p)
    return found


def silent(form: str) -> Callable[[], None]:
    """The kernel alone, by hand, with sigma 0: no noise is made."""
    spec, n = Spec(form=form), COUNT // len(SHAPES)
    keys = ((1, 2), (3, 4))[: spec.vectors]
    draw = Draw(0.0, 0.0, keys)
    numbers = Numbers(0.02, 0.1, 0.9, 0.99, 0.05, -3.0, 0.0, draw, draw, keys, Place(0, n, n))
    many = [tuple(torch.randn(n) * 0.1 for _ in range(2 * spec.vectors + 2)) for _ in SHAPES]

    def step() -> None:
        for *state, g, w in many:
            cpu_lmd.step(spec, numbers, tuple(state[: spec.vectors]), tuple(state[spec.vectors :]), (g,), w)

    return step


def sides(device: str = "cpu") -> dict[str, Callable[[], Any]]:
    """What is timed."""
    runs: dict[str, Callable[[], Any]] = {"AdamW": torch.optim.AdamW(parameters(device=device), lr=1e-3, fused=True).step}
    for name, (settings, *_) in CASES.items():
        runs[name] = LMD(parameters(device=device), **settings).step
    if device == "cpu":
        gradients = [p.grad for p in parameters() if p.grad is not None]
        runs["kernel alone, two vectors, no noise"] = silent("split")
        runs["kernel alone, one vector, no noise"] = silent("hypentropy")
        runs["finite check alone"] = lambda: cpu_lmd.all_finite(gradients)
    return runs


def measure(rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each side, round by round; the reference only now and then, it is slow."""
    runs = sides()
    slow = {f"reference, {name}": LMD(parameters(), kernel="reference", **how).step
            for name, how in (("two vectors", {}), ("one vector", {"form": "hypentropy"}))}  # fmt: skip
    for run in (*runs.values(), *slow.values()):
        run()
        run()
    times: dict[str, list[float]] = {name: [] for name in (*runs, *slow)}
    for index in range(rounds):
        turn = {**runs, **(slow if index % 5 == 0 else {})}
        for name in list(turn) if index % 2 else list(turn)[::-1]:
            begun = time.process_time()
            turn[name]()
            times[name].append(time.process_time() - begun)
    return times


def kept(kind: str, dtype: torch.dtype, settings: dict[str, Any]) -> float:
    """Bytes per parameter of weights and state, as allocated, after a step."""
    params = parameters(dtype)
    optimizer = LMD(params, **settings) if kind == "lmd" else torch.optim.AdamW(params, fused=True)
    optimizer.step()
    state = {x for s in optimizer.state.values() for x in s.values() if isinstance(x, torch.Tensor)}
    return (sum(x.nbytes for x in state) + sum(p.nbytes for p in params)) / COUNT


def rows_of(times: dict[str, list[float]]) -> list[dict[str, Any]]:
    """A row for each side."""
    rows = []
    for name, values in times.items():
        every = 5 if name.startswith("reference") else 1
        ratio = interval([a / b for a, b in zip(values, times["AdamW"][::every])])
        _, size, line, goal = CASES.get(name, ({}, {"AdamW": 28}.get(name), None, None))
        verdict = ""
        if line is not None:
            verdict = "pass" if ratio[2] <= line else "fail" if ratio[1] > line else "undecided"
        ms = 1e3 * statistics.median(values)
        rows.append({
            "what": name, "ms": round(ms, 2), "ns": round(1e6 * ms / COUNT, 3), "bytes": size,
            "GB/s": None if size is None else round(size * COUNT / ms / 1e6, 1), "ratio": [round(x, 3) for x in ratio],
            "line": line, "goal": goal, "verdict": verdict, "goal reached": goal is not None and ratio[2] <= goal,
        })  # fmt: skip
    return rows


HEAD = """# What a step of LMD costs beside AdamW's, on a CPU

Method and lines: `benchmarks/lmd_speed.py`; all runs: `data/lmd_speed.jsonl`. The table is the latest run.

    OMP_NUM_THREADS=1 python benchmarks/lmd_speed.py --out docs/results/data/lmd_speed.jsonl \\
        --table docs/results/lmd_speed.md
"""


def table(rows: list[dict[str, Any]], memory: dict[str, float], where: str) -> str:
    """The results page."""
    lines = [HEAD, f"{COUNT / 1e6:.2f} M parameters in {len(SHAPES)} matrices, {where}.\n",
             "| step | ms | ns a parameter | bytes | GB/s | x fused AdamW | 95 % | line | verdict | goal |",
             "|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for r in rows:
        ratio = r["ratio"]
        goal = "" if r["goal"] is None else f"{r['goal']}: {'reached' if r['goal reached'] else 'missed'}"
        cells = [r["what"], f"{r['ms']:.1f}", f"{r['ns']:.2f}", r["bytes"] or "", r["GB/s"] or "", f"**{ratio[0]:.2f}**",
                 f"{ratio[1]:.2f} to {ratio[2]:.2f}", r["line"] or "", r["verdict"], goal]  # fmt: skip
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    lines += ["\n## Memory\n", "Weights and optimiser state as allocated, without the gradient.\n",
              "| optimiser | bytes a parameter | of AdamW's |", "|---|---|---|"]  # fmt: skip
    lines += [f"| {name} | {size:.2f} | {size / memory['AdamW, fp32']:.2f} |" for name, size in memory.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path, help="JSON lines; each row is appended")
    parser.add_argument("--table", type=Path, help="the results page; what follows its marker is kept")
    said = parser.parse_args()
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    if cpu_lmd.why_not():
        raise SystemExit(f"no compiled kernels: {cpu_lmd.why_not()}")
    rows = rows_of(measure(said.rounds))
    memory = {name: kept(*how) for name, how in KEPT.items()}
    where = f"{machine()}, torch {torch.__version__}, {datetime.date.today()}, {said.rounds} rounds"
    page = table(rows, memory, where)
    print(page)
    if said.out:
        said.out.parent.mkdir(parents=True, exist_ok=True)
        with said.out.open("a") as file:
            for row in [*rows, {"memory": memory}]:
                file.write(json.dumps({**row, "machine": where}) + "\n")
    if said.table:
        mark = "\n## What bounds it\n"
        old = said.table.read_text() if said.table.exists() else ""
        said.table.write_text(page + (mark + old.split(mark, 1)[1] if mark in old else ""))


if __name__ == "__main__":
    main()
