"""Everything that wants a GPU, in one call: FP8 tensor cores against emulation and BF16, and the step's overhead.

Prints a table per part; with --out appends JSON lines. Without CUDA it says so and ends with 1.

    python benchmarks/gpu_all.py --out docs/results/data/gpu.jsonl
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import isoscale as iso
from isoscale.models import Decoder, DecoderConfig
from isoscale.formats import fake_cast
from isoscale.formats.recipes import everywhere
from isoscale.numerics.backend import has_scaled_mm
from isoscale.nn.engine import FORWARD, Engine
from isoscale.sweep.measure import pick_workers


def ms(run: Callable[[], object], rounds: int = 30) -> float:
    """Median milliseconds of a call on the GPU."""
    for _ in range(5):
        run()
    times = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def matmuls() -> list[dict[str, object]]:
    """One FP8 product per size: tensor cores (codes and casts included), emulation, BF16; and how far they differ."""
    rows: list[dict[str, object]] = []
    engines = {backend: Engine(everywhere("e4m3"), backend) for backend in ("scaled_mm", "emulated")}
    for size in (1024, 2048, 4096, 8192):
        draw = torch.Generator(device="cuda").manual_seed(0)
        a, b = (fake_cast(torch.randn(size, size, device="cuda", generator=draw), "e4m3") for _ in range(2))
        low, high = a.bfloat16(), b.bfloat16().t()
        run = {name: lambda e=e: e.product(FORWARD, a, b, size**-0.5, torch.float32) for name, e in engines.items()}
        real, emulated = run["scaled_mm"](), run["emulated"]()
        rows.append({
            "part": "matmul", "size": size, "scaled_mm_ms": ms(run["scaled_mm"]), "emulated_ms": ms(run["emulated"]),
            "bf16_ms": ms(lambda: low @ high),
            "largest_difference": float((real - emulated).abs().max()),
        })  # fmt: skip
    return rows


def steps() -> list[dict[str, object]]:
    """A training step of unit and plain decoders, eager and compiled, bf16 autocast, interleaved."""
    rows: list[dict[str, object]] = []
    for width in (512, 1024):
        ids = torch.randint(0, 256, (16, 256), device="cuda")
        runs: dict[str, Callable[[], None]] = {}
        for scaling, name, recipe in (("plain", "sp", "none"), ("unit", "u-mup", "none"), ("unit", "u-mup", "fp8")):
            for compiled in (False, True):
                model = Decoder(DecoderConfig(width=width, depth=4, head_size=64, scaling=scaling)).cuda()  # type: ignore[arg-type]
                plan = iso.plan(model, name, hps={"lr": 1e-3}, recipe=recipe)
                plan.apply(model)
                iso.numerics.convert(model, recipe, plan=plan)
                optimizer = torch.optim.AdamW(plan.param_groups(model), fused=True)
                call = torch.compile(model) if compiled else model

                def step(call: object = call, optimizer: torch.optim.Optimizer = optimizer) -> None:
                    optimizer.zero_grad(set_to_none=True)
                    with torch.autocast("cuda", torch.bfloat16):
                        loss = call(ids, ids)  # type: ignore[operator]
                    loss.backward()
                    optimizer.step()

                runs[f"{name} {recipe} {'compiled' if compiled else 'eager'}"] = step
        for run in runs.values():
            for _ in range(5):
                run()
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(50):
            for name, run in runs.items():
                torch.cuda.synchronize()
                begun = time.perf_counter()
                run()
                torch.cuda.synchronize()
                times[name].append(time.perf_counter() - begun)
        rows += [{"part": "step", "width": width, "what": name, "ms": 1e3 * statistics.median(seconds)}
                 for name, seconds in times.items()]  # fmt: skip
    return rows


def casts() -> list[dict[str, object]]:
    """Casts by Triton kernels: GB/s of the bytes that must move, over that of a copy; torchao's MX cast beside it."""
    from isoscale import formats
    from isoscale.formats.cast import cast_of
    from isoscale.kernels import triton_cast

    rows: list[dict[str, object]] = []
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(8192, 8192, device="cuda").to(dtype)
        full = x.numel() * x.element_size()
        copy = 2 * full / ms(x.clone) / 1e6

        def add(what: str, who: str, run: Callable[[], object], moved: float) -> None:
            taken = ms(run)
            speed = moved / taken / 1e6
            row = {"part": "cast", "what": what, "who": who, "dtype": str(dtype), "ms": taken, "GB/s": speed}
            rows.append({**row, "of a copy": speed / copy})

        add("copy", "torch", x.clone, 2 * full)
        for name in ("mxfp8_e4m3", "mxfp6_e3m2", "mxfp4", "nvfp4", "fp8_tensor_e4m3", "fp8_128x128_e4m3"):
            fmt = formats.by_name(name)
            codes = formats.encode(x, name)
            small = x.numel() * fmt.bits_per_value() / 8 if isinstance(fmt, formats.BlockFormat) else x.numel()
            add(f"fake {name}", "isoscale", lambda: formats.fake_cast(x, name), 2 * full)
            add(f"encode {name}", "isoscale", lambda: formats.encode(x, name), full + small)
            add(f"decode {name}", "isoscale", lambda: codes.decode(dtype), full + small)
            if name.startswith("mx"):
                spec = cast_of(x, fmt, -1, "nearest-even", None, values=False).spec
                add(f"encode, axis 0, {name}", "isoscale", lambda: formats.encode(x, name, axis=0), full + small)
                add(f"encode both ways {name}", "isoscale", lambda: triton_cast.encode_both(x, spec, (8192, 8192)), full + 2 * small)
                noisy = {"rounding": "stochastic", "seed": 1}
                add(f"encode stochastic {name}", "isoscale", lambda: formats.encode(x, name, **noisy), full + small)
        small = x.numel() * 33 / 32
        try:
            from torchao.prototype.mx_formats.kernels import triton_to_mxfp8_dim0, triton_to_mxfp8_dim1

            add("encode mxfp8_e4m3", "torchao Triton", lambda: triton_to_mxfp8_dim0(x), full + small)
            add("encode, axis 0, mxfp8_e4m3", "torchao Triton", lambda: triton_to_mxfp8_dim1(x), full + small)
        except Exception as error:  # not installed, or not for this GPU or dtype: say so and go on
            rows.append({"part": "cast", "who": "torchao Triton", "dtype": str(dtype), "fails": str(error).splitlines()[:1]})
    return rows


