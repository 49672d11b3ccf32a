"""One rule and one parameter -> one row: every monomial becomes a number with its reason."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from isoscale._base.errors import PlanError, did_you_mean
from isoscale.formats.recipes import PLAIN, Assignment
from isoscale.nn.factors import Factors
from isoscale.planning.roles import ParamInfo
from isoscale.planning.rows import ParamRow, Relative
from isoscale.rules import Family, RoleRule, Table, Value, family
from isoscale.rules.monomial import hp, show_number
from isoscale.rules.table import HP_DEFAULTS

_HABITS = {"learning_rate": "the name here is lr", "wd": "the name here is weight_decay",
           "betas": "two names here: beta1 and beta2", "momentum": "the name here is beta1",
           "decay": "the name here is weight_decay", "lambda": "the name here is weight_decay"}  # fmt: skip
NOT_MATRICES = ("embedding", "gain", "bias", "vector", "finite", "final_norm")


@dataclass(frozen=True)
class Setting:
    """What all rows of a plan share.

    Args:
        table: the rules.
        hps: every hyperparameter, in base units.
        casts: the low-precision recipe on this model.
        batch_tokens: of one step, where known.
        beta_ratio: m_B / m_D.
    """

    table: Table
    hps: Mapping[str, float]
    casts: Assignment
    batch_tokens: int | None
    beta_ratio: float


def all_hps(said: Mapping[str, float] | None, table: Table) -> dict[str, float]:
    """The user's hyperparameters over the defaults, those of the table's optimiser before the common ones.

    Raises:
        PlanError: an unknown name, or a value that is not positive and finite.
    """
    out = {**HP_DEFAULTS, **family(table.optimizer).defaults(table.unit)}
    if said is not None and not isinstance(said, Mapping):
        raise PlanError("hps is a dict of numbers", key="hps", value=said, hint='hps={"lr": 1e-3, "weight_decay": 0.1}')
    for name, value in (said or {}).items():
        if name not in out:
            hint = _HABITS.get(name) or did_you_mean(name, HP_DEFAULTS)
            raise PlanError(f"unknown hyperparameter {name!r}", key=f"hps.{name}", value=value, hint=hint)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e30:
            raise PlanError(f"{name} must be a number", key=f"hps.{name}", value=value, hint=f'hps={{"{name}": 0.1}}')
        beta, free = name in ("beta1", "beta2"), name == "weight_decay"
        if beta and not 0 <= value < 1:
            raise PlanError(f"{name} must lie in [0, 1)", key=f"hps.{name}", value=value, hint="for example 0.9")
        if name == "sigma" and value > 1:
            raise PlanError("sigma is a share of each weight, at most 1", key="hps.sigma", value=value,
                            hint="for example 0.05")  # fmt: skip
        if not math.isfinite(value) or value < 0 or (value == 0 and not (beta or free)):
            raise PlanError(
                f"{name} must be {'zero or more' if free else 'positive'} and finite", key=f"hps.{name}", value=value,
                hint="for example 0.1" if free else "for example 1.0" if table.unit else "for example 2**-8",
            )  # fmt: skip
        out[name] = float(value)
    return out


def _factors(
    module: nn.Module, info: ParamInfo, setting: Setting, rule: RoleRule, sizes: Mapping[str, float],
    reasons: dict[str, str],
) -> Factors:  # fmt: skip
    forward = rule.forward.evaluate(setting.hps, sizes)
    reasons["forward"] = forward.reason
    own = getattr(module, "factors", None)
    if setting.table.unit and own is not None and len(info.shape) > 1:
        told = own(setting.batch_tokens)
        if not math.isclose(told.forward, forward.number, rel_tol=1e-9):
            raise PlanError(
                f"{info.name}: the op's forward factor {told.forward:.6g} is not the rule's {forward.number:.6g}",
                key=info.name, hint="this layer has a role that its op was not made for",
            )  # fmt: skip
        reasons["input_grad"] = f"{show_number(told.input_grad)}, owned by {type(module).__name__}"
        reasons["weight_grad"] = (
            "1 / sqrt(tokens in the batch), owned by the op" if told.weight_grad is None
            else f"{show_number(told.weight_grad)}, owned by {type(module).__name__} (batch_tokens "
                 f"{setting.batch_tokens})"
        )  # fmt: skip
        return Factors(told.forward, told.input_grad, told.weight_grad)
    back = rule.input_grad.evaluate(setting.hps, sizes) if rule.input_grad is not None else forward
    return Factors(forward.number, back.number, forward.number)


def rule_of(info: ParamInfo, table: Table, at_zero: bool = False) -> tuple[RoleRule, Table]:
    """The rule of a parameter and the table it comes from.

    Args:
        info: the parameter.
        table: of the plan's optimiser; Muon's and LMD's have a rest of their own.
        at_zero: whether it starts at zero, where no factor moves it.
    """
    owner = table.owner(info.role, len(info.shape))
    if at_zero and table.rest is not None and family(owner.optimizer).relative:
        owner = table.rest
    return owner.resolved(info.role, info.in_stack), owner


def betas_of(setting: Setting, table: Table, reasons: dict[str, str]) -> tuple[float, float]:
    """Both betas at the target."""
    told = setting.hps["beta1"], setting.hps["beta2"]
    out = tuple(table.scaled_beta(beta, setting.beta_ratio) for beta in told)
    shown = ", ".join(show_number(beta) for beta in out)
    why = "as given" if out == told else (
        f"{table.betas} rule on {show_number(told[0])}, {show_number(told[1])} "
        f"(m_B / m_D {show_number(setting.beta_ratio)})"
    )  # fmt: skip
    reasons["betas"] = f"{shown} = {why}"
    return out[0], out[1]


def check_rate(name: str, law: Family, lr: float, told: float, unit: bool) -> None:
    """Refuse a learning rate in log units that no relative optimiser can mean.

    Args:
        name: of the parameter.
        law: family that trains it.
        lr: what it gets.
        told: the hyperparameter, in base units.
        unit: whether the table is unit-scaled.

    Raises:
        PlanError: a step would move a weight by more than a factor e.
    """
    if law.relative and lr > 1:
        raise PlanError(
            f"{name}: {law.name}'s learning rate {show_number(lr)} is in log units, and over 1 a step moves a weight "
            "by more than a factor e", key="hps.lr", value=told,
            hint=f"at most {0.999 * told / lr:.3g} here; {law.defaults(unit)['lr']:g} is the default",
        )  # fmt: skip


def make_row(
    info: ParamInfo, module: nn.Module, setting: Setting, rule: RoleRule, table: Table, sizes: Mapping[str, float],
) -> ParamRow:  # fmt: skip
    """The row of one parameter under its (perhaps shifted) rule."""
    hps, casts = setting.hps, setting.casts
    reasons: dict[str, str] = {}

    def number(quantity: str, value: Value) -> float:
        reasons[quantity] = value.reason
        return value.number

    factors = _factors(module, info, setting, rule, sizes, reasons)
    if rule.init_kind == "normal":
        init_std, init_value = number("init_std", rule.init.evaluate(hps, sizes)), None
    else:
        init_std, init_value = 0.0, 1.0 if rule.init_kind == "one" else 0.0
        reasons["init_std"] = f"constant {init_value:g}"
    matrix = len(info.shape) > 1 and info.role not in NOT_MATRICES
    formats = casts.formats(info.module_path) if matrix else PLAIN
    if matrix:
        reasons["formats"] = casts.reason(info.module_path)
    lr = number("lr", rule.lr.evaluate(hps, sizes))
    law = family(table.optimizer)
    check_rate(info.name, law, lr, hps["lr"], setting.table.unit)
    sigma = number("sigma", hp("sigma").evaluate(hps, sizes)) if "sigma" in law.fields else None
    ones = dict.fromkeys(hps, 1.0)
    relative = Relative(*(getattr(rule, name).evaluate(ones, sizes).number for name in ("lr", "eps", "weight_decay")))
    return ParamRow(
        name=info.name, role=info.role, shape=info.shape, fan_in=info.fan_in, fan_out=info.fan_out, factors=factors,
        init_std=init_std, init_value=init_value, lr=lr,
        eps=number("eps", rule.eps.evaluate(hps, sizes)),
        weight_decay=number("weight_decay", rule.weight_decay.evaluate(hps, sizes)),
        betas=betas_of(setting, table, reasons), formats=formats, reasons=reasons, optimizer=table.optimizer,
        relative=relative, sigma=sigma,
    )  # fmt: skip
