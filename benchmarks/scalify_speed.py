r"""What a training step costs on scaled tensors, beside the plain model at the same dtype; and what it keeps in memory.

One step is forward, backward and AdamW. Plain: `torch.compile` of model and loss, fused AdamW. Scaled: `scalify`, then
`torch.compile` of model and loss, compiled optimiser step. They run interleaved in one process in alternating order; the figure is
the median of the paired ratios with a bootstrap 95 % interval. On a CPU the clock is the CPU time of the process on one thread,
since other jobs may share the machine. Eager mode is printed too; nothing is claimed of it.

bf16-bare carries scales and measures nothing: no rescales, rounding to nearest, as plain bf16 does; bf16 is the recipe `bf16-bf16`, with
rescales and stochastic rounding of weights and state, which plain bf16 does not have.

Pass: compiled scaled / plain <= 1.10 at equal dtype (fp32, bf16-bare, bf16), 1024-wide MLP and the quickstart's decoder (upper end of the
interval; `undecided` while it straddles). fp16 has no fair plain side on a CPU, whose fp16 matmul takes 20 times a float32 one:
fp16 rows are beside plain float32, and no claim.
Memory: persistent bytes per parameter of weights and optimiser state, as allocated; pass: at most half of float32's 12.

    OMP_NUM_THREADS=1 python benchmarks/scalify_speed.py --out docs/results/data/scalify_speed.jsonl
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from scalify_static import MODELS, clock, interval

from isoscale import scalify as sc

LIMIT = 1.10
BARE = sc.RECIPES["bf16-bf16"].changed(
    linear_rescale=None, norm_rescale=None, rescale_grads=False, stochastic=False
)  # fmt: skip
CASES: tuple[tuple[str, str | sc.ScaleRecipe, str], ...] = (
    ("fp32", "float32", "fp32"), ("bf16-bare", BARE, "bf16"), ("bf16", "bf16-bf16", "bf16"),
    ("fp16", "fp16-fp16", "fp32"), ("fp8", "fp8-fp16", "fp32"),
)  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def stepper(run: Callable[..., Any], inputs: tuple[Any, ...], optimizer: Any) -> Callable[[], None]:
    """Forward, backward and the optimiser's step."""

    def step() -> None:
        run(*inputs).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def plain(name: str, dtype: str, compiled: bool, device: str) -> tuple[Callable[[], None], Any, Any]:
    """A step of the plain model, its model and optimiser."""
    torch.manual_seed(0)
    loss, model, inputs = MODELS[name]()
    model.to(device, DTYPES[dtype])
    inputs = tuple(x.to(device, DTYPES[dtype]) if x.is_floating_point() else x.to(device) for x in inputs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    run = torch.compile(loss, fullgraph=True) if compiled else loss

    return stepper(run, inputs, optimizer), model, optimizer


def scaled(name: str, recipe: str | sc.ScaleRecipe, compiled: bool, device: str) -> tuple[Callable[[], None], Any, Any]:
    """A step of the scaled model, its model and optimiser."""
    torch.manual_seed(0)
    loss, model, inputs = MODELS[name]()
    model.to(device)
    model, optimizer = sc.scalify(model, torch.optim.AdamW(model.parameters(), lr=1e-4), recipe, compile_step=compiled)
    dtype = next(model.parameters()).dtype
    inputs = tuple(x.to(device, dtype) if x.is_floating_point() else x.to(device) for x in inputs)
    run = torch.compile(loss, fullgraph=True) if compiled else loss

    return stepper(run, inputs, optimizer), model, optimizer


def kept(model: Any, optimizer: Any) -> float:
    """Bytes per parameter of weights and optimiser state, as allocated."""
    if isinstance(optimizer, sc.ScaledOptimizer):
        return optimizer.bytes_per_parameter()["all"]
    count = sum(p.numel() for p in model.parameters())
    state = sum(x.nbytes for s in optimizer.state.values() for x in s.values() if isinstance(x, torch.Tensor))
    return (sum(p.nbytes for p in model.parameters()) + state) / count


def measure(
    name: str, case: tuple[str, str | sc.ScaleRecipe, str], rounds: int, compiled: bool, device: str = "cpu"
) -> dict[str, Any]:  # fmt: skip
    """One row."""
    torch._dynamo.reset()
    label, recipe, beside = case
    sides = {"plain": plain(name, beside, compiled, device), "scaled": scaled(name, recipe, compiled, device)}
    first = {}
    for key, (step, *_) in sides.items():
        start = time.perf_counter()
        for _ in range(3):
            step()
        first[key] = round(time.perf_counter() - start, 1)
    times: dict[str, list[float]] = {key: [] for key in sides}
    for index in range(rounds):
        for key in ("plain", "scaled") if index % 2 else ("scaled", "plain"):
            start = clock(device)
            sides[key][0]()
            times[key].append(clock(device) - start)
    ratio = interval([a / b for a, b in zip(times["scaled"], times["plain"])])
    said = "no claim" if label in ("fp16", "fp8") or not compiled else \
        "pass" if ratio[2] <= LIMIT else "fail" if ratio[1] > LIMIT else "undecided"  # fmt: skip
    return {
        "model": name, "scaled": label, "plain": beside, "mode": "compiled" if compiled else "eager", "rounds": rounds,
        "torch": torch.__version__,
        "machine": torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, 1 thread",
        "ms": {key: round(1e3 * statistics.median(values), 3) for key, values in times.items()},
        "first_steps_s": first, "ratio": [round(x, 4) for x in ratio], "verdict": said,
        "bytes_per_parameter": {key: round(kept(model, optimizer), 3) for key, (_, model, optimizer) in sides.items()},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--cases", nargs="+", default=[c[0] for c in CASES], choices=[c[0] for c in CASES])
    parser.add_argument("--modes", nargs="+", default=["compiled", "eager"], choices=["compiled", "eager"])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--out", type=Path, help="JSON lines; each measured row is appended")
    said = parser.parse_args()
    torch.set_num_threads(1)
    for mode in said.modes:
        for name in said.models:
            for case in CASES:
                if case[0] not in said.cases:
                    continue
                row = measure(name, case, said.rounds if mode == "compiled" else said.rounds // 4, mode == "compiled")
                print(f"{mode} {name} {case[0]}: scaled / plain {row['ratio']} {row['verdict']}  {row['ms']} ms, first steps "
                      f"{row['first_steps_s']} s, bytes {row['bytes_per_parameter']}", flush=True)  # fmt: skip
                if said.out:
                    said.out.parent.mkdir(parents=True, exist_ok=True)
                    with said.out.open("a") as file:
                        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
