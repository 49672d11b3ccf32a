"""What block-scaled training costs against BF16, and which ingredient of the 4-bit recipes earns its place.

Pre-registered. Seen before: single runs of other lengths, which are not in the rows (300 steps, seed 0: bf16 1.876,
nvfp4 1.979; 80 steps of batch 8, seed 0: bf16 2.531, mxfp8 2.500, nvfp4 2.558, nvfp4-bare 2.573, mxfp4 2.569; and at 80
steps nvfp4 off its ingredients and seed 1, nvfp4 - bf16 +0.018). The bounds of R1, R2 and R5 were set before those;
steps (300 to 200) and seeds (12 and 6 to 10 and 4) were cut after them, for time.
  R1  u-muP, recipe mxfp8: final validation loss within 0.003 nats/byte of bf16 (paired seeds and data; the 95 %
      interval of the mean difference lies inside +-0.003).
  R2  u-muP, recipe nvfp4: within 0.01 of bf16 (as R1), and below nvfp4-bare (the interval of nvfp4 - nvfp4-bare lies
      below 0).
  R5  Unit scale: for fp8-all (a plain cast, no scale at all) the gap to bf16 of the same parametrisation is smaller
      under u-muP than under SP and muP (by 0.02 or more); for mxfp8 and nvfp4, which bring scales of their own, all
      three gaps lie within 0.02 of each other.
Without a prediction: nvfp4 with each ingredient off, one at a time, and nvfp4-bare with each one on; mxfp6, mxfp4,
mxfp4-bare, mxfp8-bare and mxfp8-e5m2-grad. What would speak against an ingredient: its interval off - on below 0.
Noise floor: bf16 with the LR raised by 0.01 %, against bf16: what two runs differ by when nothing differs. Its standard
deviation, and that of every pair of arms, stands in the table: an effect smaller than sd / sqrt(seeds) is not seen.
Setting: u-muP decoder, width 64, 4 blocks, 200 steps of 16 x 128 bytes, LR 2^0 (SP, muP: 2^-8) with 10 % warm-up and
linear decay to zero: a run that ends at LR 0 ends in a quiet place, which makes pairs differ least. 4 blocks: of
nvfp4's shares (2/62, 8/62) the last block is kept. Emulated casts, exact on any machine.
Order: the arms of R1, R2 and the floor for 4 seeds; seed 0 of all else; then further seeds: 10 of the former, 4 of
ingredients, other recipes and R5's SP and muP; last, R1's arms up to 24.
Beside the runs, the time of a step at width 256, interleaved, and what the two transforms do to the cast's noise.

    OMP_NUM_THREADS=1 python benchmarks/recipes.py --workers 2
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import study
import torch
from scipy import stats
from study import Cell, finite, main, publish, verdict

from isoscale.formats import fake_cast
from isoscale.formats.recipes import Recipe, recipe_by_name
from isoscale.nn.hadamard import rotation

BASE = {"train.steps": 200, "train.batch": 16, "data.seq_len": 128, "model.width": 64, "train.schedule": "linear",
        "train.final": 0.0, "train.warmup": 0.1, "train.eval_batches": 32}  # fmt: skip
RULES: dict[str, dict[str, Any]] = {
    "u-mup": {"rules.parametrisation": "u-mup", "hps.weight_decay": 2.0**-13, "hps.lr": 1.0},
    "sp": {"rules.parametrisation": "sp", "hps.weight_decay": 0.1, "hps.lr": 2.0**-8},
    "mup": {"rules.parametrisation": "mup", "hps.weight_decay": 0.1, "hps.lr": 2.0**-8, "base.width": 32},
}
FINISH = 0.1


def variants() -> dict[str, Recipe]:
    """nvfp4 with one ingredient less, nvfp4-bare with one more."""
    full, bare = recipe_by_name("nvfp4"), recipe_by_name("nvfp4-bare")
    (_, head), (_, most) = full.layers
    (_, _), (_, plain) = bare.layers

    def made(recipe: Recipe, name: str, **formats: Any) -> Recipe:
        base = most if recipe is full else plain
        (heads, _), (rest, _) = recipe.layers
        return replace(recipe, name=name, layers=((heads, head), (rest, replace(base, **formats))))

    return {recipe.name: recipe for recipe in (
        made(full, "nvfp4 - hadamard", hadamard=()),
        made(full, "nvfp4 - stochastic", stochastic=()),
        made(full, "nvfp4 - tiles", weight="nvfp4"),
        replace(full, name="nvfp4 - keep", keep=(0.0, 0.0)),
        replace(full, name="nvfp4 + finish", finish=FINISH),
        made(bare, "nvfp4-bare + hadamard", hadamard=most.hadamard),
        made(bare, "nvfp4-bare + stochastic", stochastic=most.stochastic),
        made(bare, "nvfp4-bare + tiles", weight=most.weight),
        replace(bare, name="nvfp4-bare + keep", keep=full.keep),
        replace(bare, name="nvfp4-bare + finish", finish=FINISH),
    )}  # fmt: skip


VARIANTS = variants()
FLOOR = "bf16, LR + 0.01 %"
MAIN = ("bf16", "mxfp8", "nvfp4", "nvfp4-bare", FLOOR)
OTHERS = ("mxfp6", "mxfp4", "mxfp4-bare", "mxfp8-bare", "mxfp8-e5m2-grad", *VARIANTS)
SCALES = ("bf16", "fp8-all", "mxfp8", "nvfp4")
WIDTH = 256


def cell(rules: str, arm: str, seed: int) -> Cell:
    """One training run."""
    config = {**BASE, **RULES[rules], "numerics.recipe": "bf16" if arm == FLOOR else arm, "seed": seed}
    if arm == FLOOR:
        config["hps.lr"] = RULES[rules]["hps.lr"] * 1.0001
    return {"label": {"rules": rules, "arm": arm, "seed": seed}, "config": config}


def cells() -> list[Cell]:
    """All cells, so that any first part of the list is worth something."""
    order = [cell("u-mup", arm, seed) for seed in range(4) for arm in MAIN]
    order += [{"label": {"arm": "speed", "seed": 0}, "width": WIDTH}]
    order += [cell("u-mup", arm, 0) for arm in (*OTHERS, "fp8-all")]
    order += [cell(rules, arm, 0) for rules in ("sp", "mup") for arm in SCALES]
    order += [cell("u-mup", arm, seed) for seed in range(4, 10) for arm in MAIN]
    order += [cell("u-mup", arm, seed) for seed in range(1, 4) for arm in OTHERS]
    order += [cell(rules, arm, seed) for seed in range(1, 4) for rules in ("sp", "mup") for arm in SCALES]
    order += [cell("u-mup", "fp8-all", seed) for seed in range(1, 4)]
    order += [cell("u-mup", arm, seed) for seed in range(10, 24) for arm in ("bf16", "mxfp8")]
    return order


def run(job: Cell) -> dict[str, Any]:
    """A cell's row; the worker learns the variants' names, which are no recipes of the package."""
    if "width" in job:
        return {"key": study.key(job), **job, "val_loss": 0.0, "seconds": 0, "ratios": step_times(job["width"])}
    from isoscale.train import setup

    setup.recipe_by_name = lambda name: VARIANTS[name] if name in VARIANTS else recipe_by_name(name)
    return study._run(job)


def step_times(width: int, rounds: int = 15) -> dict[str, float]:
    """Forward and backward over those of the bf16 recipe: medians of interleaved rounds, 2 blocks, 8 x 128 tokens."""
    import isoscale as iso
    from isoscale.models import Decoder, DecoderConfig

    ids, models = torch.randint(0, 256, (8, 128)), {}
    for name in ("bf16", "none", "mxfp8", "mxfp6", "mxfp4-bare", "mxfp4", "nvfp4-bare", "nvfp4"):
        model = Decoder(DecoderConfig(vocab=256, width=width, depth=2, head_size=32))
        iso.plan(model, "u-mup").apply(model)
        models[name] = iso.numerics.convert(model, recipe_by_name(name).changed(keep_first=0, keep_last=0))
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            begun = time.process_time()
            model(ids, ids).backward()
            times[name].append(time.process_time() - begun)
            model.zero_grad()
    middle = {name: float(np.median(seconds)) for name, seconds in times.items()}
    return {name: round(value / middle["bf16"], 3) for name, value in middle.items()}


def interval(diffs: np.ndarray) -> tuple[float, float, float]:
    """Mean and 95 % t interval of paired differences."""
    mean = float(diffs.mean())
    if len(diffs) < 2:
        return mean, float("-inf"), float("inf")
    half = float(stats.t.ppf(0.975, len(diffs) - 1)) * float(diffs.std(ddof=1)) / len(diffs) ** 0.5
    return mean, mean - half, mean + half


Losses = dict[tuple[str, str], dict[int, float]]


def paired(loss: Losses, rules: str, arm: str, other: str) -> np.ndarray:
    """arm - other, one difference for each seed that both have."""
    a, b = loss.get((rules, arm), {}), loss.get((rules, other), {})
    return np.array([a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())])


def shown(diffs: np.ndarray) -> str:
    """Mean, interval and standard deviation for a table."""
    if not len(diffs):
        return "|  |"
    mean, low, high = interval(diffs)
    if len(diffs) < 2:
        return f"{mean:+.4f} |  |"
    return f"{mean:+.4f} ({low:+.4f} to {high:+.4f}) | {diffs.std(ddof=1):.4f} |"


def inside(diffs: np.ndarray, bound: float) -> bool | None:
    """Whether the interval lies within the bound; None where it reaches over it, or there are no pairs."""
    if len(diffs) < 2:
        return None
    _, low, high = interval(diffs)
    return True if -bound <= low and high <= bound else False if low > bound or high < -bound else None


def both(first: bool | None, second: bool | None) -> bool | None:
    """Refuted where one is, confirmed where both are."""
    return False if first is False or second is False else None if first is None or second is None else True


def r2(loss: Losses) -> bool | None:
    """See R2."""
    better = paired(loss, "u-mup", "nvfp4", "nvfp4-bare")
    below = None if len(better) < 2 else True if interval(better)[2] < 0 else False if interval(better)[1] > 0 else None
    return both(inside(paired(loss, "u-mup", "nvfp4", "bf16"), 0.01), below)


def r5(loss: Losses) -> tuple[bool | None, bool | None]:
    """See R5: the plain cast, the block formats."""
    gap = {(rules, arm): paired(loss, rules, arm, "bf16") for rules in RULES for arm in SCALES[1:]}
    mean = {key: float(diffs.mean()) for key, diffs in gap.items() if len(diffs) >= 2}
    plain = blocks = None
    if all((rules, "fp8-all") in mean for rules in RULES):
        plain = all(mean["u-mup", "fp8-all"] <= mean[rules, "fp8-all"] - 0.02 for rules in ("sp", "mup"))
    wide = [interval(gap[rules, arm])[2] - mean.get((rules, arm), 0.0) for rules in RULES for arm in ("mxfp8", "nvfp4")]
    if max(wide) <= 0.02:  # intervals wider than the bound decide nothing (this line came after the first rows)
        blocks = all(max(mean[rules, arm] for rules in RULES) - min(mean[rules, arm] for rules in RULES) <= 0.02
                     for arm in ("mxfp8", "nvfp4"))  # fmt: skip
    return plain, blocks


def noise_table() -> list[str]:
    """What the Hadamard transform does to the noise of a cast, and what stochastic rounding leaves of its bias."""
    draw = torch.Generator().manual_seed(0)
    normal = torch.randn(2048, 512, generator=draw)
    uneven = normal * torch.randn(2048, 512, generator=draw).exp()
    lines = ["| data | MXFP4 | with H32 | NVFP4 | with H16 |", "|---|---|---|---|---|"]
    for outlier in (0, 1, 8, 16, 100):
        values = []
        for fmt, size in (("mxfp4/even", 32), ("nvfp4", 16)):
            x = (uneven if outlier == 1 else normal).clone()
            if outlier > 1:
                x.view(-1, size)[:, 3] = outlier
            for y in (x, (x.view(-1, size) @ rotation(size).float()).view_as(x)):
                values.append(f"{float((fake_cast(y, fmt) - y).square().sum() / y.square().sum()):.4f}")
        name = {0: "normal", 1: "normal x log-normal"}.get(outlier, f"normal, one value of {outlier} sigma in each block")
        lines.append(f"| {name} | " + " | ".join(values) + " |")
    lines += ["", "| stochastic rounding of normal data | bias: mean of (E q(x) - x) x / x^2 |", "|---|---|"]
    for fmt in ("mxfp4/floor", "mxfp4/even", "mxfp4/rceil", "nvfp4"):
        some = normal[:512]
        mean = torch.stack([fake_cast(some, fmt, rounding="stochastic", seed=seed) for seed in range(64)]).mean(0)
        lines.append(f"| {fmt} | {float(((mean - some) * some).sum() / some.square().sum()):+.5f} |")
    return lines


def judge(rows: dict[str, dict[str, Any]]) -> None:
    """Tables and verdicts into docs/results/recipes.md."""
    loss: Losses = {}
    speed: dict[str, float] = {}
    for row in rows.values():
        label = row["label"]
        if label["arm"] == "speed":
            speed = row["ratios"]
        else:
            loss.setdefault((label["rules"], label["arm"]), {})[label["seed"]] = float(row["val_loss"])
    text = [
        "# Which 4-bit recipe: what block-scaled training costs", "",
        "Command and pre-registration: `benchmarks/recipes.py`. Backend: emulated (exact). Losses: nats per byte,",
        "validation; gaps are paired by seed and data, with 95 % intervals; sd is that of single pairs.", "",
        "## Verdicts", "",
        f"- **R1** mxfp8 within 0.003 of bf16: **{verdict(inside(paired(loss, 'u-mup', 'mxfp8', 'bf16'), 0.003))}**",
        f"- **R2** nvfp4 within 0.01 of bf16, and below nvfp4-bare: **{verdict(r2(loss))}**",
        f"- **R5, plain cast** fp8-all loses less under u-muP than under SP and muP: **{verdict(r5(loss)[0])}**",
        f"- **R5, blocks** mxfp8 and nvfp4 lose alike under all three: **{verdict(r5(loss)[1])}**", "",
        "## Recipes under u-muP", "", "| recipe | loss | gap to bf16 | sd | seeds |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for arm in (*MAIN, *OTHERS[:5]):
        seeds = loss.get(("u-mup", arm), {})
        if seeds:
            gap = "|  |" if arm == "bf16" else shown(paired(loss, "u-mup", arm, "bf16"))
            text.append(f"| {arm} | {finite(float(np.mean(list(seeds.values()))))} | {gap} {len(seeds)} |")
    text += ["", "nvfp4 against nvfp4-bare:", "", "| difference | sd | seeds |", "|---|---|---|"]
    diffs = paired(loss, "u-mup", "nvfp4", "nvfp4-bare")
    text.append(f"| {shown(diffs)} {len(diffs)} |")
    text += ["", "## Ingredients of nvfp4", "",
             f"One off, against nvfp4; one on, against nvfp4-bare; finish is {FINISH:g} of the run in BF16.", "",
             "| arm | change of the loss | sd | seeds |", "|---|---|---|---|"]  # fmt: skip
    for arm in VARIANTS:
        diffs = paired(loss, "u-mup", arm, arm.split()[0])
        if len(diffs):
            text.append(f"| {arm} | {shown(diffs)} {len(diffs)} |")
    text += ["", "## Unit scale", "", "Gap to bf16 of the same parametrisation.", "",
             "| parametrisation | recipe | gap | sd | seeds |", "|---|---|---|---|---|"]  # fmt: skip
    for arm in SCALES[1:]:
        for rules in RULES:
            diffs = paired(loss, rules, arm, "bf16")
            if len(diffs):
                text.append(f"| {rules} | {arm} | {shown(diffs)} {len(diffs)} |")
    if speed:
        text += ["", "## Time of a step", "",
                 f"CPU time of forward and backward at width {WIDTH} over that of the bf16 recipe, one thread, emulated, "
                 "in one process, interleaved.", "", "| " + " | ".join(speed) + " |", "|" + "---|" * len(speed),
                 "| " + " | ".join(f"{ratio:.2f}" for ratio in speed.values()) + " |"]  # fmt: skip
    text += ["", "## Noise of the casts", "", "Squared error over squared values; to nearest. Outliers stand in every block.",
             "", *noise_table()]  # fmt: skip
    publish("recipes", "\n".join(text) + "\n")


if __name__ == "__main__":
    main("recipes", __doc__ or "", cells(), judge, run)