def mxnorm(tokens: tuple[int, ...] = (1024, 4096, 16384, 65536), widths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384),
           device: str = "cuda", compiled: bool = True) -> list[dict[str, object]]:  # fmt: skip
    """MXNorm and RMSNorm with an MXFP8 (E4M3) cast behind: fused Triton kernels, and what torch.compile makes of both.

    GB/s are of the bytes that must move: x in, codes and scales out. `speed-up` is the time of the compiled RMSNorm + cast,
    or of the fused one, over that of the fused MXNorm. Prediction: 1.1 to 1.3 against the fused one, 1.2 to 2.4 against
    the compiled one (arXiv 2603.13180 has up to 2.4 between the two forms on a GB200, both compiled).
    """
    from mxnorm_speed import A2, B, EPS, plain

    from isoscale import formats
    from isoscale.formats.layout import spec_of, view_of
    from isoscale.kernels import triton_norm
    from isoscale.kernels.spec import NormSpec

    fmt = formats.by_name("mxfp8_e4m3")
    assert isinstance(fmt, formats.BlockFormat)
    rows: list[dict[str, object]] = []
    for width in widths:
        weight = B / width * A2 * A2
        norms = {"mx2": NormSpec("mx2", EPS, weight, weight), "rms": NormSpec("rms", EPS)}
        spec = spec_of(fmt, view_of((1, width), -1, fmt.block))
        for count in tokens:
            torch.compiler.reset()  # shapes are constants of the compiled forms
            x = torch.randn(count, width, device=device, dtype=torch.bfloat16)
            runs: dict[str, Callable[[], object]] = {
                f"fused {name}": lambda norm=norm: triton_norm.norm_encode(x, spec, norm) for name, norm in norms.items()
            }  # fmt: skip
            if compiled:
                runs |= {f"compiled {name}": lambda call=plain(name, False): call(x) for name in norms}  # noqa: B008
            runs["both ways mx2"] = lambda: triton_norm.norm_encode_both(x, spec, norms["mx2"])
            runs["copy"] = x.clone
            moved = x.numel() * (2 + 33 / 32)
            times = {name: ms(run) for name, run in runs.items()}
            rows += [
                {"part": "mxnorm", "tokens": count, "width": width, "what": name, "ms": taken,
                 "GB/s": (2 * x.numel() * 2 if name == "copy" else moved) / taken / 1e6,
                 "speed-up": taken / times["fused mx2"]}
                for name, taken in times.items()
            ]  # fmt: skip
    return rows


