"""The clip norm is a rule like any other: tuned at the base, carried over by how the gradient's norm grows.

The norm is the root of a sum over tensors of (entries x gradient size^2). Entries are counted; how a tensor's gradient
size moves is what its eps rule says (1 / fan-out growth, m_L^-alpha in the stack), or nothing under unit scaling, where
the norm is about sqrt(parameters) and a clip of 1.0 would cut every step. Every entry counts as equally large at the
base, which is the assumption here. Noise makes the rest: m_B^-1/2 for a mean over the batch. Derived here, no paper's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod, sqrt

from isoscale.planning.roles import ParamInfo
from isoscale.rules import Table
from isoscale.rules.monomial import show_number


def clip_norm(
    clip: float, table: Table, infos: Iterable[tuple[ParamInfo, Mapping[str, float]]], base_parameters: int,
) -> tuple[float, str]:  # fmt: skip
    """The norm at the target and its reason.

    Args:
        clip: norm at the base.
        table: the rules; those without a base keep the norm.
        infos: the target's parameters with their sizes.
        base_parameters: parameter count of the base.
    """
    if not table.needs_base:
        return clip, f"{show_number(clip)} = as given"
    total, batch = 0.0, 1.0
    for info, sizes in infos:
        grad = 1.0
        if not table.unit:
            grad = 1 / sizes["fan_out_ratio"]
            batch = sizes["batch_ratio"] ** -0.5
            if info.in_stack:
                grad *= table.stack_grad.evaluate({}, sizes).number
        total += prod(info.shape) * grad**2
    growth = sqrt(total / base_parameters) * batch
    norm, grown = show_number(clip * growth), show_number(growth)
    return clip * growth, f"{norm} = clip {show_number(clip)} x {grown} (growth of the gradient's norm)"
