"""A trained model as a plain one again: every multiplier of the plan folded into weights, the logits unchanged.

What was moved into init and LR is in the weights already. Left are parametrizations, and attention scales that were set
on attributes: those go into the query projection (or the gain of the norm on the queries), and the attribute goes back
to what the class computes from its config, so that a reload from the config gives the same function.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from isoscale._base.errors import PlanError
from isoscale.planning.apply import fold_hooks
from isoscale.planning.groups import match
from isoscale.planning.names import normalise
from isoscale.planning.roles import is_own
from isoscale.planning.trace import trace

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
        _fold_temperatures(model, plan, example)
    return model


def _fold_temperatures(model: nn.Module, plan: Plan, example: object) -> None:
    modules = {normalise(path): module for path, module in model.named_modules()}
    parameters = {normalise(name): parameter for name, parameter in model.named_parameters()}
    before = trace(model, example).attention
    sites = [site for site in plan.sites if site.attr is not None and site.own is not None]
    homes = tuple(f"{site.path}." if site.path else "" for site in sites)
    moved = [index for index, one in enumerate(before) if f"{one.path}.".startswith(homes)]
    for one in (before[index] for index in moved):
        if one.fused or not one.queries:
            raise PlanError(
                f"the queries of {one.path} come from a projection that also makes keys or values, so its attention "
                "scale cannot be folded", key=one.path, hint="keep the attribute: save it beside the weights",
            )  # fmt: skip
    for site in sites:
        setattr(modules[site.path], str(site.attr), site.own)
    after = trace(model, example).attention
    for index in moved:
        for name in before[index].queries:
            parameters[name].mul_(before[index].scale / after[index].scale)
