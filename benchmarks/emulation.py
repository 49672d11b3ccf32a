r"""What emulating MXFP8 costs: a training step with all linears but the head in `mxfp8-bare`, against the same step uncast.

One step is forward, backward and fused AdamW of isoscale's decoder (u-muP), weights and activations in bf16 under the
same code; a pair in fp32 beside it. All steps of a width run interleaved in one process, in alternating order, on one
thread; the figure is the median of paired ratios with a bootstrap 95 % interval, on the CPU time of the process.

Peers, on the linear layers alone (forward and backward of a chain of the decoder's four shapes), each against its own
bf16 twin: torchao's MX training linear in emulated mode, and microxcaling (not on PyPI; measured where it can be
imported). A peer that does not run on this machine is named with the reason.

Prediction and pass line, set before the measurement: mxfp8-bare / bf16 <= 1.6 at widths of 256 and more, eager.

    OMP_NUM_THREADS=1 python benchmarks/emulation.py --out docs/results/data/emulation.jsonl
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
from torch import nn

import isoscale as iso
from isoscale.formats.recipes import everywhere
from isoscale.models import Decoder, DecoderConfig
from isoscale.numerics import Linear, convert

LIMIT, DEPTH, VOCAB, HEAD = 1.6, 4, 256, 64
Step = Callable[[], None]


def decoder_step(recipe: str, dtype: torch.dtype, width: int, batch: int, length: int) -> Step:
    """One training step of a decoder in a recipe."""
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(vocab=VOCAB, width=width, depth=DEPTH, head_size=HEAD))
    plan = iso.plan(model, "u-mup", recipe=recipe, hps={"lr": 2.0**-6})
    plan.apply(model)
    model = convert(model.to(dtype), recipe, plan=plan, backend="emulated")
    optimizer = torch.optim.AdamW(plan.param_groups(model), fused=True)
    ids = torch.randint(0, VOCAB, (batch, length + 1))

    def step() -> None:
        loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def chain_step(make: Callable[[int, int], nn.Module], dtype: torch.dtype, width: int, tokens: int) -> Step:
    """Forward and backward of the four linears of a block, one after the other, without the rest of the block."""
    torch.manual_seed(0)
    shapes = ((width, 3 * width), (width, width), (width, 6 * width), (3 * width, width))
    layers = [make(*shape).to(dtype) for shape in shapes]
    inputs = [torch.randn(tokens, shape[0]).to(dtype).requires_grad_() for shape in shapes]
    grads = [torch.randn(tokens, shape[1]).to(dtype) for shape in shapes]

    def step() -> None:
        for layer, x, g in zip(layers, inputs, grads):
            layer(x).backward(g)
            x.grad = None
            for p in layer.parameters():
                p.grad = None

    return step


def plain(fan_in: int, fan_out: int) -> nn.Module:
    return nn.Linear(fan_in, fan_out, bias=False)


def ours(fan_in: int, fan_out: int) -> nn.Module:
    return Linear(fan_in, fan_out, bias=False, formats=everywhere("mxfp8_e4m3/floor"))


def torchao(fan_in: int, fan_out: int) -> nn.Module:
    """torchao's MX training linear with emulated matmuls; raises what torchao raises."""
    from torchao.prototype.moe_training.config import MXFP8TrainingOpConfig, MXFP8TrainingRecipe
    from torchao.quantization import quantize_

    model = nn.Sequential(plain(fan_in, fan_out)).bfloat16()
    config = MXFP8TrainingOpConfig.from_recipe(MXFP8TrainingRecipe.MXFP8_EMULATED_RCEIL)
    quantize_(model, config=config, filter_fn=lambda module, name: isinstance(module, nn.Linear))
    return model


def microxcaling(fan_in: int, fan_out: int) -> nn.Module:
    """microxcaling's Linear, E4M3 in blocks of 32 in all three matmuls."""
    from mx import Linear as MxLinear, MxSpecs, finalize_mx_specs  # type: ignore[import-not-found]

    specs = MxSpecs()
    specs.update({"w_elem_format": "fp8_e4m3", "a_elem_format": "fp8_e4m3", "block_size": 32, "scale_bits": 8,
                  "bfloat": 16, "round": "even", "custom_cuda": False})  # fmt: skip
    layer: nn.Module = MxLinear(fan_in, fan_out, bias=False, mx_specs=finalize_mx_specs(specs))
    return layer


