"""How far the predicted scales of a trained decoder are from what is measured, and how well scaled gradients travel.

Pre-registered (before the first run):
  P1  forward: at least 95 % of the tensors that operators make in a trained decoder (no rescale in the forward) have data
      within 2^+-3 of unit RMS, at every one of 0, 100 and 300 steps; the rest are named.
  P1b (added when the default placement changed) the same share with the default's rescales, which stand in the forward too.
  P2  backward: reported, with the default's rescales and with the paper's; no claim. Weight gradients sum over tokens that are not
      independent, so the rules predict them too small.
  P3  control: the plain values of the same tensors are not: fewer than 75 % within 2^+-3 forward and backward together.
  W1  wire: two ranks, gradients of 1e-7, data in fp16: relative error of the mean <= 1e-3; plain fp16 all-reduce >= 2e-2.
Setting: as in `scalify_table.py`, with 4 blocks of width 128; recipe fp16 at LR 2^-8 and 2^-10, fp16 as published (rescales at norm
inputs alone) at 2^-8; seeds 0, 1, 2. First versions of this study had no rescales at linear layers and took RMSNorm apart as torch
does on a CPU (fp16 overflowed within 100 steps at one seed of three), then rescales at the inputs of linear layers (forward 54 % at 100 steps,
overflow at 139). Their rows were dropped; what they showed changed the default.

    OMP_NUM_THREADS=1 python benchmarks/scalify_predict.py
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from scalify_table import schedule
from study import DATA, publish, verdict

from isoscale import scalify as sc
from isoscale._base.rng import stream
from isoscale.config import RunConfig
from isoscale.train.data import TokenStream, load_corpus
from isoscale.train.setup import build

STEPS, LOOKS, BATCH, SEQ = 300, (0, 100, 300), 8, 128
ARMS = {"fp16": 2.0**-8, "fp16 at 2^-10": 2.0**-10, "fp16 as published": 2.0**-8}


def looks(recipe: str, seed: int) -> list[dict[str, Any]]:
    """Train; at each look one row with the shares, the worst and the shares of the plain values."""
    torch.set_num_threads(1)
    config = RunConfig().with_values(**{
        "model.width": 128, "model.depth": 4, "model.norm": "trainable", "rules.parametrisation": "sp", "seed": seed,
        "data.seq_len": SEQ, "train.batch": BATCH,
    })  # fmt: skip
    corpus = load_corpus(config.data.source, config.data.tokenizer, val_fraction=config.data.val_fraction, cache=None, seq_len=SEQ)
    model, _ = build(config, corpus.vocab, torch.device("cpu"))
    data = TokenStream(corpus.train, SEQ, BATCH, stream(seed, "data"))
    settings, lr = sc.as_published("fp16") if "published" in recipe else sc.RECIPES["fp16"], ARMS[recipe]
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    model, optimizer = sc.scalify(model, optimizer, settings, seed=seed)
    out = []
    for step in range(STEPS + 1):
        ids, targets = (torch.from_numpy(x) for x in data.span(step * BATCH, BATCH))
        if step in LOOKS:
            seen = sc.measure(model, lambda a=ids, b=targets: model(a, b))
            rows = seen.measured()
            plain = [row.scale + row.rms for row in rows if row.scale is not None]
            off = [row for row in rows if row.off > 3]
            out.append({
                "recipe": recipe, "seed": seed, "step": step,
                "tensors": {d: len(seen.measured(d)) for d in ("forward", "backward")},
                "within": {d: seen.within(3, d) for d in ("forward", "backward")},
                "plain_within": sum(abs(x) <= 3 for x in plain) / len(plain),
                "off": dict(Counter(f"{row.direction} {row.op} {row.module.rsplit('.', 1)[-1]}" for row in off)),
                "furthest": max((row.off for row in rows), default=math.nan),
            })  # fmt: skip
        for group in optimizer.param_groups:
            group["lr"] = lr * schedule(min(step, 299), False)
        loss = model(ids, targets)
        loss.backward()
        if step in LOOKS:
            out[-1]["loss"] = float(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    return out


def _rank(rank: int, port: int, results: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    g = torch.randn(1 << 16, generator=torch.Generator().manual_seed(rank)) * 1e-7
    exact = g.double()
    dist.all_reduce(exact)
    exact /= 2

    def error(x: torch.Tensor) -> float:
        return float((x.double() - exact).norm() / exact.norm())

    found = {wire: error(sc.as_plain(sc.all_reduce(sc.as_scaled(g, dtype=torch.float16), wire=wire), torch.float64))
             for wire in ("fp16", "bf16", "fp8")}  # fmt: skip
    plain = (g / 2).half()
    dist.all_reduce(plain)
    if rank == 0:
        results.put({"wire": {**found, "plain fp16": error(plain)}})
    dist.destroy_process_group()


def wire() -> dict[str, Any]:
    """Relative error of the mean of two ranks' gradients."""
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    ranks = [context.Process(target=_rank, args=(rank, 29711, results)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    return dict(results.get())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    seeds = parser.parse_args().seeds
    path: Path = DATA / "scalify_predict.jsonl"
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    with path.open("a") as log:
        for seed in seeds:
            for recipe in ARMS:
                if any(r.get("recipe") == recipe and r["seed"] == seed for r in done):
                    continue
                for row in looks(recipe, seed):
                    log.write(json.dumps(row) + "\n")
                    log.flush()
                    done.append(row)
                    print(row, flush=True)
        if not any("wire" in r for r in done):
            done.append(wire())
            log.write(json.dumps(done[-1]) + "\n")
    rows, wires = [r for r in done if "recipe" in r], next(r["wire"] for r in done if "wire" in r)
    text = ["# What Scalify predicts, and what is measured", "",
            "Command, setting and pre-registration: `benchmarks/scalify_predict.py`. Shares of tensors whose data lie within "
            "2^+-3 of unit RMS; views are not counted.", "",
            "| recipe | step | seeds | loss | forward | backward | plain values | furthest off |", "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for recipe in dict.fromkeys(r["recipe"] for r in rows):
        for step in LOOKS:
            found = [r for r in rows if (r["recipe"], r["step"]) == (recipe, step)]
            shares = [min(r["within"][d] for r in found) for d in ("forward", "backward")]
            text.append(f"| {recipe} | {step} | {len(found)} | {sum(r['loss'] for r in found) / len(found):.3f} | {shares[0]:.1%} | {shares[1]:.1%} | "
                        f"{max(r['plain_within'] for r in found):.1%} | 2^{max(r['furthest'] for r in found):.1f} |")  # fmt: skip
    text += ["", "Lowest share over seeds; of the plain values the highest.", "", "## Off by more than 2^3", "",
             "| tensor (direction, operator, module) | count over all looks |", "|---|---|"]  # fmt: skip
    names: Counter[str] = Counter()
    for r in rows:
        names.update(r["off"])
    text += [f"| {name} | {count} |" for name, count in names.most_common(25)]
    text += ["", "## On the wire", "", "Two gloo ranks, 65536 gradients of 1e-7 each, relative error of the mean.", "",
             "| data | relative error |", "|---|---|"]  # fmt: skip
    text += [f"| {name} | {value:.1e} |" for name, value in wires.items()]
    bare = min(r["within"]["forward"] for r in rows if "published" in r["recipe"])
    forward = min(r["within"]["forward"] for r in rows if "published" not in r["recipe"])
    plain = max(r["plain_within"] for r in rows)
    text += ["", "## Verdicts", "", f"- P1 forward, no rescale there, lowest share {bare:.1%}: **{verdict(bare >= 0.95)}**",
             f"- P1b forward, default rescales, lowest share {forward:.1%}: **{verdict(forward >= 0.95)}**",
             f"- P3 control, plain values, highest share {plain:.1%}: **{verdict(plain < 0.75)}**",
             f"- W1 {wires['fp16']:.1e} scaled, {wires['plain fp16']:.1e} plain: "
             f"**{verdict(wires['fp16'] <= 1e-3 and wires['plain fp16'] >= 2e-2)}**"]  # fmt: skip
    publish("scalify_predict", "\n".join(text) + "\n")


if __name__ == "__main__":
    main()
