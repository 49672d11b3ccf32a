"""LR schedules as one pure function of the step: LR(step) = peak x factor(step). Nothing to save, nothing to resume."""

from __future__ import annotations

import math
from typing import Literal

from isoscale._base.errors import ConfigError, did_you_mean

KINDS = ("cosine", "linear", "wsd", "constant")


def lr_factor(
    step: int, steps: int, *, warmup: float = 0.1,
    kind: Literal["cosine", "linear", "wsd", "constant"] = "cosine", final: float = 0.1, decay_share: float = 0.2,
) -> float:  # fmt: skip
    """The share of the peak LR at `step` (0-based) of `steps`.

    Args:
        step: which step, 0 <= step < steps.
        steps: length of the run.
        warmup: share of the steps spent rising linearly; the first step is already above 0.
        kind: `cosine` and `linear` fall to `final` at the last step; `wsd` holds, then falls linearly over the last
            `decay_share` of the run; `constant` holds.
        final: LR at the end / peak.
        decay_share: wsd only.

    Raises:
        ConfigError: an unknown kind.
    """
    if kind not in KINDS:
        raise ConfigError(
            f"unknown schedule {kind!r}", key="train.schedule", value=kind, hint=did_you_mean(kind, KINDS)
        )
    rise = round(warmup * steps)
    if step < rise:
        return (step + 1) / rise
    if kind == "constant":
        return 1.0
    start = max(rise, steps - round(decay_share * steps)) if kind == "wsd" else rise
    if step < start:
        return 1.0
    done = (step - start) / max(1, steps - 1 - start)
    if kind == "cosine":
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return 1.0 + (final - 1.0) * min(1.0, done)
