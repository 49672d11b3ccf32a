"""From measured rows to verdicts: which tensors keep their size, which do not, and what to suspect.

A parametrisation that transfers keeps every hidden tensor, and its change under training, of order one as the model
grows. Judged at the last step: |slope| up to 0.2 is flat; above 0.3, and beyond 0.2 by two standard errors, it
grows or vanishes; between lies undecided. Two sizes may shrink: the logits with width (muP's readout vanishes at init),
and the residual stream with depth (with alpha = 1 independent branches average out at init). Their *change* may not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from isoscale.check.match import Rows, group
from isoscale.check.slopes import Slope, fit_slope

FLAT, BROKEN, EPS_MARGIN = 0.2, 0.3, 10.0
Table = dict[tuple[int, int], dict[str, dict[str, Any]]]
"""(size, seed) -> tensor -> kind, and the rms value at init (`init`), at the last step (`value`), and of the change."""


@dataclass(frozen=True)
class Finding:
    """One tensor along one axis.

    Args:
        name: of the tensor; over depth, a block's number is `*`, see `match.py`.
        kind: one of `capture.KINDS`.
        axis: `width` or `depth`.
        quantity: `value` of the tensor, or its `change` since the first step.
        slope: exponent at the last step.
        stderr: its standard error over seeds.
        init_slope: exponent of the value before training.
        expected: `flat`, or `not growing`.
        verdict: flat, grows, vanishes, undecided, constant (never changes), or not finite.
        ok: whether that is as expected; None if undecided.
        rms: size -> mean over seeds, at the last step.
    """

    name: str
    kind: str
    axis: str
    quantity: Literal["value", "change"]
    slope: float
    stderr: float
    init_slope: float
    expected: str
    verdict: str
    ok: bool | None
    rms: Mapping[int, float]


@dataclass(frozen=True)
class Trend:
    """One parameter along one axis: information, not judged.

    Args:
        name: of the parameter; over depth, a block's number is `*`.
        axis: `width` or `depth`.
        gradient: exponent of the gradient's rms at the last step.
        update: exponent of the last update's rms.
        change: exponent of the weight's change since the start.
        grad_rms: smallest at the last step, over sizes and seeds.
        eps: largest of the optimiser's eps.
    """

    name: str
    axis: str
    gradient: Slope
    update: Slope
    change: Slope
    grad_rms: float
    eps: float

    @property
    def eps_dominates(self) -> bool:
        """Whether eps is no longer small beside the gradient, so that Adam's steps shrink."""
        return 0 < self.grad_rms < EPS_MARGIN * self.eps


@dataclass(frozen=True)
class Suspect:
    """Where to look first along one axis."""

    axis: str
    name: str
    quantity: str
    slope: float
    why: str


def word(slope: float, stderr: float) -> str:
    """flat, grows, vanishes, undecided or not finite."""
    if not math.isfinite(slope):
        return "not finite"
    if abs(slope) <= FLAT:
        return "flat"
    spread = 2 * stderr if math.isfinite(stderr) else 0.0
    if abs(slope) > BROKEN and abs(slope) - spread > FLAT:
        return "grows" if slope > 0 else "vanishes"
    return "undecided"


def _expected(kind: str, axis: str, quantity: str) -> str:
    shrinks = (kind == "logits" and axis == "width") or (kind == "residual stream" and axis == "depth")
    return "not growing" if quantity == "value" and shrinks else "flat"


def _common(table: Mapping[Any, Mapping[str, Any]]) -> list[str]:
    """Names that every cell has, in forward order."""
    cells = list(table.values())
    return [name for name in cells[0] if all(name in cell for cell in cells)]


