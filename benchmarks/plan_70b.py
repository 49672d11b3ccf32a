"""How long does the plan of a 70-billion-parameter model take, and how much memory? On the meta device, one thread.

Pre-registered: the call of iso.plan takes less than 5 s of CPU time and the process stays below 1 GB, for the base as a
meta model and as a Scale. Five calls of each, taking turns in one process; CPU time, since the machine is shared.

    OMP_NUM_THREADS=1 python benchmarks/plan_70b.py
"""

from __future__ import annotations

import json
import resource
import statistics
import time

import torch
from study import DATA, publish, verdict
from transformers import LlamaConfig, LlamaForCausalLM

import isoscale as iso


def llama(width: int, depth: int) -> LlamaForCausalLM:
    """Llama 3 70B's proportions, on the meta device."""
    config = LlamaConfig(hidden_size=width, intermediate_size=width * 7 // 2, num_hidden_layers=depth, head_dim=128,
                         num_attention_heads=width // 128, num_key_value_heads=max(1, width // 1024), vocab_size=128256)
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def main() -> None:
    """Measure, judge, publish."""
    model, base = llama(8192, 80), llama(1024, 8)
    bases = {"a meta model": base, "a Scale": iso.Scale(width=1024, depth=8)}
    times: dict[str, list[float]] = {name: [] for name in bases}
    rows = 0
    for _ in range(5):
        for name, small in bases.items():
            begun = time.process_time()
            rows = len(iso.plan(model, "complete-d", base=small, hps={"lr": 1e-3}).rows)
            times[name].append(time.process_time() - begun)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    medians = {name: statistics.median(values) for name, values in times.items()}
    (DATA / "plan_70b.json").write_text(json.dumps({"cpu_seconds": times, "gigabytes": memory, "rows": rows}, indent=1))
    good = max(max(values) for values in times.values()) < 5 and memory < 1
    text = ["# The plan of a 70B model", "", "Command and pre-registration: `benchmarks/plan_70b.py`; 2-core CPU machine.", "",
            f"{sum(p.numel() for p in model.parameters()):,} parameters in {rows} tensors, base of width 1024 and 8 layers.",
            "", "| base given as | CPU seconds, median of 5 | all |", "|---|---|---|"]
    text += [f"| {name} | {medians[name]:.2f} | {', '.join(f'{t:.2f}' for t in times[name])} |" for name in bases]
    text += ["", f"Peak memory of the process, torch and transformers included: {memory:.2f} GB.", "",
             f"Under 5 s and 1 GB: **{verdict(good)}**"]
    publish("plan_70b", "\n".join(text) + "\n")


if __name__ == "__main__":
    main()
