"""Rules + a model (real or meta) + hyperparameters -> a plan. The one place where rules become numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from isoscale._base.errors import PlanError, did_you_mean
from isoscale.formats.recipes import PLAIN, Recipe, recipe_by_name
from isoscale.nn import Linear
from isoscale.nn.factors import Factors
from isoscale.planning.names import normalise
from isoscale.planning.plan import Plan
from isoscale.planning.roles import ParamInfo, depth_stack, infer
from isoscale.planning.rows import ParamRow
from isoscale.planning.sites import predictions, site_rows
from isoscale.rules import Scale, Table, Value, by_name
from isoscale.rules.monomial import hp, show_number
from isoscale.rules.table import HP_DEFAULTS


def _scale_of(model: nn.Module, said: Scale | None, stack: int) -> Scale:
    config = getattr(model, "config", None)
    read = {"width": getattr(config, "width", None), "depth": getattr(config, "depth", None) or stack or None}
    said = said or Scale()
    for name, value in read.items():
        told = getattr(said, name)
        if value is not None and told is not None and told != value:
            raise PlanError(
                f"target says {name} {told}, the model has {value}",
                key=f"target.{name}",
                value=told,
                hint="leave target out: it is read from the model",
            )
    return replace(said, **{name: value for name, value in read.items() if value is not None})


def _base_model(model: nn.Module, base: Scale | nn.Module) -> nn.Module:
    if isinstance(base, nn.Module):
        if type(base) is not type(model):
            raise PlanError(
                f"base is a {type(base).__name__}, the model a {type(model).__name__}",
                key="base",
                hint="build both from one class",
            )
        return base
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(config, "width"):
        raise PlanError(
            "a base Scale needs a model with .config.width; give base as a (meta) model instead",
            key="base",
            hint="with torch.device('meta'): base = Model(small_config)",
        )
    sizes = {name: getattr(base, name) for name in ("width", "depth") if getattr(base, name) is not None}
    with torch.device("meta"):
        smaller: nn.Module = type(model)(replace(config, **sizes))
    return smaller


def _base_fan_in(info: ParamInfo, base: Mapping[str, ParamInfo], stack: str, base_depth: int) -> int:
    name = info.name
    if info.in_stack and base_depth:
        index, _, rest = name.removeprefix(f"{stack}.").partition(".")
        name = f"{stack}.{min(int(index), base_depth - 1)}.{rest}"
    if name not in base:
        raise PlanError(f"the base model has no {name}", key=info.name, hint="build base and target from one class")
    return base[name].fan_in


def _check_unit(model: nn.Module, table: Table) -> None:
    flags = {getattr(module, "scaling", None) for module in model.modules()} - {None}
    if table.unit and flags != {"unit"}:
        raise PlanError(
            f"{table.name} needs a model made of unit-scaled ops",
            key="parametrisation",
            value=table.name,
            hint="DecoderConfig(scaling='unit'), or isoscale.nn modules",
        )
    if not table.unit and "unit" in flags:
        raise PlanError(
            f"the model's ops are unit-scaled, so {table.name} would apply factors twice", key="parametrisation",
            value=table.name, hint="DecoderConfig(scaling='plain'), or parametrisation u-mup",
        )  # fmt: skip


def _hps(said: Mapping[str, float] | None, table: Table) -> dict[str, float]:
    out = dict(HP_DEFAULTS)
    for name, value in (said or {}).items():
        if name not in out:
            raise PlanError(
                f"unknown hyperparameter {name!r}", key=f"hps.{name}", value=value, hint=did_you_mean(name, HP_DEFAULTS)
            )
        if not math.isfinite(value) or value < 0 or (value == 0 and name not in ("weight_decay", "beta1", "beta2")):
            raise PlanError(
                f"{name} must be positive and finite",
                key=f"hps.{name}",
                value=value,
                hint="for example 1.0" if table.unit else "for example 2**-8",
            )
        out[name] = float(value)
    return out


def _factors(
    module: nn.Module, info: ParamInfo, table: Table, hps: Mapping[str, float], sizes: Mapping[str, float],
    tokens: int | None, reasons: dict[str, str],
) -> Factors:  # fmt: skip
    rule = table.role(info.role)
    forward = rule.forward.evaluate(hps, sizes)
    reasons["forward"] = forward.reason
    own = getattr(module, "factors", None)
    if table.unit and own is not None and info.role not in ("gain", "bias"):
        told = own(tokens)
        if not math.isclose(told.forward, forward.number, rel_tol=1e-9):
            raise PlanError(
                f"{info.name}: the op's forward factor {told.forward:.6g} is not the rule's {forward.number:.6g}",
                key=info.name, hint="this layer has a role that its op was not made for",
            )  # fmt: skip
        reasons["input_grad"] = f"{show_number(told.input_grad)}, owned by {type(module).__name__}"
        reasons["weight_grad"] = (
            "1 / sqrt(tokens in the batch), owned by the op" if told.weight_grad is None
            else f"{show_number(told.weight_grad)}, owned by {type(module).__name__} (batch_tokens {tokens})"
        )  # fmt: skip
        return Factors(told.forward, told.input_grad, told.weight_grad)
    back = rule.input_grad.evaluate(hps, sizes) if rule.input_grad is not None else forward
    return Factors(forward.number, back.number, forward.number)


def _row(
    info: ParamInfo, module: nn.Module, table: Table, hps: Mapping[str, float], sizes: Mapping[str, float],
    recipe: Recipe, target: Scale,
) -> ParamRow:  # fmt: skip
    rule = table.resolved(info.role, info.in_stack)
    reasons: dict[str, str] = {}

    def number(quantity: str, value: Value) -> float:
        reasons[quantity] = value.reason
        return value.number

    factors = _factors(module, info, table, hps, sizes, target.batch_tokens, reasons)
    if rule.init_kind == "normal":
        init_std, init_value = number("init_std", rule.init.evaluate(hps, sizes)), None
    else:
        init_std, init_value = 0.0, 1.0 if rule.init_kind == "one" else 0.0
        reasons["init_std"] = f"constant {init_value:g}"
    matrix = len(info.shape) > 1 and info.role not in ("embedding", "gain", "bias")
    formats = recipe.formats(info.module_path) if matrix else PLAIN
    if matrix:
        reasons["formats"] = f"{formats} = recipe {recipe.name}"
    reasons["betas"] = f"{show_number(hps['beta1'])}, {show_number(hps['beta2'])} = as given"
    return ParamRow(
        name=info.name, role=info.role, shape=info.shape, fan_in=info.fan_in, fan_out=info.fan_out, factors=factors,
        init_std=init_std, init_value=init_value, lr=number("lr", rule.lr.evaluate(hps, sizes)),
        eps=number("eps", rule.eps.evaluate(hps, sizes)),
        weight_decay=number("weight_decay", rule.weight_decay.evaluate(hps, sizes)),
        betas=(hps["beta1"], hps["beta2"]), formats=formats, reasons=reasons,
    )  # fmt: skip


def plan(
    model: nn.Module,
    parametrisation: str | Table = "u-mup",
    base: Scale | nn.Module | None = None,
    target: Scale | None = None,
    hps: Mapping[str, float] | None = None,
    *,
    roles: Mapping[str, str] | None = None,
    recipe: str | Recipe = "none",
    decay: Literal["rule", "independent", "coupled"] = "rule",
    embedding_lr: Literal["rule", "constant"] = "rule",
    optimizer: str = "adamw",
    seq_len: int | None = None,
) -> Plan:
    """What every tensor of `model` gets, and why.

    Args:
        model: the model to train; the meta device is fine.
        parametrisation: a name (`sp`, `sp-lecun`, `mup`, `u-mup`) or a table of your own.
        base: where the hyperparameters were tuned: a Scale (isoscale's models) or a model. Only rules with ratios
            need it.
        target: extra sizes that cannot be read from the model (`batch_tokens`, `tokens`); what can be read is checked.
        hps: hyperparameters in base units; what is left out has its default.
        roles: pattern -> role, for parameters that cannot be inferred.
        recipe: low-precision recipe whose formats go into the rows.
        decay: `independent` of the LR, `coupled` as in torch, or as the parametrisation's rule says.
        embedding_lr: `constant` drops the size dependence of the embedding's LR (an ablation of u-muP).
        optimizer: `adamw`; other families have their own tables.
        seq_len: sequence length, tokens; with it the expected scales of attention outputs and of the residual stream
            take into account that positions are not independent (`planning/expected.py`).

    Raises:
        PlanError: names, sizes, roles or factors that do not fit; each says which.
    """
    table = by_name(parametrisation) if isinstance(parametrisation, str) else parametrisation
    recipe = recipe_by_name(recipe) if isinstance(recipe, str) else recipe
    if optimizer != table.optimizer:
        raise PlanError(
            f"{table.name} has no rules for the optimiser {optimizer!r}",
            key="optimizer",
            value=optimizer,
            hint=f"optimizer={table.optimizer!r}",
        )
    if decay != "rule":
        table = replace(table, independent_decay=decay == "independent")
    if embedding_lr == "constant":
        table = table.with_role("embedding", lr=hp("lr") * hp("lr_embedding"))
    _check_unit(model, table)
    values = _hps(hps, table)
    infos = infer(model, roles)
    stack, stacked = depth_stack(model)
    scale = _scale_of(model, target, stacked)
    if table.needs_base and base is None:
        raise PlanError(
            f"{table.name} needs base=: its rules are ratios to where the HPs were tuned",
            key="base",
            hint="base=iso.Scale(width=64)",
        )
    base_infos: Mapping[str, ParamInfo] = infos
    base_scale, base_depth, base_head = None, stacked, None
    if base is not None and table.needs_base:
        small = _base_model(model, base)
        base_infos, (_, base_depth) = infer(small, roles), depth_stack(small)
        base_scale = _scale_of(small, base if isinstance(base, Scale) else None, base_depth)
        base_head = getattr(getattr(small, "config", None), "head_size", None)
    modules = {normalise(path): module for path, module in model.named_modules()}
    head = getattr(getattr(model, "config", None), "head_size", None)
    shared: dict[str, float] = {}
    if head:
        shared = {"head_size": head, "head_size_ratio": head / (base_head or head)}
    rows = []
    for info in infos.values():
        ratio = info.fan_in / _base_fan_in(info, base_infos, stack, base_depth)
        sizes = {**shared, "fan_in": info.fan_in, "fan_out": info.fan_out, "fan_in_ratio": ratio,
                 "stack_depth": scale.depth or stacked or 1}  # fmt: skip
        rows.append(_row(info, modules[info.module_path], table, values, sizes, recipe, scale))
    last = next((row for row in rows if row.role == "readout"), None)
    width = scale.width or (last.fan_in if last else 1)
    base_width = (base_scale.width if base_scale else None) or width
    site_sizes = {**shared, "fan_in": width, "fan_in_ratio": width / base_width}
    linear = {path for path, module in modules.items() if isinstance(module, (nn.Linear, Linear))}
    predicted = predictions(model, values, stack, seq_len) if table.unit and seq_len else {}
    sites = site_rows(model, table, values, site_sizes, scale.depth or stacked or 1, recipe, linear, predicted)
    return Plan(table.name, tuple(rows), sites, values, base_scale, scale, recipe.name)
