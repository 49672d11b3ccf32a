"""The parametrisations by name. A newcomer adds one line, and the contract suite tests it for every optimiser."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

from isoscale._base.errors import PlanError, did_you_mean
from isoscale.rules.complete import complete_d, completep, depth_mup
from isoscale.rules.families import family
from isoscale.rules.monomial import ONE, hp
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
    if table.unit and optimizer not in ("adamw", "lion"):
        raise PlanError(
            f"{name} has no rules for the optimiser {optimizer!r}: its gradients carry unit-scaling factors",
            key="optimizer", value=optimizer, hint="adamw or lion; or parametrisation='complete-d'",
        )  # fmt: skip
    return _without(kind.derive(table), options)


def _without(table: Table, options: Options) -> Table:
    """The table with the rules of `options.constant` switched off."""
    off = set(options.constant)
    if not off:
        return table
    roles = {}
    for name, rule in table.roles.items():
        bare = {"lr": replace(rule.lr, sizes={}), "init": replace(rule.init, sizes={}), "eps": hp("eps"),
                "weight_decay": replace(rule.weight_decay, sizes={})}  # fmt: skip
        roles[name] = replace(rule, **{key: value for key, value in bare.items() if key in off})
    changes: dict[str, object] = {"roles": roles}
    if "lr" in off:
        changes |= {"stack_lr": ONE, "run_lr": ONE}
    if "eps" in off:
        changes |= {"stack_eps": ONE, "run_eps": ONE}
    if "weight_decay" in off:
        changes |= {"run_decay": ONE, "run_step_decay": ONE}
    if "betas" in off:
        changes |= {"betas": "constant"}
    if "multipliers" in off:
        sites = {kind: replace(site, multiplier=replace(site.multiplier, sizes=_heads(site.multiplier.sizes)))
                 if not (site.multiplier is None or isinstance(site.multiplier, str)) else site
                 for kind, site in table.sites.items()}  # fmt: skip
        changes |= {"sites": sites}
    if table.rest is not None:
        changes["rest"] = _without(table.rest, options)
    return replace(table, **changes)  # type: ignore[arg-type]


def _heads(sizes: Mapping[str, float]) -> dict[str, float]:
    """Without the ratios: 1 / sqrt(head size) is common practice, not a transfer rule."""
    return {name: power for name, power in sizes.items() if not name.endswith("_ratio")}
