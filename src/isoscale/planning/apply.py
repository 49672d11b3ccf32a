"""Rows onto a real model: initial weights and site multipliers.

Each tensor is drawn from its own stream, named by (seed, parameter), in fp32 on the CPU. That costs a copy at start-up
and buys the same bits on any device, mesh and order of construction.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from isoscale._base.errors import PlanError
from isoscale._base.rng import stream
from isoscale.planning.groups import match
from isoscale.planning.names import normalise
from isoscale.planning.rows import ParamRow, SiteRow


def _initial(row: ParamRow, seed: int) -> torch.Tensor:
    if row.init_value is not None:
        return torch.full(row.shape, row.init_value)
    generator = torch.Generator().manual_seed(stream(seed, "init", row.name))
    return torch.randn(row.shape, generator=generator).mul_(row.init_std)


@torch.no_grad()
def apply_plan(
    rows: Sequence[ParamRow], sites: Sequence[SiteRow], model: nn.Module, *, seed: int, init: bool
) -> nn.Module:
    """See `Plan.apply`."""
    pairs = match(rows, model)
    modules = {normalise(path): module for path, module in model.named_modules()}
    if "module" in modules and not all(site.path in modules for site in sites):  # a DDP-wrapped model
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
    if not init:
        return model
    for row, parameter in pairs:
        if parameter.is_meta:
            raise PlanError(f"{row.name} is on the meta device", key=row.name, hint="model.to_empty(device=...) first")
        value = _initial(row, seed).to(parameter.dtype)
        if isinstance(parameter, DTensor):
            parameter.copy_(distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements))
        else:
            parameter.copy_(value)
    return model