def interval(ratios: list[float], draws: int = 2000) -> list[float]:
    """Median and its bootstrap 95 % interval."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(draws))
    return [round(x, 3) for x in (statistics.median(ratios), medians[int(0.025 * draws)], medians[int(0.975 * draws)])]


def interleaved(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each step; every other round runs in the reverse order."""
    for step in steps.values():
        for _ in range(2):
            step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(rounds):
        for name in list(steps)[:: 1 if index % 2 else -1]:
            start = time.process_time()
            steps[name]()
            times[name].append(time.process_time() - start)
    return times


def ratio(times: dict[str, list[float]], top: str, base: str) -> list[float]:
    return interval([a / b for a, b in zip(times[top], times[base])])


def measure(width: int, batch: int, length: int, rounds: int) -> list[dict[str, Any]]:
    """Rows of one width: the decoder's step, then the linears alone beside the peers'."""
    recipes = {"fp32": ("none", torch.float32), "fp32 mxfp8-bare": ("mxfp8-bare", torch.float32),
               "bf16": ("none", torch.bfloat16), "bf16 mxfp8-bare": ("mxfp8-bare", torch.bfloat16)}  # fmt: skip
    steps = {name: decoder_step(recipe, dtype, width, batch, length) for name, (recipe, dtype) in recipes.items()}
    times = interleaved(steps, rounds)
    ms = {name: round(1e3 * statistics.median(values), 2) for name, values in times.items()}
    rows: list[dict[str, Any]] = []
    for name, limit in (("bf16", LIMIT), ("fp32", None)):
        found = ratio(times, f"{name} mxfp8-bare", name)
        verdict = "reported" if limit is None else "pass" if found[2] <= limit else "fail" if found[1] > limit else "undecided"
        rows.append({"part": "decoder step", "width": width, "dtype": name, "who": "isoscale", "ms": ms[f"{name} mxfp8-bare"],
                     "base_ms": ms[name], "ratio": found, "verdict": verdict})  # fmt: skip
    chains = {"bf16": chain_step(plain, torch.bfloat16, width, batch * length)}
    failed = {}
    for name, make in (("isoscale", ours), ("torchao 0.18, emulated", torchao), ("microxcaling", microxcaling)):
        try:
            step = chain_step(make, torch.bfloat16, width, batch * length)
            step()
            x = torch.randn(32, width).bfloat16()
            torch.manual_seed(0)
            cast_out = make(width, width).bfloat16()(x)
            torch.manual_seed(0)
            assert not torch.equal(cast_out, plain(width, width).bfloat16()(x)), "it casts nothing"
            chains[name] = step
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160]
    times = interleaved(chains, max(5, rounds // 4))
    for name in chains:
        if name != "bf16":
            rows.append({"part": "linears alone", "width": width, "dtype": "bf16", "who": name, "ms": round(1e3 * statistics.median(times[name]), 2),
                         "base_ms": round(1e3 * statistics.median(times["bf16"]), 2), "ratio": ratio(times, name, "bf16"),
                         "verdict": "reported"})  # fmt: skip
    rows += [{"part": "linears alone", "width": width, "dtype": "bf16", "who": who, "failed": why} for who, why in failed.items()]
    facts = {"batch": batch, "length": length, "depth": DEPTH, "rounds": rounds, "torch": torch.__version__,
             "machine": machine(), "casts": casts()}  # fmt: skip
    return [{**row, **facts} for row in rows]


def machine() -> str:
    bf16 = "bf16 units" if torch.cpu._is_avx512_bf16_supported() else "no bf16 units"
    return f"{platform.machine()}, 1 thread, {bf16}"


def casts() -> str:
    from isoscale.kernels import cpu

    return "C++ rows" if cpu.available() else f"torch reference: {cpu.why_not()}"


def show(row: dict[str, Any]) -> str:
    head = f"{row['width']:5d}  {row['part']:13s}  {row['dtype']:4s}  {row['who']:22s}"
    if "failed" in row:
        return f"{head}  does not run here: {row['failed']}"
    value, low, high = row["ratio"]
    return f"{head}  {row['ms']:9.1f} ms / {row['base_ms']:8.1f} ms = {value:6.2f} [{low:.2f}, {high:.2f}]  {row['verdict']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, help="append JSON lines here")
    said = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{machine()}, torch {torch.__version__}, casts by {casts()}; batch {said.batch} x {said.length}")
    for width in said.widths:
        for row in measure(width, said.batch, said.length, said.rounds):
            print(show(row), flush=True)
            if said.out:
                said.out.parent.mkdir(parents=True, exist_ok=True)
                with said.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
