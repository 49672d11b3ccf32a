"""A trained model as a plain one again: every multiplier of the plan folded into weights, the logits unchanged.

What was moved into init and LR is in the weights already. Left are parametrizations, and attention scales that were set
on attributes: those go into the query projection (or the gain of the norm on the queries), and the attribute goes back
to what the class computes from its config, so that a reload from the config gives the same function.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from isoscale._base.errors import PlanError
from isoscale.planning.apply import fold_hooks
from isoscale.planning.groups import match
from isoscale.planning.names import normalise
from isoscale.planning.roles import is_own
from isoscale.planning.trace import Trace, trace

if TYPE_CHECKING:
    from isoscale.planning.plan import Plan


@torch.no_grad()
def export(model: nn.Module, plan: Plan, example: object = None) -> nn.Module:
    """Fold the plan's multipliers into the weights, in place, and return the model.

    Args:
        model: the trained model, unwrapped.
        plan: the one it was made with.
        example: input of the forward, where it cannot be guessed; used where an attention scale has to be folded.

    Raises:
        PlanError: another model; a unit-scaled one, whose factors live in its ops; queries whose projection also makes
            keys or values, so that no factor fits it.
    """
    match(plan.rows, model)
    if is_own(model):
        raise PlanError(
            f"a {type(model).__name__} carries its factors in isoscale's ops and has no plain class to become",
            key="model", value=type(model).__name__, hint="save its state_dict; export is for models of your own class",
        )  # fmt: skip
    fold_hooks(model)
    if plan.sites:
        _fold_temperatures(model, plan, trace(model, example))
    return model


def _fold_temperatures(model: nn.Module, plan: Plan, seen: Trace) -> None:
    modules = {normalise(path): module for path, module in model.named_modules()}
    parameters = {normalise(name): parameter for name, parameter in model.named_parameters()}
    for site in plan.sites:
        here = [one for one in seen.attention if one.path == site.path or one.path.startswith(f"{site.path}.")]
        if not here or site.attr is None or site.multiplier is None:
            continue
        one = here[0]
        if one.fused or not one.queries:
            raise PlanError(
                f"the queries of {one.path} come from a projection that also makes keys or values, so its attention "
                "scale cannot be folded", key=one.path, hint="keep the attribute: save it beside the weights",
            )  # fmt: skip
        module = modules[site.path]
        was = float(site.reasons["multiplier"].partition(f"the model's {site.attr} ")[2].split(" ")[0])
        plain = _plain_scale(one.head_size, was)
        factor = one.scale / plain
        for name in one.queries:
            parameters[name].mul_(factor)
        setattr(module, site.attr, plain if math.isclose(was, plain, rel_tol=1e-4) else was)


def _plain_scale(head_size: int, shown: float) -> float:
    """The exact scale behind the six digits of a reason: 1 / sqrt(d) or 1 / d, else what is shown."""
    for exact in (head_size**-0.5, 1 / head_size):
        if math.isclose(exact, shown, rel_tol=1e-4):
            return exact
    return shown
