"""A plan at another batch or training length: a batch ramp, or a run resumed with a new horizon."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from isoscale._base.errors import PlanError
from isoscale.planning.modules import moved_betas
from isoscale.planning.numbers import check_rate
from isoscale.planning.rows import ParamRow, Relative
from isoscale.rules import Monomial, Options, Table, by_name, family, names
from isoscale.rules.monomial import show_number

if TYPE_CHECKING:
    from isoscale.planning.plan import Plan


def moved_plan(plan: Plan, batch_tokens: int | None, tokens: int | None) -> Plan:
    """See `Plan.at`."""
    if plan.parametrisation not in names():
        raise PlanError(f"{plan.parametrisation!r} is a table of your own, which a plan does not carry",
                        key="parametrisation", hint="make a new plan: iso.plan(model, table, ...)")  # fmt: skip
    said = {"batch_tokens": batch_tokens, "tokens": tokens}
    changes = {name: value for name, value in said.items() if value is not None}
    for name in changes:
        if getattr(plan.target, name) is None or plan.base is None or getattr(plan.base, name) is None:
            hint = f"iso.plan(..., base=iso.Scale({name}=...), target=iso.Scale({name}=...))"
            raise PlanError(f"the plan knows no base {name}, so there is no ratio to follow", key=f"base.{name}",
                            hint=hint)  # fmt: skip
    options = Options(**plan.options)
    table = by_name(plan.parametrisation, plan.optimizer, options)
    target = replace(plan.target, **changes)
    sizes = {}
    for name, size, axis in (("batch_tokens", "batch_ratio", "batch"), ("tokens", "token_ratio", "duration")):
        now, then = getattr(target, name), getattr(plan.target, name)
        sizes[size] = now / then if now and then and axis in options.axes else 1.0
    sizes["tokens_per_parameter_ratio"] = sizes["token_ratio"]
    ratio = plan.beta_ratio * sizes["batch_ratio"] / sizes["token_ratio"]
    betas = plan.hps["beta1"], plan.hps["beta2"]

    def moved(row: ParamRow) -> ParamRow:
        own = table if row.optimizer == table.optimizer or table.rest is None else table.rest
        out = _moved(row, own, sizes, (own.scaled_beta(betas[0], ratio), own.scaled_beta(betas[1], ratio)))
        check_rate(row.name, family(row.optimizer), out.lr, plan.hps["lr"], table.unit)
        return out

    rows = moved_betas(plan.modules, tuple(moved(row) for row in plan.rows))
    return replace(plan, rows=rows, target=target, beta_ratio=ratio)


def _moved(row: ParamRow, table: Table, sizes: Mapping[str, float], betas: tuple[float, float]) -> ParamRow:
    def factor(monomial: Monomial) -> float:
        return monomial.evaluate({}, sizes).number

    run = table.run
    lr, eps = factor(run.lr), factor(run.eps)
    decay = factor(run.step_decay / run.lr if table.independent_decay else run.decay)
    reasons = dict(row.reasons)
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", decay)):
        if value != 1:
            reasons[name] += f", times {show_number(value)} for the batch or length it was moved to"
    shown = ", ".join(show_number(beta) for beta in betas)
    reasons["betas"] = f"{shown} = {table.betas} rule, at the new batch or length"
    relative = Relative(row.relative.lr * lr, row.relative.eps * eps, row.relative.weight_decay * decay)
    return replace(row, lr=row.lr * lr, eps=row.eps * eps, weight_decay=row.weight_decay * decay, betas=betas,
                   relative=relative, reasons=reasons)  # fmt: skip