def scalify() -> list[dict[str, object]]:
    """Scaled and static steps beside plain ones, compiled."""
    import scalify_speed
    import scalify_static

    rows: list[dict[str, object]] = []
    for name in scalify_static.MODELS:
        rows.append({"part": "scalify static", **scalify_static.measure(name, 60, "cuda")})
        rows += [{"part": "scalify", **scalify_speed.measure(name, case, 60, True, "cuda")} for case in scalify_speed.CASES]
    return rows


def lmd(device: str = "cuda", width: int = 4096, count: int = 12) -> list[dict[str, object]]:
    """A step of LMD (its next sample included) beside fused AdamW, on square matrices; GB/s of the bytes that must move.

    Prediction: memory bound, so the ratio of the bytes: two vectors 1.57 (44 to 28, the look at the gradients included),
    with bf16 momenta 1.29, one vector 1.0 and 0.86.
    """
    from isoscale.optim import LMD

    cases: dict[str, tuple[dict[str, object] | None, int]] = {
        "AdamW fused": (None, 28), "two vectors": ({}, 44), "two vectors, bf16 momenta": ({"momentum": "bf16"}, 36),
        "one vector": ({"form": "hypentropy"}, 28), "one vector, bf16 momenta": ({"form": "hypentropy", "momentum": "bf16"}, 24),
        "two vectors, int8-log": ({"state": "int8-log"}, 20), "one vector, int8-log": ({"form": "hypentropy", "state": "int8-log"}, 16),
        "two vectors, reference": ({"kernel": "reference"}, 44),
    }  # fmt: skip
    rows: list[dict[str, object]] = []
    size = count * width * width
    for name, (settings, moved) in cases.items():
        params = [torch.nn.Parameter(torch.randn(width, width, device=device) * 0.02) for _ in range(count)]
        for p in params:
            p.grad = torch.randn_like(p) * 1e-3
        optimizer: torch.optim.Optimizer
        if settings is None:
            optimizer = torch.optim.AdamW(params, fused=True)
        else:
            optimizer = LMD(params, **settings)  # type: ignore[arg-type]
        taken = ms(optimizer.step)
        rows.append({"part": "lmd", "what": name, "ms": taken, "bytes": moved, "GB/s": moved * size / taken / 1e6})
        rows[-1]["x AdamW"] = taken / float(str(rows[0]["ms"]))
        rows[-1]["x AdamW by bytes"] = moved / 28
        del params, optimizer
    return rows


def packing(device: str = "cuda", trials: int = 8, steps: int = 300, width: int = 256, limit: int | None = None) -> list[dict[str, object]]:
    """Small trials that share the card: steps per second of 1, 2, 4, 8 processes, then whole sweeps with one worker and
    with as many as `--workers auto` takes.

    Prediction: a decoder of width 256 leaves most of the card idle, so that auto takes at least 4 workers, and the sweep
    of 8 trials takes at most half the time of one worker's.
    """
    config = iso.RunConfig().with_values(**{
        "model.width": width, "model.depth": 4, "train.device": device, "train.steps": steps, "train.eval_every": steps,
        "train.checkpoint_every": steps, "sweep.strategy": "grid", "sweep.executor": "processes",
        "sweep.space": {"lr": tuple(2.0 ** (k / 4) for k in range(trials))},
    })  # fmt: skip
    found = pick_workers(config, limit)
    rows: list[dict[str, object]] = [
        {"part": "packing", "workers": count, "steps/s": rate, "picked": count == found.workers} for count, rate in found.rates.items()
    ]
    for workers in sorted({1, found.workers}):
        with tempfile.TemporaryDirectory() as folder:
            begun = time.perf_counter()
            iso.sweep.sweep(config.with_values(**{"sweep.workers": workers}), folder)
            seconds = time.perf_counter() - begun
        rows.append({"part": "packed sweep", "workers": workers, "trials/h": 3600 * trials / seconds, "seconds": seconds})
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device here: nothing to measure")
    print(torch.cuda.get_device_name(), "FP8 matmul:", has_scaled_mm(torch.device("cuda")))
    for row in [*(matmuls() if has_scaled_mm(torch.device("cuda")) else []), *casts(), *mxnorm(), *steps(), *scalify(), *lmd(), *packing()]:
        print(row)
        if arguments.out:
            with arguments.out.open("a") as log:
                log.write(json.dumps({**row, "device": torch.cuda.get_device_name(), "torch": torch.__version__}) + "\n")
