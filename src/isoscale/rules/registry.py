"""The parametrisations by name. A newcomer adds one line, and the contract suite tests it for every optimiser."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

from isoscale._base.errors import PlanError, did_you_mean
from isoscale.rules.complete import complete_d, completep, depth_mup
from isoscale.rules.families import FAMILIES, family
from isoscale.rules.monomial import ONE, Monomial, hp
from isoscale.rules.mup import MUP, MUP_TABLE3, MUP_TABLE9
from isoscale.rules.options import Options
from isoscale.rules.spectral import SPECTRAL
from isoscale.rules.standard import SP, SP_LECUN
from isoscale.rules.table import Table
from isoscale.rules.u_complete import u_complete_d
from isoscale.rules.umup import UMUP

Maker = Callable[[Options], Table]


def _fixed(table: Table) -> Maker:
    return lambda options: table


def _register(*makers: Maker) -> Mapping[str, Maker]:
    out: dict[str, Maker] = {}
    for maker in makers:
        name = maker(Options()).name
        if name in out:
            raise PlanError(f"two parametrisations are named {name!r}", key=name)
        out[name] = maker
    return MappingProxyType(out)


_MAKERS = _register(
    *map(_fixed, (SP, SP_LECUN, MUP, MUP_TABLE3, MUP_TABLE9, SPECTRAL, UMUP)),
    depth_mup, completep, complete_d, u_complete_d,
)  # fmt: skip


def names() -> tuple[str, ...]:
    """Every parametrisation's name."""
    return tuple(_MAKERS)


def by_name(name: str, optimizer: str = "adamw", options: Options | None = None) -> Table:
    """The table of a parametrisation for an optimiser family.

    Raises:
        PlanError: no such name or optimiser (the nearest ones are suggested), or no rules for this pair.
    """
    if name not in _MAKERS:
        raise PlanError(
            f"unknown parametrisation {name!r}", key="parametrisation", value=name, hint=did_you_mean(name, _MAKERS)
        )
    options = options or Options()
    table = _MAKERS[name](options)
    kind = family(optimizer)
    if table.unit and not kind.unit:
        fit = ", ".join(one.name for one in FAMILIES.values() if one.unit)
        raise PlanError(
            f"{name} has no rules for the optimiser {optimizer!r}: its gradients carry unit-scaling factors",
            key="optimizer", value=optimizer, hint=f"one of {fit}; or parametrisation='complete-d'",
        )  # fmt: skip
    return _without(kind.derive(table), options)


def _without(table: Table, options: Options) -> Table:
    """The table with the rules of `options.constant` switched off."""
    off = set(options.constant)
    if not off:
        return table
    roles = {}
    for name, rule in table.roles.items():
        if "lr" in off:
            rule = replace(rule, lr=replace(rule.lr, sizes={}))
        if "init" in off:
            rule = replace(rule, init=replace(rule.init, sizes={}))
        if "eps" in off:
            rule = replace(rule, eps=hp("eps"))
        if "weight_decay" in off:
            rule = replace(rule, weight_decay=replace(rule.weight_decay, sizes={}))
        roles[name] = rule
    run, sites = table.run, dict(table.sites)
    if "lr" in off:
        run = replace(run, lr=ONE)
    if "eps" in off:
        run = replace(run, eps=ONE)
    if "weight_decay" in off:
        run = replace(run, decay=ONE, step_decay=ONE)
    if "multipliers" in off:
        for kind, site in table.sites.items():
            if isinstance(site.multiplier, Monomial):
                sites[kind] = replace(site, multiplier=replace(site.multiplier, sizes=_heads(site.multiplier.sizes)))
    return replace(
        table, roles=roles, run=run, sites=sites, stack_lr=ONE if "lr" in off else table.stack_lr,
        stack_decay=ONE if "weight_decay" in off else table.stack_decay,
        stack_eps=ONE if "eps" in off else table.stack_eps, betas="constant" if "betas" in off else table.betas,
        rest=_without(table.rest, options) if table.rest is not None else None,
    )  # fmt: skip


def _heads(sizes: Mapping[str, float]) -> dict[str, float]:
    """Without the ratios: 1 / sqrt(head size) is common practice, not a transfer rule."""
    return {name: power for name, power in sizes.items() if not name.endswith("_ratio")}
