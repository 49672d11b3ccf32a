"""Rows onto a real model: initial weights, site multipliers, hooks for multipliers that nothing else could take.

isoscale's models are drawn: each tensor from its own stream, named by (seed, parameter), in fp32 on the CPU. That costs
a copy at start-up and buys the same bits on any device, mesh and order of construction. A foreign model keeps the
values it was built with, scaled to the row's standard deviation where they are not there already: applying twice
changes nothing, and at base = target nothing changes at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from isoscale._base.errors import PlanError
from isoscale._base.rng import stream
from isoscale._base.sharded import is_sharded
from isoscale.planning.groups import match
from isoscale.planning.inits import config_of, noise, read
from isoscale.planning.names import normalise
from isoscale.planning.rows import ParamRow, SiteRow


class Multiplier(nn.Module):
    """A parametrization `w -> factor w`: the forward sees the product, the optimiser the weight."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.factor


def _initial(row: ParamRow, seed: int) -> torch.Tensor:
    if row.init_value is not None:
        return torch.full(row.shape, row.init_value)
    generator = torch.Generator().manual_seed(stream(seed, "init", row.name))
    return torch.randn(row.shape, generator=generator).mul_(row.init_std)


def _put(parameter: nn.Parameter, value: torch.Tensor) -> None:
    if is_sharded(parameter):
        from torch.distributed.tensor import distribute_tensor

        parameter.copy_(distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements))
    else:
        parameter.copy_(value)


def _factor(row: ParamRow, parameter: nn.Parameter, config: Any) -> float:
    """What the model's own values have to be multiplied by; 1 where they are there up to sampling noise.

    Raises:
        PlanError: values that no fresh model of this kind has: trained ones, NaN, or what `to_empty` leaves.
    """
    found = read(parameter, row.fan_in, config)
    if row.init_value is not None:
        if found.constant is None or (found.constant == 0) != (row.init_value == 0):
            raise _not_fresh(row, "is no constant" if found.constant is None else f"is {found.constant:g} everywhere")
        return row.init_value / found.constant if found.constant else 1.0
    if row.init_std == 0:
        return 1.0
    if not found.std:
        raise _not_fresh(row, "holds no random values")
    if row.own_std is None:  # planned on the meta device: what the model starts at was assumed
        near = abs(found.std / row.init_std - 1) <= noise(parameter.numel())
        return 1.0 if near else row.init_std / found.std
    slack = max(0.03, noise(parameter.numel()))
    from_row, from_own = abs(found.std / row.init_std - 1), abs(found.std / row.own_std - 1)
    if from_row <= slack and from_own > from_row:
        return 1.0
    if from_own > slack:
        raise _not_fresh(row, f"has the standard deviation {found.std:g}, not the model's own {row.own_std:g}")
    return row.init_std / row.own_std


def _not_fresh(row: ParamRow, what: str) -> PlanError:
    return PlanError(
        f"{row.name} {what}: these are not the values that the model starts with, and scaling would destroy them",
        key=row.name, hint="plan and apply before loading or training; apply(model, init=False) for trained weights, "
        "draw=True after to_empty",
    )  # fmt: skip


@torch.no_grad()
def apply_plan(
    rows: Sequence[ParamRow], sites: Sequence[SiteRow], model: nn.Module, *, seed: int, init: bool, draw: bool
) -> nn.Module:
    """See `Plan.apply`."""
    pairs = match(rows, model)
    modules = {normalise(path): module for path, module in model.named_modules()}
    wanted = {row.name.rpartition(".")[0] for row, _ in pairs} | {site.path for site in sites}
    if "module" in modules and not wanted <= modules.keys():  # a DDP-wrapped model
        modules = {normalise(path, ddp=True): module for path, module in modules.items()}
    for site in sites:
        if site.attr is not None and site.multiplier is not None:
            if site.path not in modules or not hasattr(modules[site.path], site.attr):
                raise PlanError(
                    f"the model has no site {site.name} to set",
                    key=site.name,
                    hint="make the plan from this model: iso.plan(model, ...)",
                )
            setattr(modules[site.path], site.attr, site.multiplier)
    config = config_of(model)
    own = {}
    for row, parameter in pairs if init else ():
        if parameter.is_meta:
            raise PlanError(f"{row.name} is on the meta device", key=row.name, hint="model.to_empty(device=...) first")
        if row.own_init and not draw and parameter.requires_grad:  # what is frozen was trained elsewhere
            own[row.name] = _factor(row, parameter, config)  # all are looked at before one is changed
    for row, parameter in pairs if init else ():
        if row.own_init and not draw:
            if own.get(row.name, 1.0) != 1.0:
                parameter.mul_(own[row.name])
        elif row.own_init and row.init_value is None and row.init_std == 0:
            raise PlanError(
                f"{row.name} starts at values that only the model itself knows", key=row.name,
                hint="build the model for real and apply without draw=True",
            )  # fmt: skip
        else:
            _put(parameter, _initial(row, seed).to(parameter.dtype))
    for row, parameter in pairs:
        if row.hook != 1:
            _hook(modules, row, parameter)
    return model


def _hook(modules: dict[str, nn.Module], row: ParamRow, parameter: nn.Parameter) -> None:
    path, _, local = row.name.rpartition(".")
    module = modules[path]
    if parametrize.is_parametrized(module, local):
        for one in module.parametrizations[local]:  # type: ignore[index]
            if isinstance(one, Multiplier):
                one.factor = row.hook
                return
    if is_sharded(parameter):  # FSDP2 holds the module and name of each weight, which a hook would move
        raise PlanError(
            f"{row.name} is sharded already and needs a hook for its multiplier {row.hook:g}", key=row.name,
            hint="plan.apply(model, init=False) before fully_shard, or iso.plan(..., absorb=True)",
        )  # fmt: skip
    parametrize.register_parametrization(module, local, Multiplier(row.hook))


def fold_hooks(model: nn.Module) -> None:
    """Turn every `Multiplier` into plain weights, in place."""
    for module in list(model.modules()):
        if not parametrize.is_parametrized(module):
            continue
        for local, chain in list(module.parametrizations.items()):  # type: ignore[union-attr,operator]
            if all(isinstance(one, Multiplier) for one in chain):
                parametrize.remove_parametrizations(module, local, leave_parametrized=True)
