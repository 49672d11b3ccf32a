"""Points of a sweep: which hyperparameter values, in what order, under which identity."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence

Point = Mapping[str, float]
"""Hyperparameter -> value in base units; what is left out keeps the config's value."""


def identity(point: Point, seed: int) -> str:
    """One short name for (point, seed): a retried trial is the same one, whatever number the storage gives it."""
    text = json.dumps({"point": {name: float(value) for name, value in sorted(point.items())}, "seed": seed})
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def centre_out(values: Sequence[float]) -> list[float]:
    """The values sorted by distance from the middle of the grid, so that a cut budget still brackets an optimum."""
    ordered = sorted(values)
    middle = (len(ordered) - 1) / 2
    return [ordered[i] for i in sorted(range(len(ordered)), key=lambda i: (abs(i - middle), i))]


def show(point: Point) -> str:
    """A point in words; powers of two as such."""
    parts = []
    for name, value in point.items():
        exponent = math.log2(value) if value > 0 else math.nan
        neat = abs(exponent - round(exponent, 1)) < 1e-9
        parts.append(f"{name}=2^{round(exponent, 1):g}" if neat else f"{name}={value:.4g}")
    return " ".join(parts) or "defaults"
