r"""What a training step costs under static scales, beside plain torch.compile.

One step is forward, backward and fused AdamW. Both sides go through Inductor and differ in the backend alone: plain,
and `static_backend(dtype=torch.float32)`, which computes on scaled float32 data. They run interleaved in one process in
alternating order; the figure is the median of the paired ratios with a bootstrap 95 % interval. On a CPU the clock is
the CPU time of the process on one thread, since other jobs may share the machine.

Pass: static / plain <= 1.02 (upper end of the interval; `undecided` while it straddles).

    OMP_NUM_THREADS=1 python benchmarks/scalify_static.py --out docs/results/data/scalify_static.jsonl
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isoscale.models import Decoder, DecoderConfig
from isoscale.scalify.static import static_backend

LIMIT = 1.02


def mlp() -> tuple[Callable[..., Tensor], nn.Module, tuple[Tensor, ...]]:
    """1024-4096-1024 on 512 rows, mean squared error."""
    model = nn.Sequential(nn.Linear(1024, 4096), nn.GELU(), nn.Linear(4096, 1024))
    return lambda x, y: F.mse_loss(model(x), y), model, (torch.randn(512, 1024), torch.randn(512, 1024))


def decoder() -> tuple[Callable[..., Tensor], nn.Module, tuple[Tensor, ...]]:
    """The quickstart's target: 256 wide, 4 blocks, bytes, 8 x 128 tokens; scaling plain."""
    model = Decoder(DecoderConfig(vocab=256, width=256, depth=4, head_size=16, scaling="plain"))
    return lambda a, b: model(a, b), model, tuple(torch.randint(256, (8, 128)) for _ in range(2))


MODELS = {"mlp": mlp, "decoder": decoder}


def stepper(name: str, scaled: bool, device: str) -> Callable[[], None]:
    torch.manual_seed(0)
    loss, model, inputs = MODELS[name]()
    model.to(device)
    inputs = tuple(x.to(device) for x in inputs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    run = torch.compile(loss, backend=static_backend() if scaled else "inductor", fullgraph=True)

    def step() -> None:
        run(*inputs).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def interval(ratios: list[float], draws: int = 2000) -> tuple[float, float, float]:
    """Median and its bootstrap 95 % interval."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(draws))
    return statistics.median(ratios), medians[int(0.025 * draws)], medians[int(0.975 * draws)]


def measure(name: str, rounds: int, device: str) -> dict[str, Any]:
    torch._dynamo.reset()
    steps = {"plain": stepper(name, False, device), "static": stepper(name, True, device)}
    compile_s = {}
    for key, step in steps.items():
        start = time.perf_counter()
        for _ in range(3):
            step()
        compile_s[key] = round(time.perf_counter() - start, 1)
    times: dict[str, list[float]] = {key: [] for key in steps}
    for index in range(rounds):
        for key in ("plain", "static") if index % 2 else ("static", "plain"):
            start = clock(device)
            steps[key]()
            times[key].append(clock(device) - start)
    ratio = interval([a / b for a, b in zip(times["static"], times["plain"])])
    return {
        "model": name, "dtype": "fp32", "device": device, "rounds": rounds, "torch": torch.__version__,
        "machine": torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, 1 thread",
        "ms": {key: round(1e3 * statistics.median(values), 3) for key, values in times.items()},
        "first_steps_s": compile_s, "ratio": [round(x, 4) for x in ratio],
        "verdict": "pass" if ratio[2] <= LIMIT else "fail" if ratio[1] > LIMIT else "undecided",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, help="JSON lines; each measured row is appended")
    said = parser.parse_args()
    torch.set_num_threads(1)
    for name in said.models:
        row = measure(name, said.rounds, said.device)
        low, high = row["ratio"][1:]
        print(f"{name}: static / plain {row['ratio'][0]:.4f} [{low:.4f}, {high:.4f}] {row['verdict']}  {row['ms']} ms, "
              f"first steps {row['first_steps_s']} s", flush=True)  # fmt: skip
        if said.out:
            said.out.parent.mkdir(parents=True, exist_ok=True)
            with said.out.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
