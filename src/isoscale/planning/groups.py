"""Optimiser groups: rows of equal settings share one, so that fused AdamW sees a handful, not one a tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from isoscale._base.errors import PlanError
from isoscale.planning.names import normalise
from isoscale.planning.rows import ParamRow
from isoscale.rules import family
from isoscale.rules.table import scaled_beta

if TYPE_CHECKING:
    from isoscale.planning.plan import Plan


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
        untied = "; to_empty() and load_state_dict(assign=True) untie shared weights: tie them again"
        raise PlanError(
            "the model is not the one the plan was made for",
            key="plan", value={"only in the plan": missing[:5], "only in the model": extra[:5]},
            hint="make the plan from this model: iso.plan(model, ...)" + ("" if missing else untied),
        )  # fmt: skip
    for row in rows:
        if tuple(raw[row.name].shape) != row.shape:
            raise PlanError(
                f"{row.name} has another shape than in the plan", key=row.name, value=tuple(raw[row.name].shape),
                hint=f"the plan says {row.shape}: make the plan from this model",
            )  # fmt: skip
    return [(row, raw[row.name]) for row in rows]


def _settings(row: ParamRow, named: bool) -> dict[str, Any]:
    """What the optimiser of a row takes, in its own words; `named`: with the optimiser's name among it."""
    all_of_them = {"weight_decay": row.weight_decay, "betas": row.betas, "eps": row.eps, "momentum": row.betas[0],
                   "beta": row.betas[1], "sigma": row.sigma, "decay": row.weight_decay}  # fmt: skip
    out = {"lr": row.lr, **{key: all_of_them[key] for key in family(row.optimizer).fields}}
    return {"optimizer": row.optimizer, **out} if named else out


def _named(rows: Sequence[ParamRow]) -> bool:
    """Whether one optimiser object trains parameters of two kinds, so that groups have to say which is theirs."""
    return any(family(row.optimizer).whole for row in rows)


def param_groups(rows: Sequence[ParamRow], model: nn.Module, part: str | None = None) -> list[dict[str, Any]]:
    """Groups of equal settings, in order of first use; frozen parameters are left out. See `Plan.param_groups`."""
    buckets: dict[tuple[object, ...], dict[str, Any]] = {}
    for row, parameter in match(rows, model):
        if not parameter.requires_grad or part not in (None, row.optimizer):
            continue
        settings = _settings(row, _named(rows))
        key = (row.optimizer, *settings.values())
        buckets.setdefault(key, {"params": [], **settings})["params"].append(parameter)
    return list(buckets.values())


def scaled_groups(
    plan: Plan, model: nn.Module, groups: Sequence[Mapping[str, Any]], part: str | None
) -> list[dict[str, Any]]:
    """The user's groups with each value scaled by its rows' factors. See `Plan.param_groups`."""
    if isinstance(groups, Mapping) or not all(isinstance(group, Mapping) and "params" in group for group in groups):
        raise PlanError("groups is a list of dicts with params, as optimisers take them", key="groups",
                        hint='[{"params": [...], "lr": 1e-3, "weight_decay": 0.1}]')  # fmt: skip
    pairs = match(plan.rows, model)
    rows = {parameter: row for row, parameter in pairs}
    out: list[dict[str, Any]] = []
    seen: set[nn.Parameter] = set()
    for group in groups:
        split: dict[object, dict[str, Any]] = {}
        members: list[Any] = [group["params"]] if isinstance(group["params"], torch.Tensor) else list(group["params"])
        for member in members:
            parameter = member[1] if isinstance(member, tuple) else member  # groups of named parameters
            if parameter not in rows:
                shape = tuple(getattr(parameter, "shape", ()))
                raise PlanError("a group holds a parameter that the plan does not know", key="groups", value=shape,
                                hint="pass the model itself, not a copy")  # fmt: skip
            if parameter in seen:
                raise PlanError(f"{rows[parameter].name} is in two groups", key=rows[parameter].name)
            seen.add(parameter)
            if part not in (None, rows[parameter].optimizer):
                continue
            if _named(plan.rows):
                _check_name(group, rows[parameter])
            scaled = _scaled(group, rows[parameter], plan)
            key = tuple(repr(scaled.get(name)) for name in _SCALED)
            split.setdefault(key, {**scaled, "params": []})["params"].append(parameter)
        out += split.values()
    left = [row.name for row, parameter in pairs if parameter.requires_grad and parameter not in seen]
    if left:
        raise PlanError(f"the groups leave out {', '.join(left[:5])}", key="groups",
                        hint="add them to a group, or freeze them (requires_grad_(False))")  # fmt: skip
    return out


