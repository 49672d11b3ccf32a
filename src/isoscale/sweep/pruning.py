"""Which trials are not worth finishing: losses compared at equal tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

RUNGS = (0.1, 0.2, 0.3, 0.45, 0.6, 0.8)
"""Shares of a trial's tokens at which its training loss is compared; the mean over the tenth of the run before each."""
STARTUP = 4  # curves that must have reached a rung before anything is pruned there
KEEP = 3  # asha: one in so many goes on

Curve = Mapping[float, float]
"""Rung -> training loss there."""


def hopeless(rule: str, curve: Curve, others: Sequence[Curve]) -> bool:
    """Whether a trial should stop at the last rung it reached.

    Args:
        rule: `median`: above the median of what the others had there (Vizier's median rule, on the loss at the rung);
            `asha`: not among the best third there (successive halving, arXiv 1810.05934); `none`.
        curve: the trial's.
        others: those of all other trials, running, done and pruned.
    """
    if rule == "none" or not curve:
        return False
    rung = max(curve)
    rest = sorted(other[rung] if math.isfinite(other[rung]) else math.inf for other in others if rung in other)
    if len(rest) < STARTUP:
        return False
    mine = curve[rung]
    if not math.isfinite(mine):
        return True
    if rule == "median":
        middle = len(rest) // 2
        return mine > (rest[middle] if len(rest) % 2 else (rest[middle - 1] + rest[middle]) / 2)
    better = sum(loss < mine for loss in rest)
    return better >= math.ceil((len(rest) + 1) / KEEP)