def _pooled(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Root mean square over blocks of init value, last value and last change."""
    picked = [(row["value"][0], row["value"][-1], row["change"][-1]) for row in rows]
    return [math.sqrt(sum(part * part for part in parts) / len(parts)) for parts in zip(*picked)]


def tensors(rows: Rows, axis: str) -> Table:
    """Measured rows of one axis as a table."""
    return {
        cell: {name: {"kind": found[0]["kind"], **dict(zip(("init", "value", "change"), _pooled(found)))}
               for name, found in groups.items()}
        for cell, groups in group(rows, axis, "acts").items()
    }  # fmt: skip


def findings(table: Table, axis: str) -> list[Finding]:
    """Two findings per tensor, in forward order."""
    out = []
    for name in _common(table):
        kind = next(iter(table.values()))[name]["kind"]
        init = fit_slope({cell: row[name]["init"] for cell, row in table.items()})
        still = all(row[name]["change"] == 0 for row in table.values())
        for quantity in ("value", "change"):
            values = {cell: row[name][quantity] for cell, row in table.items()}
            found, expected = fit_slope(values), _expected(kind, axis, quantity)
            said = "constant" if still else word(found.slope, found.stderr)
            ok = None if said == "undecided" else said in ("flat", "constant")
            if expected == "not growing" and found.slope < 0:
                ok = True
            sizes = sorted({size for size, _ in values})
            means = {size: _mean([v for (s, _), v in values.items() if s == size]) for size in sizes}
            out.append(Finding(name, kind, axis, quantity, found.slope, found.stderr, init.slope, expected, said, ok,
                               means))  # fmt: skip
    return out


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def trends(rows: Rows, axis: str) -> list[Trend]:
    """One per parameter, in the model's order."""
    pooled: dict[tuple[int, int], dict[str, dict[str, float]]] = {}
    for cell, groups in group(rows, axis, "params").items():
        pooled[cell] = {
            name: {"grad": _rms([x["grad"][-1] for x in found]), "update": _rms([x["update"][-1] for x in found]),
                   "change": _rms([x["change"] for x in found]), "least": min(x["grad"][-1] for x in found),
                   "eps": max(x["eps"] for x in found)}
            for name, found in groups.items()
        }  # fmt: skip
    out = []
    for name in _common(pooled):
        grad, update, change = (fit_slope({cell: row[name][what] for cell, row in pooled.items()})
                                for what in ("grad", "update", "change"))  # fmt: skip
        least, eps = min(row[name]["least"] for row in pooled.values()), max(r[name]["eps"] for r in pooled.values())
        out.append(Trend(name, axis, grad, update, change, least, eps))
    return out


def _rms(values: Sequence[float]) -> float:
    return math.sqrt(sum(value * value for value in values) / len(values))


def _why(first: Finding, drowned: bool) -> str:
    if first.verdict == "not finite":
        return "it is zero or overflows at some size: lower --lr, or look at its init"
    at_init = first.quantity == "value" and abs(first.init_slope) > BROKEN
    if first.axis == "depth" and first.verdict == "grows":
        return "probably " + (
            "the residual branches are not scaled down with depth (x + depth^-alpha f(x))" if at_init else
            "the branches' multiplier or the LR of what is inside them does not shrink with depth"
        )  # fmt: skip
    if first.verdict == "grows":
        return f"probably its {'init' if at_init else 'LR'} does not shrink with fan-in, or a factor before it does not"
    if at_init:
        return f"probably its init shrinks too fast with {first.axis}"
    if drowned:
        return "Adam's eps is no longer small beside its gradient"
    return f"probably its LR shrinks with {first.axis} more than it needs to"


def suspect(found: Sequence[Finding], parameters: Sequence[Trend]) -> Suspect | None:
    """The first tensor in forward order that is broken at init, or else grows, or else vanishes, and why it may.

    A break at init comes first: training carries it back to tensors before it. Then what grows, since a tensor that
    grows downstream of another one's LR can make a third shrink. None where nothing is broken.
    """
    broken = [finding for finding in found if finding.ok is False]
    if not broken:
        return None
    early = [one for one in broken if one.quantity == "value" and abs(one.init_slope) > BROKEN]
    first = next((finding for finding in early or broken if finding.verdict != "vanishes"), (early or broken)[0])
    same = [finding for finding in found if finding.name == first.name and finding.ok is False]
    first = next((finding for finding in same if abs(finding.init_slope) > BROKEN), same[-1])
    drowned = any(trend.eps_dominates and trend.name.startswith(f"{first.name}.") for trend in parameters)
    return Suspect(first.axis, first.name, first.quantity, first.slope, _why(first, drowned))
