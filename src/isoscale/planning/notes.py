"""What may spoil a transfer, in words with the numbers: printed with the plan and raised as warnings."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from isoscale.planning.sizes import Ratios
from isoscale.rules import Table

FAR = 16.0


class PlanWarning(UserWarning):
    """A rule is used where it is less sure; the plan's notes say the same."""


def range_notes(
    found: Ratios, table: Table, hps: Mapping[str, float], more: Sequence[str] = ()
) -> tuple[str, ...]:
    """Notes on rules that leave the range in which they are known to hold, and `more`; each is a warning too."""
    out = [*more, *_notes(found, table, hps)]
    for note in out:
        warnings.warn(note, PlanWarning, stacklevel=4)
    return tuple(out)


def _notes(found: Ratios, table: Table, hps: Mapping[str, float]) -> list[str]:
    out: list[str] = []
    ratio = found.of_a_run
    if not table.needs_base:
        return out
    if table.betas == "linear" and ratio > 1:
        for name in ("beta1", "beta2"):
            fresh = (1 - hps[name]) * ratio
            if fresh > 0.5:
                out.append(
                    f"{name} {hps[name]:g} becomes {1 - fresh:g} at m_B / m_D = {ratio:g}: the linear rule is of first "
                    f"order and leaves its range; betas='power' gives {hps[name] ** ratio:.3g}"
                )
    if found.batch > FAR:
        out.append(
            f"the batch grows {found.batch:g} times: the square-root rule holds below the critical batch size only"
        )
    if not 1 / FAR <= found.tokens <= FAR:
        out.append(
            f"the training length changes {found.tokens:g} times: measured duration exponents reach from 0.28 to 0.5, "
            f"which is a factor of {max(found.tokens, 1 / found.tokens) ** 0.2:.2g} in the LR"
        )
    return out
