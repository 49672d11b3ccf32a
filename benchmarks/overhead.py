r"""What a unit-scaled training step costs beside its plain twin, and the same for unit-scaling 0.3.5.

One step is forward, backward and fused AdamW. Four models run interleaved in one process, in alternating order:
isoscale's decoder unit and plain, and a decoder of unit-scaling's modules and its torch twin (so each library is
held against the same graph without scaling). The figure is the median of the paired ratios with a bootstrap 95 %
interval. On a CPU the clock is the CPU time of the process on one thread, since other jobs may share the machine.

Pass: unit / plain <= 1.08 eager, <= 1.03 compiled (upper end of the interval; `undecided` while it straddles).

    OMP_NUM_THREADS=1 python benchmarks/overhead.py --out docs/results/data/overhead.jsonl \
        --table docs/results/overhead.md
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import random
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as torch_f
from torch import Tensor, nn

from isoscale.models import Decoder, DecoderConfig
from isoscale.nn import functional as F
from isoscale.nn.attention import apply_rope

LIMITS = {"eager": 1.08, "compiled": 1.03}
DEPTH, VOCAB, HEAD, RATIO = 4, 256, 64, 3


class PeerLayer(nn.Module):
    """Pre-norm block of unit-scaling's modules (`lib="uu"`) or of torch's (`lib="torch"`), on the same graph."""

    def __init__(self, lib: str, width: int, taus: tuple[float, float]) -> None:
        super().__init__()
        import unit_scaling as uu

        self.lib, self.taus, self.U = lib, taus, uu.functional
        unit = lib == "uu"
        kind: dict[str, Any] = {} if unit else {"bias": False}
        free: dict[str, Any] = {"constraint": None} if unit else kind
        linear = uu.Linear if unit else nn.Linear
        self.norms = nn.ModuleList(
            uu.RMSNorm(width) if unit else nn.RMSNorm(width, 1e-5, elementwise_affine=False) for _ in range(2)
        )
        self.qkv, self.out = linear(width, 3 * width, **kind), linear(width, width, **kind)
        self.gate, self.up = (linear(width, RATIO * width, **free) for _ in range(2))
        self.down = linear(RATIO * width, width, **free)

    def attention(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, -1, HEAD).permute(2, 0, 3, 1, 4)
        cos, sin = rope[0].to(q.dtype), rope[1].to(q.dtype)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        if self.lib == "uu":
            out = self.U.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            out = torch_f.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(out.transpose(1, 2).reshape(batch, length, width))

    def mlp(self, x: Tensor) -> Tensor:
        up, gate = self.up(x), self.gate(x)
        return self.down(self.U.silu_glu(up, gate) if self.lib == "uu" else up * torch_f.silu(gate))

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        bodies = (lambda h: self.attention(h, rope), self.mlp)
        for norm, body, tau in zip(self.norms, bodies, self.taus):
            if self.lib == "uu":
                h, skip = self.U.residual_split(x, tau)
                x = self.U.residual_add(body(norm(h)), skip, tau)
            else:
                x = x + body(norm(x))
        return x


class PeerDecoder(nn.Module):
    def __init__(self, lib: str, width: int) -> None:
        super().__init__()
        import unit_scaling as uu

        self.lib, self.U, unit = lib, uu.functional, lib == "uu"
        taus = F.transformer_residual_taus(2 * DEPTH)
        self.embed = (uu.Embedding if unit else nn.Embedding)(VOCAB, width)
        self.layers = nn.ModuleList(PeerLayer(lib, width, (taus[2 * i], taus[2 * i + 1])) for i in range(DEPTH))
        self.norm = uu.RMSNorm(width) if unit else nn.RMSNorm(width, 1e-5, elementwise_affine=False)
        self.head = uu.LinearReadout(width, VOCAB) if unit else nn.Linear(width, VOCAB, bias=False)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x, rope = self.embed(ids), F.rope_tables(ids.shape[1], HEAD, ids.device)
        for layer in self.layers:
            x = layer(x, rope)
        logits = self.head(self.norm(x)).float().flatten(0, 1)
        loss: Callable[..., Tensor] = self.U.cross_entropy if self.lib == "uu" else torch_f.cross_entropy
        return loss(logits, targets.flatten())


def build(name: str, width: int) -> nn.Module:
    if name in ("unit", "plain"):
        return Decoder(DecoderConfig(vocab=VOCAB, width=width, depth=DEPTH, head_size=HEAD, scaling=name))  # type: ignore[arg-type]
    return PeerDecoder("uu" if name == "peer_unit" else "torch", width)


def stepper(name: str, cell: dict[str, Any], ids: Tensor) -> Callable[[], None]:
    torch.manual_seed(0)
    device = ids.device.type
    model = build(name, cell["width"]).to(ids.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    run = torch.compile(model, fullgraph=True) if cell["mode"] == "compiled" else model
    low = cell["dtype"] == "bf16"

    def step() -> None:
        with torch.autocast(device, torch.bfloat16) if low else contextlib.nullcontext():
            loss = run(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def kernels_of(step: Callable[[], None]) -> dict[str, int]:
    """Run the first (compiling) step and count what Inductor made: distinct kernels, calls of them, buffers, extern calls."""
    from torch._inductor.utils import run_and_get_code

    _, sources = run_and_get_code(step)
    text = "\n".join(sources)
    return {
        "kernels": text.count("async_compile."),
        "calls": len(re.findall(r"^\s*(?:cpp_fused\w*\(|triton_\w+\.run\()", text, re.MULTILINE)),
        "buffers": text.count("empty_strided_"),
        "extern": text.count("extern_kernels.") + text.count("torch.ops."),
    }


def interval(ratios: list[float], draws: int = 2000) -> tuple[float, float, float]:
    """Median and its bootstrap 95 % interval."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(draws))
    return statistics.median(ratios), medians[int(0.025 * draws)], medians[int(0.975 * draws)]


