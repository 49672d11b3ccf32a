"""Optimiser groups: rows of equal settings share one, so that fused AdamW sees a handful, not one a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from isoscale._base.errors import PlanError
from isoscale.planning.names import normalise
from isoscale.planning.rows import ParamRow


def match(rows: Sequence[ParamRow], model: nn.Module) -> list[tuple[ParamRow, nn.Parameter]]:
    """Rows and the model's parameters, in the order of the rows.

    Raises:
        PlanError: one side has a name or shape that the other has not.
    """
    raw = {normalise(name): parameter for name, parameter in model.named_parameters()}
    names = {row.name for row in rows}
    if not names & raw.keys():  # a DDP-wrapped model
        raw = {normalise(name, ddp=True): parameter for name, parameter in raw.items()}
    missing, extra = sorted(names - raw.keys()), sorted(raw.keys() - names)
    if missing or extra:
        raise PlanError(
            "the model is not the one the plan was made for",
            key="plan", value={"only in the plan": missing[:5], "only in the model": extra[:5]},
            hint="make the plan from this model: iso.plan(model, ...)",
        )  # fmt: skip
    for row in rows:
        if tuple(raw[row.name].shape) != row.shape:
            raise PlanError(
                f"{row.name} has another shape than in the plan", key=row.name, value=tuple(raw[row.name].shape),
                hint=f"the plan says {row.shape}: make the plan from this model",
            )  # fmt: skip
    return [(row, raw[row.name]) for row in rows]


def param_groups(rows: Sequence[ParamRow], model: nn.Module) -> list[dict[str, Any]]:
    """Groups of equal (lr, eps, weight decay, betas), in order of first use; frozen parameters are left out."""
    buckets: dict[tuple[object, ...], dict[str, Any]] = {}
    for row, parameter in match(rows, model):
        if not parameter.requires_grad:
            continue
        key = (row.lr, row.eps, row.weight_decay, row.betas)
        group = buckets.setdefault(
            key, {"params": [], "lr": row.lr, "eps": row.eps, "weight_decay": row.weight_decay, "betas": row.betas}
        )
        group["params"].append(parameter)
    return list(buckets.values())
