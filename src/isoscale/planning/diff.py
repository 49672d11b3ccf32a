"""Two plans side by side, usually proxy against target: only what differs, blocks of like value folded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from isoscale.planning.names import pattern
from isoscale.planning.rows import ParamRow, SiteRow

_QUANTITIES = ("shape", "init_std", "lr", "eps", "weight_decay", "betas", "sigma", "factors", "formats")


@dataclass(frozen=True)
class Change:
    """One quantity of one (pattern of) parameter or site.

    Args:
        name: with block numbers as `*`.
        quantity: `lr`, `init_std`, ..., or `multiplier` for sites.
        left, right: the values, as tuples when the folded blocks differ among themselves.
        reason: the reason on the right.
    """

    name: str
    quantity: str
    left: Any
    right: Any
    reason: str


def _folded(entries: Sequence[tuple[str, Any, str]]) -> dict[str, tuple[Any, str]]:
    values: dict[str, list[Any]] = {}
    reasons: dict[str, str] = {}
    for name, value, reason in entries:
        key = pattern(name)
        seen = values.setdefault(key, [])
        if value not in seen:
            seen.append(value)
        reasons.setdefault(key, reason)
    return {key: (seen[0] if len(seen) == 1 else tuple(seen), reasons[key]) for key, seen in values.items()}


def _changes(quantity: str, left: list[tuple[str, Any, str]], right: list[tuple[str, Any, str]]) -> list[Change]:
    old, new = _folded(left), _folded(right)
    out = []
    for name in [*new, *(name for name in old if name not in new)]:
        before, after = old.get(name, (None, ""))[0], new.get(name, (None, ""))
        if before != after[0]:
            out.append(Change(name, quantity, before, after[0], after[1]))
    return out


def diff_plans(
    rows: Sequence[ParamRow], sites: Sequence[SiteRow], other_rows: Sequence[ParamRow],
    other_sites: Sequence[SiteRow],
) -> tuple[Change, ...]:  # fmt: skip
    """See `Plan.diff`."""
    out: list[Change] = []
    for quantity in _QUANTITIES:
        left = [(row.name, getattr(row, quantity), row.reasons.get(quantity, "")) for row in rows]
        right = [(row.name, getattr(row, quantity), row.reasons.get(quantity, "")) for row in other_rows]
        out += _changes(quantity, left, right)
    left = [(site.name, site.multiplier, site.reasons.get("multiplier", "")) for site in sites]
    right = [(site.name, site.multiplier, site.reasons.get("multiplier", "")) for site in other_sites]
    return tuple(out + _changes("multiplier", left, right))
