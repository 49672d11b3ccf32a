"""What loss a target will reach: a power law through smaller runs, with an interval, and where it stops holding.

ln loss = a - b ln(training FLOPs), fitted by least squares over at least three sizes with the proxy's hyperparameters
carried along. Over the decade or two that proxies span, the loss's floor bends the line little; far beyond them it
does, so that a prediction there is optimistic, which is said.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from isoscale._base.errors import CheckpointError, ConfigError
from isoscale._base.log import read
from isoscale.config import RunConfig
from isoscale.sweep.budget import run_cost
from isoscale.sweep.result import load
from isoscale.sweep.winner import student
from isoscale.train.folder import read_config

SIZES = 3  # at least
FAR = 8.0  # times the largest rung's FLOPs: beyond, the target is far outside


@dataclass(frozen=True)
class Rung:
    """One trained size.

    Args:
        place: its folder.
        flops: of its whole training.
        loss: validation, nats per token.
        width, depth, tokens: of it.
    """

    place: str
    flops: float
    loss: float
    width: int
    depth: int
    tokens: int


@dataclass(frozen=True)
class Prediction:
    """A target's loss.

    Args:
        loss, low, high: nats per token; the 95 % prediction interval of one run.
        slope: b, how fast the loss falls with FLOPs.
        flops: of the target's training.
        reach: its FLOPs over the largest rung's.
        rungs: what it comes from.
        notes: what may spoil it, in words.
    """

    loss: float
    low: float
    high: float
    slope: float
    flops: float
    reach: float
    rungs: tuple[Rung, ...]
    notes: tuple[str, ...]


def rung(folder: Path | str, vocab: int = 256) -> Rung:
    """A finished run, or a sweep's winner, as one rung.

    Raises:
        CheckpointError: nothing finished is there.
    """
    folder = Path(folder)
    if (folder / "trials").is_dir():
        result = load(folder)
        return _rung(folder, result.config, result.loss, vocab)
    config = read_config(folder)
    log = folder / "metrics.jsonl"
    rows = [row for row in read(log) if "val_loss" in row] if log.exists() else []
    if not rows or rows[-1]["step"] < config.train.steps:
        raise CheckpointError("the run has not finished", place=str(folder), key="--ladder",
                              hint="isoscale train --resume")  # fmt: skip
    return _rung(folder, config, float(rows[-1]["val_loss"]), vocab)


def _rung(folder: Path, config: RunConfig, loss: float, vocab: int) -> Rung:
    tokens, flops = run_cost(config, vocab)
    return Rung(str(folder), flops, loss, config.model.width, config.model.depth, tokens)


def predict(rungs: Sequence[Rung], target: RunConfig, vocab: int = 256) -> Prediction:
    """The target's loss from the ladder.

    Raises:
        ConfigError: fewer than three sizes, or one whose loss is not finite.
    """
    tokens, flops = run_cost(target, vocab)
    middle, half, slope = fit(rungs, flops)
    reach = flops / max(r.flops for r in rungs)
    low, loss, high = (math.exp(middle + shift) for shift in (-half, 0.0, half))
    notes = _notes(rungs, target, tokens, slope, reach)
    return Prediction(loss, low, high, -slope, flops, reach, tuple(rungs), tuple(notes))


def fit(rungs: Sequence[Rung], flops: float) -> tuple[float, float, float]:
    """ln of the loss at these FLOPs, half of its 95 % prediction interval, and the slope. Raises as `predict`."""
    sizes = sorted({round(math.log(r.flops), 6) for r in rungs})
    if len(sizes) < SIZES:
        raise ConfigError(f"a prediction needs at least {SIZES} sizes, and the ladder has {len(sizes)}", key="--ladder",
                          hint="isoscale transfer SWEEP --width 96 --train --out runs/w96 makes a rung")  # fmt: skip
    if bad := [r.place for r in rungs if not (math.isfinite(r.loss) and r.loss > 0)]:
        raise ConfigError("a rung's loss is not finite", key="--ladder", value=bad[0], hint="leave it out")
    x, y = np.log([r.flops for r in rungs]), np.log([r.loss for r in rungs])
    centre, n = x.mean(), len(x)
    spread = float(((x - centre) ** 2).sum())
    slope = float(((x - centre) * (y - y.mean())).sum()) / spread
    rest = y - y.mean() - slope * (x - centre)
    sigma = math.sqrt(float((rest**2).sum()) / (n - 2))
    at = math.log(flops) - centre
    middle = float(y.mean()) + slope * at
    half = student(n - 2) * sigma * math.sqrt(1 + 1 / n + at**2 / spread)
    return middle, half, slope


def _notes(rungs: Sequence[Rung], target: RunConfig, tokens: int, slope: float, reach: float) -> list[str]:
    out = []
    if slope >= 0:
        out.append("the ladder's losses do not fall with size: nothing can be predicted from it")
    if reach > FAR:
        out.append(f"the target takes {reach:.3g}x the largest rung's FLOPs, more than {FAR:g}x: the power law has no "
                   "floor and is optimistic out there")  # fmt: skip
    if reach * max(r.flops for r in rungs) < min(r.flops for r in rungs):
        out.append("the target is smaller than every rung")
    for name, mine, theirs in (("width", target.model.width, {r.width for r in rungs}),
                               ("depth", target.model.depth, {r.depth for r in rungs}),
                               ("tokens", tokens, {r.tokens for r in rungs})):  # fmt: skip
        if len(theirs) == 1 and mine not in theirs:
            out.append(f"the ladder has one {name} only ({next(iter(theirs)):,}), the target another ({mine:,})")
    return out
