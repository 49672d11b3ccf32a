"""A planted outlier feature: does p = 1 let it through, and what follows, where p = 2 and RMSNorm hold?

The paper saw loss spikes with p = 1 at 8B parameters, D = 4096, K = 128, where the bound of the output is 300 (p = 2:
27, RMSNorm: 64). Here D = 256 in blocks of 4, so K = 64: 93, 12 and 16.
Tried first, on seed 100, RMSNorm and p = 1 only: plants of 100 and 1000 standard deviations at LRs of 2^-7, 2^-6 and 2^-5.
No spike could be made (a step 0.3 above the lowest mean of 10 steps before it); but with the plant of 1000 p = 1 ended
0.2 worse than RMSNorm. Pre-registered after that; no row of seeds 0 to 2 and no run with p = 2 had been seen:
  O1  with the plant, p = 1 ends at least 0.1 worse than p = 2 in every seed, and p = 2 within 0.1 of RMSNorm.
  O2  control: without the plant, p = 1 ends within 0.1 of p = 2 (one seed).
Setting: SP decoder, width 256, 2 blocks, byte-level Austen + WEB, AdamW at a constant 2^-6 after 10 steps of warm-up,
100 steps of 8 x 128 bytes, mean loss of the last 10; all linear layers but the head in MXFP8 with blocks of 4. The
plant: feature 7 of every embedding row is set to 1000 times the rows' standard deviation.

    OMP_NUM_THREADS=1 python benchmarks/mxnorm_outlier.py --workers 1
"""

from __future__ import annotations

import time
from typing import Any

import study
import torch
from study import Cell, publish, verdict

from isoscale import numerics
from isoscale.config import RunConfig
from isoscale.formats.layers import BF16, everywhere
from isoscale.formats.recipes import HEADS, Recipe
from isoscale.models import Decoder, DecoderConfig
from isoscale.train.data import load_corpus

LR, PLANT, STEPS, BATCH, LENGTH = 2.0**-6, 1000.0, 100, 8, 128
RECIPE = Recipe("mxfp8 in blocks of 4", ((HEADS, BF16), (("*",), everywhere("mxfp8_e4m3/rceil/1x4"))), "for K = 64")
NORMS = {"rmsnorm": None, "p = 2": "mxnorm", "p = 1": "mxnorm-p1"}


def run(cell: Cell) -> dict[str, Any]:
    """One run: its losses, spikes and the largest normalised value."""
    torch.set_num_threads(1)
    label = cell["label"]
    corpus = load_corpus(RunConfig().data.source, "bytes", val_fraction=0.1, cache=None, seq_len=LENGTH)
    torch.manual_seed(label["seed"])
    model = Decoder(DecoderConfig(vocab=corpus.vocab, width=256, depth=2, head_size=32, norm="trainable", scaling="plain"))
    if label["plant"]:
        with torch.no_grad():
            model.embed.weight[:, 7] = label.get("size", PLANT) * model.embed.weight.std()
    numerics.convert(model, RECIPE, norm=NORMS[label["norm"]])
    lr = label.get("lr", LR)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    text = torch.as_tensor(corpus.train)
    draw = torch.Generator().manual_seed(label["seed"])
    started, losses = time.perf_counter(), []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 10)
        starts = torch.randint(0, len(text) - LENGTH - 1, (BATCH,), generator=draw)
        rows = torch.stack([text[s : s + LENGTH + 1] for s in starts.tolist()]).long()
        loss = model(rows[:, :-1], rows[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return {"key": study.key(cell), **cell, "val_loss": sum(losses[-10:]) / 10, "spikes": spikes(losses),
            "losses": [round(value, 4) for value in losses], "seconds": round(time.perf_counter() - started, 1)}  # fmt: skip


def spikes(losses: list[float]) -> int:
    """Steps whose loss lies 0.3 above the lowest mean of 10 steps before them."""
    means = [sum(losses[i - 10 : i]) / 10 for i in range(10, len(losses))]
    return sum(not losses[i] < min(means[: i - 9]) + 0.3 for i in range(10, len(losses)))


def cells() -> list[Cell]:
    """With the plant first."""
    picked = [(True, seed, norm) for seed in (0, 1, 2) for norm in NORMS] + [(False, 0, norm) for norm in NORMS]
    return [{"label": {"norm": norm, "plant": plant, "seed": seed}, "config": {"lr": LR, "size": PLANT, "steps": STEPS}}
            for plant, seed, norm in picked]  # fmt: skip


def judge(rows: dict[str, dict[str, Any]]) -> None:
    """Table and verdicts into docs/results/mxnorm_outlier.md."""
    last: dict[tuple[bool, str], dict[int, float]] = {}
    peaks: dict[tuple[bool, str], list[int]] = {}
    for row in rows.values():
        where = (row["label"]["plant"], row["label"]["norm"])
        last.setdefault(where, {})[row["label"]["seed"]] = row["val_loss"]
        peaks.setdefault(where, []).append(row["spikes"])
    text = ["# MXNorm and a planted outlier", "", "Command, setting and pre-registration: `benchmarks/mxnorm_outlier.py`.",
            "", "| plant | norm | last loss by seed | spiking steps |", "|---|---|---|---|"]  # fmt: skip
    for (plant, norm), found in sorted(last.items(), key=lambda item: not item[0][0]):
        losses = ", ".join(f"{found[seed]:.3f}" for seed in sorted(found))
        text.append(f"| {'yes' if plant else 'no'} | {norm} | {losses} | {sum(peaks[plant, norm])} |")
    planted = {norm: last.get((True, norm), {}) for norm in NORMS}
    seeds = set.intersection(*(set(found) for found in planted.values()))
    one = two = None
    if len(seeds) == 3:
        worse = all(planted["p = 1"][seed] >= planted["p = 2"][seed] + 0.1 for seed in seeds)
        one = worse and all(abs(planted["p = 2"][seed] - planted["rmsnorm"][seed]) <= 0.1 for seed in seeds)
    plain = [last.get((False, norm), {}).get(0) for norm in ("p = 1", "p = 2")]
    if plain[0] is not None and plain[1] is not None:
        two = abs(plain[0] - plain[1]) <= 0.1
    text += ["", "## Verdicts", "", f"- O1: **{verdict(one)}**", f"- O2 (control): **{verdict(two)}**", "",
             "Loss spikes as in the paper could not be made at this scale; what was tried is in the script."]  # fmt: skip
    publish("mxnorm_outlier", "\n".join(text) + "\n")


if __name__ == "__main__":
    study.main("mxnorm_outlier", __doc__ or "", cells(), judge, run)