def measure(cell: dict[str, Any], rounds: int, peer: bool) -> dict[str, Any]:
    torch._dynamo.reset()
    ids = torch.randint(0, VOCAB, (cell["batch"], cell["length"] + 1), device=cell["device"])
    names = ["plain", "unit"] + (["peer_plain", "peer_unit"] if peer else [])
    steps, made = {}, {}
    for name in names:
        steps[name] = stepper(name, cell, ids)
        if cell["mode"] == "compiled":
            made[name] = kernels_of(steps[name])
        for _ in range(3):
            steps[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    # Pairs (a, b), (b, a) and the pairs themselves in turn: in a fixed or mirrored order of four the first and the last
    # would follow themselves, with warm caches, and the two in the middle never.
    pairs = [names[i : i + 2] for i in range(0, len(names), 2)]
    for index in range(rounds):
        order = [name for pair in pairs for name in (pair if index % 2 else pair[::-1])]
        for name in order if index // 2 % 2 else order[len(order) // 2 :] + order[: len(order) // 2]:
            start = clock(cell["device"])
            steps[name]()
            times[name].append(clock(cell["device"]) - start)
    row: dict[str, Any] = {**cell, "rounds": rounds, "torch": torch.__version__, "machine": machine(cell["device"])}
    row["ms"] = {name: round(1e3 * statistics.median(values), 3) for name, values in times.items()}
    rivals = [("isoscale", "unit", "plain")] + ([("unit-scaling", "peer_unit", "peer_plain")] if peer else [])
    row["ratio"] = {
        label: [round(x, 4) for x in interval([a / b for a, b in zip(times[top], times[base])])]
        for label, top, base in rivals
    }
    row["inductor"] = made
    limit = LIMITS[cell["mode"]]
    _, low, high = row["ratio"]["isoscale"]
    row["verdict"] = "pass" if high <= limit else "fail" if low > limit else "undecided"
    return row


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    bf16 = "bf16 units" if torch.cpu._is_avx512_bf16_supported() else "no bf16 units"
    return f"{platform.machine()}, 1 thread, {bf16}"


def show(row: dict[str, Any]) -> str:
    ratios = "  ".join(f"{name} {r[0]:.3f} [{r[1]:.3f}, {r[2]:.3f}]" for name, r in row["ratio"].items())
    made = "".join(f"\n    {name}: {count}" for name, count in row["inductor"].items())
    head = f"{row['device']} width {row['width']} {row['dtype']} {row['mode']} ({row['rounds']} rounds)"
    return f"{head}: {ratios}  {row['verdict']}  {row['ms']}{made}"


def publish(rows: list[dict[str, Any]], path: Path) -> None:
    """The Markdown table of `rows`."""
    text = [
        "# Cost of unit scaling",
        "",
        f"Time of a training step over that of its plain twin: median of paired ratios [bootstrap 95 %]. Depth {DEPTH},",
        f"head size {HEAD}, SwiGLU {RATIO}x, vocabulary {VOCAB}; batch x length, dtype (bf16 by autocast) and mode as shown.",
        "Pass lines: 1.08 eager, 1.03 compiled. Command and method: `benchmarks/overhead.py`; rows: `data/overhead.jsonl`.",
        "Compiled rows also count calls of generated kernels and allocated buffers, plain -> unit.",
        "",
        "CPU rows were taken beside other jobs (CPU time, one thread). In eager mode the closed-form norm here is faster",
        "than torch's CPU `rms_norm`, which the plain twin uses, and pays for part of the scaling; compiled, both are fused.",
        "At width 256 compiled bf16 costs more than unit-scaling's ratio, at 512 it does not. The cause is not found:",
        "oneDNN's alpha costs 2-3 % of a bf16 GEMM, but multiplies in its place gave 1.027 [1.007, 1.041] in a side run.",
        "",
        "| machine | width | batch | dtype | mode | rounds | isoscale | unit-scaling 0.3.5 | verdict | kernels | buffers |",
        "|" + "---|" * 11,
    ]
    for row in rows:
        made = row["inductor"]
        counts = [f"{made['plain'][key]} -> {made['unit'][key]}" if made else "" for key in ("calls", "buffers")]
        ratios = [row["ratio"].get(name) for name in ("isoscale", "unit-scaling")]
        shown = [f"{r[0]:.3f} [{r[1]:.3f}, {r[2]:.3f}]" if r else "" for r in ratios]
        size = f"{row['batch']} x {row['length']}"
        cells = [row["machine"], row["width"], size, row["dtype"], row["mode"], row["rounds"], *shown, row["verdict"]]
        text.append("| " + " | ".join(map(str, [*cells, *counts])) + " |")
    path.write_text("\n".join([*text, ""]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--modes", nargs="+", default=["eager", "compiled"], choices=list(LIMITS))
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--no-peer", action="store_true", help="skip unit-scaling, e.g. where it is not installed")
    parser.add_argument("--out", type=Path, help="JSON lines; finished cells found there are skipped")
    parser.add_argument("--table", type=Path, help="write all rows of --out here as Markdown")
    said = parser.parse_args()
    torch.set_num_threads(1)
    done = [json.loads(line) for line in said.out.read_text().splitlines()] if said.out and said.out.exists() else []
    for width in said.widths:
        for dtype in said.dtypes:
            for mode in said.modes:
                cell = {"width": width, "dtype": dtype, "mode": mode, "device": said.device, "batch": said.batch}
                cell["length"] = said.length
                old = [row for row in done if all(row.get(key) == value for key, value in cell.items())]
                row = old[-1] if old else measure(cell, said.rounds, not said.no_peer)
                print(show(row), flush=True)
                if said.out and not old:
                    done.append(row)
                    said.out.parent.mkdir(parents=True, exist_ok=True)
                    with said.out.open("a") as file:
                        file.write(json.dumps(row) + "\n")
    if said.table:
        publish(done, said.table)


if __name__ == "__main__":
    main()
