"""A planted outlier feature: does p = 1 let it through, and do loss spikes follow, where p = 2 and RMSNorm hold?

The paper saw spikes with p = 1 at 8B parameters, D = 4096, K = 128, where the bound of the output is 300 (p = 2: 27,
RMSNorm: 64). Here D = 256 in blocks of 4, so K = 64: 88, 12 and 16.
Pre-registered (LR and size of the plant were chosen on seed 100 with RMSNorm and p = 1; no row of seeds 0 to 2 seen):
  O1  with the plant, p = 1 spikes in every seed; p = 2 and RMSNorm in none. A spike: a step whose loss lies 0.3 above
      the lowest mean of 10 steps before it.
  O2  control: without the plant no arm spikes.
Setting: SP decoder, width 256, 2 blocks, byte-level Austen + WEB, AdamW, 10 steps of warm-up, constant LR, 200 steps of
8 x 128 bytes; all linear layers but the head in MXFP8 with blocks of 4. The plant: feature 7 of every embedding row is
set to PLANT times the rows' standard deviation.

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

LR, PLANT, STEPS, BATCH, LENGTH = 2.0**-7, 100.0, 200, 8, 128
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
    return [{"label": {"norm": norm, "plant": plant, "seed": seed}, "config": {"lr": LR, "size": PLANT}}
            for plant in (True, False) for seed in (0, 1, 2) for norm in NORMS]  # fmt: skip


def judge(rows: dict[str, dict[str, Any]]) -> None:
    """Table and verdicts into docs/results/mxnorm_outlier.md."""
    by: dict[tuple[bool, str], list[dict[str, Any]]] = {}
    for row in rows.values():
        by.setdefault((row["label"]["plant"], row["label"]["norm"]), []).append(row)
    text = ["# MXNorm and a planted outlier", "", "Command, setting and pre-registration: `benchmarks/mxnorm_outlier.py`.",
            "", "| plant | norm | spiking steps by seed | last loss by seed |", "|---|---|---|---|"]  # fmt: skip
    for (plant, norm), found in sorted(by.items(), key=lambda item: not item[0][0]):
        found.sort(key=lambda row: row["label"]["seed"])
        losses = ", ".join(f"{row['val_loss']:.3f}" for row in found)
        text.append(f"| {'yes' if plant else 'no'} | {norm} | {', '.join(str(row['spikes']) for row in found)} | {losses} |")

    def counts(plant: bool, norm: str) -> list[int]:
        return [row["spikes"] for row in by.get((plant, norm), [])]

    whole = all(len(counts(plant, norm)) == 3 for plant in (True, False) for norm in NORMS)
    quiet = not any(counts(True, "p = 2") + counts(True, "rmsnorm"))
    one = (all(counts(True, "p = 1")) and quiet) if whole else None
    two = not any(n for norm in NORMS for n in counts(False, norm)) if whole else None
    text += ["", "## Verdicts", "", f"- O1: **{verdict(one)}**", f"- O2 (control): **{verdict(two)}**"]
    publish("mxnorm_outlier", "\n".join(text) + "\n")


if __name__ == "__main__":
    study.main("mxnorm_outlier", __doc__ or "", cells(), judge, run)
