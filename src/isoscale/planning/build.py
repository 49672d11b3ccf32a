"""Rules + a model (real or meta) + hyperparameters -> a plan. The one place where rules become numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from math import prod
from typing import Any, Literal

import torch
from torch import nn

from isoscale._base.errors import PlanError
from isoscale.formats.recipes import Recipe, recipe_by_name
from isoscale.nn import Linear
from isoscale.planning.arguments import check_arguments
from isoscale.planning.clip import clip_norm
from isoscale.planning.foreign import foreign_plan
from isoscale.planning.modules import with_factors
from isoscale.planning.names import normalise
from isoscale.planning.notes import range_notes
from isoscale.planning.numbers import Setting, all_hps, check_rate, make_row, rule_of
from isoscale.planning.plan import Plan
from isoscale.planning.roles import ParamInfo, depth_stack, infer, is_own
from isoscale.planning.rows import ParamRow
from isoscale.planning.sites import predictions, site_rows
from isoscale.planning.sizes import ratios, scale_of, shared_sizes, sizes_of
from isoscale.rules import AXES, Options, Scale, Table, by_name, family
from isoscale.rules.options import Betas, Duration, FinalNormEps


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


def _base_info(info: ParamInfo, base: Mapping[str, ParamInfo], stack: str, base_depth: int) -> ParamInfo:
    name = info.name
    if info.in_stack and base_depth:
        index, _, rest = name.removeprefix(f"{stack}.").partition(".")
        name = f"{stack}.{min(int(index), base_depth - 1)}.{rest}"
    if name not in base:
        raise PlanError(f"the base model has no {name}", key=info.name, hint="build base and target from one class")
    return base[name]


def _check_unit(model: nn.Module, table: Table) -> None:
    flags = {getattr(module, "scaling", None) for module in model.modules()}
    if table.unit and (not is_own(model) or "plain" in flags):
        raise PlanError(
            f"{table.name} needs a model made of unit-scaled ops",
            key="parametrisation",
            value=table.name,
            hint="DecoderConfig(scaling='unit'), or isoscale.nn modules; complete-d for any other model",
        )
    if not table.unit and "unit" in flags:
        raise PlanError(
            f"the model's ops are unit-scaled, so {table.name} would apply factors twice", key="parametrisation",
            value=table.name, hint="DecoderConfig(scaling='plain'), or parametrisation u-mup",
        )  # fmt: skip


def _switched(table: Table, decay: str, embedding_lr: str) -> Table:
    """The table, and that of the rest, with the two switches of `plan` that are no `Options`."""
    if decay != "rule":
        table = replace(table, independent_decay=decay == "independent")
    if embedding_lr == "constant" and "embedding" in table.roles:
        rule = table.role("embedding")
        plain_decay = replace(rule.weight_decay, sizes={})
        table = table.with_role("embedding", lr=replace(rule.lr, sizes={}), weight_decay=plain_decay)
    return table if table.rest is None else replace(table, rest=_switched(table.rest, decay, embedding_lr))


def _parameters(infos: Mapping[str, ParamInfo]) -> int:
    return sum(prod(info.shape) for info in infos.values())


def plan(
    model: nn.Module,
    parametrisation: str | Table = "u-mup",
    base: Scale | nn.Module | None = None,
    target: Scale | None = None,
    hps: Mapping[str, float] | None = None,
    *,
    base_run: Scale | None = None,
    roles: Mapping[str, str] | None = None,
    optimizer: str = "adamw",
    alpha: float = 1.0,
    duration_exponent: float = 0.5,
    duration: Duration = "iso-horizon",
    tau_exponent: float = 0.0,
    betas: Betas = "linear",
    final_norm_eps: FinalNormEps = "printed",
    axes: tuple[str, ...] = AXES,
    constant: tuple[str, ...] = (),
    recipe: str | Recipe = "none",
    decay: Literal["rule", "independent", "coupled"] = "rule",
    embedding_lr: Literal["rule", "constant"] = "rule",
    clip: float | None = None,
    absorb: bool = True,
    example: object = None,
    seq_len: int | None = None,
    modules: Mapping[str, float] | None = None,
) -> Plan:
    """What every tensor of `model` gets, and why.

    Args:
        model: the model to train, any nn.Module; the meta device is fine.
        parametrisation: a name (`isoscale.rules.names()`) or a table of your own.
        base: where the hyperparameters were tuned: a Scale (isoscale's and Hugging Face models) or a model of the
            same class, real or meta.
        base_run: batch_tokens and tokens of the base, where `base` is a model.
        target: sizes that cannot be read from the model (`batch_tokens`, `tokens`); what can be read is checked.
        hps: hyperparameters in base units; what is left out has its default.
        roles: pattern -> role, for parameters that cannot be inferred; they win.
        optimizer: family, see `isoscale.rules.FAMILIES`.
        alpha: depth exponent, in [1/2, 1].
        duration_exponent: the LR falls as m_D^-exponent.
        duration: `iso-horizon`, `tau-constant` or `none`. This and the following are told in `isoscale.rules.Options`.
        tau_exponent: of the decay's share of the run against tokens per parameter.
        betas: `linear`, `power` or `constant`.
        final_norm_eps: `printed` or `derived`.
        axes: axes whose rules are on.
        constant: quantities whose rules are off.
        recipe: low-precision recipe whose formats go into the rows; its BF16 finish and its norm go into the plan.
        decay: `independent` of the LR, `coupled` as in torch, or as the parametrisation's rule says.
        embedding_lr: `constant` drops the size dependence of the embedding's LR (an ablation of u-muP).
        clip: largest gradient norm at the base; the plan says what it is here (`Plan.clip`).
        absorb: put forward multipliers into init and LR where that is exact; else all are applied by hooks. Foreign
            models only.
        example: input of the model's forward (tensor, tuple of arguments or dict), where it cannot be guessed.
        seq_len: sequence length, tokens; with it the expected scales of attention outputs and of the residual stream
            take into account that positions are not independent (`planning/expected.py`).
        modules: factors by module type and depth, `{"lr/head": 0.5, "lr@0.25": 2.0}`; see `planning/modules.py`.

    Raises:
        PlanError: names, sizes, roles or factors that do not fit; each says which.
    """
    check_arguments(model, parametrisation, base, target, optimizer, roles, clip)
    options = Options(alpha, duration_exponent, duration, tau_exponent, betas, final_norm_eps, axes, constant)
    table = by_name(parametrisation, optimizer, options) if isinstance(parametrisation, str) else parametrisation
    recipe = recipe_by_name(recipe) if isinstance(recipe, str) else recipe
    if optimizer != table.optimizer:
        raise PlanError(
            f"{table.name} has no rules for the optimiser {optimizer!r}",
            key="optimizer",
            value=optimizer,
            hint=f"optimizer={table.optimizer!r}",
        )
    table = _switched(table, decay, embedding_lr)
    _check_unit(model, table)
    if table.needs_base and base is None:
        raise PlanError(
            f"{table.name} needs base=: its rules are ratios to where the HPs were tuned",
            key="base",
            hint="base=iso.Scale(width=64)",
        )
    values = all_hps(hps, table)
    batch_tokens = target.batch_tokens if target else None
    casts = recipe.on(normalise(path) for path, _ in model.named_modules())
    setting = Setting(table, values, casts, batch_tokens, 1.0)
    if not is_own(model):
        made = foreign_plan(model, base, base_run, target, setting, options, said=dict(hps or {}), roles=roles,
                            clip=clip, absorb=absorb, example=example)  # fmt: skip
        return _split(made, modules, table)
    infos = infer(model, roles)
    stack, stacked = depth_stack(model)
    scale = scale_of(model, target, stacked)
    base_infos: Mapping[str, ParamInfo] = infos
    base_scale, base_depth, base_head = None, stacked, None
    if base is not None and table.needs_base:
        small = _base_model(model, base)
        base_infos, (_, base_depth) = infer(small, roles), depth_stack(small)
        base_scale = scale_of(small, base if isinstance(base, Scale) else base_run, base_depth)
        base_head = getattr(getattr(small, "config", None), "head_size", None)
    grown = _parameters(infos) / _parameters(base_infos)
    found = ratios(base_scale or replace(scale), scale, grown, options)
    setting = replace(setting, beta_ratio=found.of_a_run)
    owners = {normalise(path): module for path, module in model.named_modules()}
    head = getattr(getattr(model, "config", None), "head_size", None)
    shared = shared_sizes(found, scale.depth or stacked or 1, head, base_head if "width" in axes else None)
    rows: list[ParamRow] = []
    sized = []
    for info in infos.values():
        sizes = sizes_of(info, _base_info(info, base_infos, stack, base_depth), shared, options)
        rule, owner = rule_of(info, table)
        rows.append(make_row(info, owners[info.module_path], setting, rule, owner, sizes))
        sized.append((info, sizes))
    last = next((row for row in rows if row.role == "readout"), None)
    width = scale.width or (last.fan_in if last else 1)
    site_sizes = {**shared, "fan_in": width, "fan_in_ratio": found.width, "fan_out_ratio": found.width}
    linear = {path for path, module in owners.items() if isinstance(module, (nn.Linear, Linear))}
    share = table.tau_share.evaluate(values, site_sizes).number if table.unit else 0.0
    predicted = predictions(model, values, stack, seq_len, share) if table.unit and seq_len else {}
    sites = site_rows(model, table, values, site_sizes, scale.depth or stacked or 1, casts, linear, predicted,
                      tied=last is None)  # fmt: skip
    made = Plan(
        table.name, tuple(rows), sites, values, base_scale, scale, recipe.name, optimizer=optimizer,
        options=asdict(options), beta_ratio=found.of_a_run,
        clip=clip_norm(clip, table, sized, _parameters(base_infos))[0] if clip else None,
        notes=range_notes(found, table, values), finish=recipe.finish, norm=recipe.norm,
    )  # fmt: skip
    return _split(made, modules, table)


def _split(plan: Plan, modules: Mapping[str, float] | None, table: Table) -> Plan:
    """The plan with factors by module on it."""
    if not modules:
        return plan
    rows, sites = with_factors(modules, plan.rows, plan.sites, table.independent_decay)
    for row in rows:
        check_rate(row.name, family(row.optimizer), row.lr, plan.hps["lr"], table.unit)
    return replace(plan, rows=rows, sites=sites, modules=modules)
