"""What casts cost on a CPU beside a copy, and beside other packages.

One process, one thread, 4096 x 4096, CPU time (other jobs may share the machine). Every call is paired with an
`x.clone()` of the same dtype right before it, and all calls take turns, round by round; the figure is the median over the
rounds, and the ratio that of medians. A neighbour on the same core slows arithmetic and not a copy: on a busy machine the
ratios rise.

Fresh memory: with glibc's defaults a 64 MiB result is mapped anew for each call, and whether that costs 6 or 30 ms
depends on huge pages, for a clone as for a cast. So the script starts itself again with thresholds that keep freed
memory (GLIBC_TUNABLES): the clone is then a plain copy, and the ratio the strictest that one can report. `--fresh`
measures with the defaults instead.

A peer that is not installed, or that fails, has its reason in the table. microxcaling is not on PyPI: clone it and set
PYTHONPATH.

    OMP_NUM_THREADS=1 python benchmarks/cast.py --out docs/results/data/cast.jsonl
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

KEEP = ":".join(
    f"glibc.malloc.{name}={size}"
    for name, size in (("mmap_threshold", 1 << 32), ("trim_threshold", 1 << 34), ("top_pad", 1 << 28))
)
GOALS = {
    ("fake", "fp32"): 1.5, ("fake", "bf16"): 2.5, ("encode 8", "fp32"): 2.0, ("encode 4", "fp32"): 3.0,
    ("encode 6", "fp32"): 5.0, ("decode", "fp32"): 1.5,
}  # fmt: skip
FORMATS = {"e4m3": "mxfp8_e4m3", "e3m2": "mxfp6_e3m2", "e2m1": "mxfp4"}


class Missing(Exception):
    """A peer that cannot be measured; the message is the reason."""


Times = dict[tuple[str, str], tuple[list[float], list[float]] | Exception]


def seconds(calls: dict[tuple[str, str], Callable[[], object]], clone: Callable[[], object], rounds: int) -> Times:
    """CPU times of calls, and of the clone before each; or what a call raised.

    All calls take turns, round by round, so that a busy spell of the machine falls on all of them.
    """
    times: Times = {}
    for key, run in calls.items():
        try:
            run()
            times[key] = ([], [])
        except Exception as error:
            times[key] = error
    for _ in range(rounds):
        for key, run in calls.items():
            kept = times[key]
            if isinstance(kept, Exception):
                continue
            for call, out in ((clone, kept[1]), (run, kept[0])):
                start = time.process_time()
                result = call()
                out.append(time.process_time() - start)
                del result
    return times


def ours(x: Any, dtype: str) -> dict[tuple[str, str], Callable[[], object]]:
    """The calls of isoscale, by (what, who)."""
    import torch

    from isoscale import formats

    calls: dict[tuple[str, str], Callable[[], object]] = {}
    who = "isoscale"
    for short, name in FORMATS.items():
        calls[f"fake {short}", who] = lambda name=name: formats.fake_cast(x, name)
        calls[f"encode {formats.by_name(name).element.bits} {short}", who] = lambda name=name: formats.encode(x, name)
        codes = formats.encode(x, name)
        calls[f"decode {short}", who] = lambda codes=codes: codes.decode(x.dtype)
    for name in ("mxint8", "nvfp4", "fp8_tensor_e4m3", "fp8_row_e4m3", "fp8_1x128_e4m3", "fp8_128x128_e4m3"):
        calls[f"fake {name}", who] = lambda name=name: formats.fake_cast(x, name)
    calls["fake plain e4m3", who] = lambda: formats.fake_cast(x, "e4m3")  # the element format, without blocks
    calls["strided fake e4m3", who] = lambda: formats.fake_cast(x, "mxfp8_e4m3", axis=0)
    calls["strided encode e4m3", who] = lambda: formats.encode(x, "mxfp8_e4m3", axis=0)
    calls["stochastic fake e4m3", who] = lambda: formats.fake_cast(x, "mxfp8_e4m3", rounding="stochastic", seed=1)
    calls["stochastic encode e2m1", who] = lambda: formats.encode(x, "mxfp4", rounding="stochastic", seed=1)

    def slow(run: Callable[[], object]) -> Callable[[], object]:
        def without_kernels() -> object:
            os.environ["ISOSCALE_KERNELS"] = "off"
            try:
                return run()
            finally:
                os.environ.pop("ISOSCALE_KERNELS")

        return without_kernels

    for short, name in FORMATS.items():
        calls[f"fake {short}", "isoscale reference"] = slow(lambda name=name: formats.fake_cast(x, name))

        def with_kernels(t: Any, name: str = name) -> Any:
            return formats.fake_cast(t, name)

        def without(t: Any, name: str = name) -> Any:  # other code, so that the compiler keeps the two apart
            return formats.fake_cast(t, name)

        fast, traced = torch.compile(with_kernels), torch.compile(without)
        calls[f"fake {short}", "isoscale, compiled"] = lambda fast=fast: fast(x)
        # compiled at the first call, with the kernels off: Inductor then sees the reference
        calls[f"fake {short}", "isoscale reference, compiled"] = slow(lambda traced=traced: traced(x))
    return calls


def peers(x: Any, dtype: str) -> dict[tuple[str, str], Callable[[], object]]:
    """The calls of other packages. Each imports its package itself, so that a missing one is a row of the table."""
    import torch

    kinds = {"e4m3": "float8_e4m3fn", "e3m2": "fp6_e3m2", "e2m1": "float4_e2m1fn_x2"}
    emax = {"e4m3": (8, 448.0), "e3m2": (4, 28.0), "e2m1": (2, 6.0)}

    def torchao(short: str, back: bool, compiled: bool) -> Callable[[], object]:
        made: list[Any] = []

        def run() -> object:
            if not made:
                try:
                    from torchao.prototype.mx_formats.mx_tensor import MXTensor, to_dtype, to_mx
                except Exception as error:
                    raise Missing(f"torchao: {str(error).splitlines()[0]}") from error
                kind = getattr(torch, kinds[short], kinds[short])

                def cast(t: Any) -> Any:
                    if back:
                        return MXTensor.to_mx(t, kind, 32).dequantize(t.dtype)
                    return to_mx(t, kind, 32)

                _ = to_dtype
                made.append(torch.compile(cast) if compiled else cast)
            result: object = made[0](x)
            return result

        return run

    def scale_of(short: str) -> Any:
        blocks = x.float().view(-1, 32)
        top = blocks.abs().amax(1, keepdim=True)
        return blocks, torch.exp2(torch.frexp(top)[1].float() - 1 - emax[short][0])

    def ml_dtypes(short: str) -> Callable[[], object]:
        def run() -> object:
            try:
                import ml_dtypes as ml
            except ImportError as error:
                raise Missing("ml_dtypes is not installed") from error
            kind = {"e4m3": ml.float8_e4m3fn, "e3m2": ml.float6_e3m2fn, "e2m1": ml.float4_e2m1fn}[short]
            blocks, scale = scale_of(short)
            bound = emax[short][1]
            return (blocks / scale).clamp(-bound, bound).numpy().astype(kind).astype("float32") * scale.numpy()

        return run

    def gfloat(short: str) -> Callable[[], object]:
        def run() -> object:
            try:
                from gfloat import round_ndarray
                from gfloat.formats import format_info_ocp_e2m1, format_info_ocp_e3m2, format_info_ocp_e4m3
            except ImportError as error:
                raise Missing("gfloat is not installed") from error
            info = {"e4m3": format_info_ocp_e4m3, "e3m2": format_info_ocp_e3m2, "e2m1": format_info_ocp_e2m1}[short]
            blocks, scale = scale_of(short)
            return round_ndarray(info, blocks / scale, sat=True) * scale

        return run

    def microxcaling(short: str) -> Callable[[], object]:
        def run() -> object:
            try:
                from mx.mx_ops import quantize_mx_op
                from mx.specs import MxSpecs
            except ImportError as error:
                raise Missing("microxcaling is not importable (it is not on PyPI)") from error
            specs = MxSpecs()
            specs["block_size"], specs["scale_bits"], specs["shared_exp_method"] = 32, 8, "max"
            name = {"e4m3": "fp8_e4m3", "e3m2": "fp6_e3m2", "e2m1": "fp4_e2m1"}[short]
            return quantize_mx_op(x, specs, elem_format=name, axes=[-1], round="even")

        return run

    calls: dict[tuple[str, str], Callable[[], object]] = {}
    bits = {"e4m3": 8, "e3m2": 6, "e2m1": 4}
    for short in FORMATS:
        calls[f"fake {short}", "torchao"] = torchao(short, True, False)
        calls[f"encode {bits[short]} {short}", "torchao"] = torchao(short, False, False)
        calls[f"encode {bits[short]} {short}", "torchao, compiled"] = torchao(short, False, True)
        calls[f"fake {short}", "ml_dtypes"] = ml_dtypes(short)
        calls[f"fake {short}", "gfloat"] = gfloat(short)
        calls[f"fake {short}", "microxcaling"] = microxcaling(short)
    return calls


def machine() -> str:
    import torch

    bf16 = "bf16 units" if torch.cpu._is_avx512_bf16_supported() else "no bf16 units"
    return f"{platform.machine()}, 1 thread, {bf16}"


def goal_of(what: str, who: str, dtype: str) -> float | None:
    if (who, dtype) == ("isoscale reference", "fp32"):
        return 14.0  # without a compiler at hand
    if who not in ("isoscale", "isoscale, compiled") or what.rpartition(" ")[2] not in FORMATS:
        return None
    head = what.rpartition(" ")[0]
    return GOALS.get((head, dtype))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--peer-rounds", type=int, default=3, help="peers are slow, so fewer rounds do")
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--only", default="", help="measure calls whose name holds this")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--fresh", action="store_true", help="with the allocator's defaults")
    parser.add_argument("--out", type=Path, help="append rows as JSON lines")
    said = parser.parse_args()
    if not said.fresh and sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = KEEP  # read when a process starts
        os.execv(sys.executable, [sys.executable, *sys.argv])
    import torch

    from isoscale.kernels import cpu

    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)  # a peer that does not compile fills the screen; its first line is in the table
    print(f"{machine()}, torch {torch.__version__}, kernels: {cpu.why_not() or 'compiled'}, size {said.size}")
    print(f"{'call':28} {'who':30} {'dtype':6} {'ms':>9} {'clone':>7} {'ratio':>7}  goal")
    for dtype in said.dtypes:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(said.size, said.size, generator=generator).to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
        calls = {**ours(x, dtype), **({} if said.no_peers else peers(x, dtype))}
        calls = {key: run for key, run in calls.items() if said.only in key[0]}
        times: Times = {}
        for mine in (True, False):
            some = {key: run for key, run in calls.items() if key[1].startswith("isoscale") == mine}
            times |= seconds(some, lambda: x.clone(), said.rounds if mine else said.peer_rounds)
        for (what, who), found in sorted(times.items(), key=lambda item: (item[0][0], item[0][1] != "isoscale", item[0][1])):
            row: dict[str, Any] = {"what": what, "who": who, "dtype": dtype, "size": said.size}
            if isinstance(found, Exception):
                text = str(found).strip().splitlines() or [type(found).__name__]
                row["fails"] = text[0][:200]
                print(f"{what:28} {who:30} {dtype:6} fails: {row['fails'][:110]}", flush=True)
            else:
                taken, clone = (statistics.median(part) for part in found)
                ratio, goal = taken / clone, goal_of(what, who, dtype)
                row |= {"ms": round(1e3 * taken, 2), "clone_ms": round(1e3 * clone, 2), "ratio": round(ratio, 3)}
                row["rounds"] = len(found[0])
                verdict = "" if goal is None else f"{goal} {'pass' if ratio <= goal else 'FAIL'}"
                if goal is not None:
                    row |= {"goal": goal, "verdict": "pass" if ratio <= goal else "fail"}
                print(f"{what:28} {who:30} {dtype:6} {row['ms']:9.2f} {row['clone_ms']:7.2f} {ratio:6.2f}x  {verdict}", flush=True)
            if said.out:
                row |= {"memory": "fresh" if said.fresh else "kept", "machine": machine()}
                row |= {"torch": torch.__version__, "date": datetime.date.today().isoformat()}
                said.out.parent.mkdir(parents=True, exist_ok=True)
                with said.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
