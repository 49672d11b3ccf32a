"""Block-scaled training recipes and MXNorm on images: a ViT on scikit-learn's digits.

Pre-registered (before any row of this study was run):
  V1  mxfp8: test loss within 0.003 nats/image of bf16 (paired seeds; the 95 % interval of the mean difference lies
      inside +-0.003).
  V2  nvfp4: within 0.01 of bf16, likewise, and below nvfp4-bare (the interval of the difference lies below 0).
Beside them: mxfp6, mxfp4 and mxfp4-bare, MXNorm under mxfp8. `noise`: bf16 with the LR raised by 0.01 %, what two runs
differ by when nothing differs; an effect smaller than its sd / sqrt(seeds) is not seen.
Setting: width 64, 4 blocks, patches of 2 x 2 (16 tokens), AdamW at LR 2^-9, decay 0.1, 300 steps of 64 images with 10 %
warm-up and linear decay to zero (600 steps at first: cut for time after one bf16 row, which was dropped); 1437 training and 360 test images, one fixed split.

    OMP_NUM_THREADS=1 python benchmarks/recipes_vit.py --workers 1
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import study
import torch
from scipy import stats
from study import Cell, publish, verdict

from isoscale import numerics
from isoscale.models import ViT, ViTConfig

ARMS = {
    "bf16": ("bf16", None), "mxfp8": ("mxfp8", None), "nvfp4": ("nvfp4", None), "nvfp4-bare": ("nvfp4-bare", None),
    "noise": ("bf16", None), "mxfp8 mxnorm": ("mxfp8", "mxnorm"), "mxfp8 mxnorm-fine": ("mxfp8", "mxnorm-fine"),
    "mxfp6": ("mxfp6", None), "mxfp4": ("mxfp4", None), "mxfp4-bare": ("mxfp4-bare", None),
}  # fmt: skip
STEPS, BATCH, LR = 300, 64, 2.0**-9


def digits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Training images and classes, test images and classes; unit variance, a fixed split."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1)
    images = (images - images.mean()) / images.std()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    classes = torch.tensor(found.target)[order]
    images = images[order]
    return images[:1437], classes[:1437], images[1437:], classes[1437:]


def run(cell: Cell) -> dict[str, Any]:
    """One training run."""
    torch.set_num_threads(1)
    arm, seed = cell["label"]["arm"], cell["label"]["seed"]
    recipe, norm = ARMS[arm]
    images, classes, test_images, test_classes = digits()
    torch.manual_seed(seed)
    model = ViT(ViTConfig(width=64, depth=4, head_size=16, norm="trainable", scaling="plain"))
    numerics.convert(model, recipe, norm=norm, example=images[:2])
    lr = LR * (1.0001 if arm == "noise" else 1.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.1 * STEPS), (STEPS - step) / (0.9 * STEPS))
    )
    draw = torch.Generator().manual_seed(1000 + seed)
    started, loss = time.perf_counter(), torch.tensor(0.0)
    for _ in range(STEPS):
        picked = torch.randint(0, len(images), (BATCH,), generator=draw)
        loss = model(images[picked], classes[picked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        logits = model(test_images)
    return {
        "key": study.key(cell), **cell, "val_loss": float(torch.nn.functional.cross_entropy(logits, test_classes)),
        "train_loss": float(loss.detach()), "accuracy": float((logits.argmax(-1) == test_classes).float().mean()),
        "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip


def cells() -> list[Cell]:
    """Three seeds of the arms with a verdict, then one of the others, then more of all."""
    main_arms = ("bf16", "mxfp8", "nvfp4", "nvfp4-bare", "noise")
    first = [(arm, seed) for seed in range(3) for arm in main_arms] + [(arm, 0) for arm in ARMS if arm not in main_arms]
    rest = [(arm, seed) for seed in range(6) for arm in ARMS if (arm, seed) not in first]
    return [{"label": {"arm": arm, "seed": seed}, "config": {"steps": STEPS}} for arm, seed in (*first, *rest)]


def judge(rows: dict[str, dict[str, Any]]) -> None:
    """Table and verdicts into docs/results/recipes_vit.md."""
    by: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows.values():
        by.setdefault(row["label"]["arm"], {})[row["label"]["seed"]] = row

    def against(arm: str, other: str) -> tuple[float, float, int]:
        both = sorted(set(by.get(arm, {})) & set(by.get(other, {})))
        pairs = [by[arm][seed]["val_loss"] - by[other][seed]["val_loss"] for seed in both]
        half = float(stats.t.ppf(0.975, len(pairs) - 1) * stats.sem(pairs)) if len(pairs) > 1 else float("nan")
        return (float(np.mean(pairs)) if pairs else float("nan")), half, len(pairs)

    text = ["# Recipes and MXNorm on images", "", "Command, setting and pre-registration: `benchmarks/recipes_vit.py`. "
            "Test loss in nats/image; differences paired by seed, with 95 % intervals.", "",
            "| arm | seeds | test loss | accuracy | minus bf16 |", "|---|---|---|---|---|"]  # fmt: skip
    for arm in ARMS:
        found = list(by.get(arm, {}).values())
        if not found:
            continue
        mean, half, count = against(arm, "bf16")
        told = "" if arm == "bf16" else f"{mean:+.4f} ± {half:.4f}"
        text.append(f"| {arm} | {count} | {np.mean([r['val_loss'] for r in found]):.4f} | "
                    f"{np.mean([r['accuracy'] for r in found]):.2%} | {told} |")  # fmt: skip

    def inside(arm: str, bound: float) -> tuple[bool | None, str]:
        mean, half, count = against(arm, "bf16")
        said = f"{arm} - bf16 {mean:+.4f} ± {half:.4f} over {count} seeds"
        if half != half:
            return None, said
        if abs(mean) + half <= bound:
            return True, said
        return (False if abs(mean) - half > bound else None), said

    one, said_one = inside("mxfp8", 0.003)
    two, said_two = inside("nvfp4", 0.01)
    mean, half, _ = against("nvfp4", "nvfp4-bare")
    better = True if mean + half < 0 else False if mean - half > 0 else None
    text += ["", "## Verdicts", "", f"- V1: {said_one}: **{verdict(one)}**",
             f"- V2: {said_two}: **{verdict(two)}**; nvfp4 - nvfp4-bare {mean:+.4f} ± {half:.4f}: "
             f"**{verdict(better)}**"]  # fmt: skip
    publish("recipes_vit", "\n".join(text) + "\n")


if __name__ == "__main__":
    study.main("recipes_vit", __doc__ or "", cells(), judge, run)