_SCALED = ("lr", "eps", "weight_decay", "decay", "betas", "beta", "momentum")


def _check_name(group: Mapping[str, Any], row: ParamRow) -> None:
    told = group.get("optimizer")
    if told != row.optimizer:
        said = "does not say which optimiser it is for" if told is None else f"is for {told}"
        raise PlanError(
            f"the group of {row.name} {said}; the plan trains it with {row.optimizer}, whose LR is another unit",
            key="groups.optimizer", value=told, hint='one group with "optimizer": "lmd" for matrices, one with '
            '"optimizer": "adamw" for the rest; or plan.param_groups(model) without groups',
        )  # fmt: skip


def _scaled(group: Mapping[str, Any], row: ParamRow, plan: Plan) -> dict[str, Any]:
    out, fields = dict(group), family(row.optimizer).fields
    for key, factor in (("lr", row.relative.lr), ("weight_decay", row.relative.weight_decay),
                        ("decay", row.relative.weight_decay), ("eps", row.relative.eps)):  # fmt: skip
        if factor == 1.0 or (key != "lr" and key not in fields):
            continue
        if key == "eps" and key not in out:
            out[key] = row.eps  # few write it into a group
        elif key not in out and not (key in ("weight_decay", "decay") and plan.hps["weight_decay"] == 0):
            raise _absent(key, row)
        elif isinstance(out.get(key), (int, float)):
            out[key] = out[key] * factor
    if any(name.startswith(("beta1", "beta2")) for name in plan.modules):
        raise PlanError("betas differ by module, and groups of your own cannot say so", key="modules",
                        hint="plan.param_groups(model) without groups")  # fmt: skip
    if plan.beta_ratio == 1.0:
        return out
    moving = row.betas != (plan.hps["beta1"], plan.hps["beta2"])
    for key in ("betas", "beta", "momentum"):
        if key not in fields or not moving:
            continue
        if key not in out:
            raise _absent(key, row)
        told = out[key] if key == "betas" else (out[key],)
        moved = tuple(scaled_beta(beta, plan.beta_ratio, plan.options["betas"]) for beta in told)
        out[key] = moved if key == "betas" else moved[0]
    return out


def _absent(key: str, row: ParamRow) -> PlanError:
    return PlanError(
        f"the group of {row.name} has no {key}, and an optimiser's default cannot be scaled per tensor",
        key=f"groups.{key}",
        hint=f"write {key} into every group, as tuned at the base; or plan.param_groups(model) without groups",
    )  # fmt: skip


def update_groups(
    rows: Sequence[ParamRow], model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any = None
) -> None:
    """See `Plan.update`."""
    found = {parameter: row for row, parameter in match(rows, model)}
    for group in optimizer.param_groups:
        wanted = [_settings(found[parameter], _named(rows)) for parameter in group["params"] if parameter in found]
        if not wanted:
            raise PlanError("the optimiser trains other parameters than this model's", key="optimizer",
                            hint="pass the model that the optimiser was made for")  # fmt: skip
        if any(settings != wanted[0] for settings in wanted):
            raise PlanError("an optimiser group mixes parameters whose settings differ", key="optimizer",
                            hint="make the groups with plan.param_groups(model), not with your own")  # fmt: skip
        share = group["lr"] / group["initial_lr"] if group.get("initial_lr") else 1.0  # where the schedule stands
        for key, value in wanted[0].items():
            new = value * share if key == "lr" else value
            if isinstance(group.get(key), torch.Tensor):  # a compiled step holds its LR in a tensor
                group[key].fill_(new)
            else:
                group[key] = new
        if "initial_lr" in group:
            group["initial_lr"] = wanted[0]["lr"]
    if scheduler is not None:
        scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
