"""The plan: parameter rows and site rows, and the few things one does with them.

Everything downstream (init, optimiser groups, casts, reports) reads rows; nothing recomputes a rule. Rows are keyed by
name, so nothing that happens to the Parameter objects (FSDP2, meta init, assign=True, deepcopy, compile) can lose them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

from torch import nn

from isoscale._base.errors import PlanError, did_you_mean
from isoscale.planning.apply import apply_plan
from isoscale.planning.diff import Change, diff_plans
from isoscale.planning.groups import param_groups
from isoscale.planning.rows import ParamRow, SiteRow
from isoscale.planning.show import explain_row, show_plan
from isoscale.rules import Scale

VERSION = 1


@dataclass(frozen=True)
class Plan:
    """Two immutable tables, and where they come from.

    Args:
        parametrisation: the rule table's name.
        rows: one per parameter.
        sites: one per place in the forward.
        hps: the hyperparameters in base units that went in.
        base: the scale they were tuned at (None: the rules need none).
        target: the scale of this model.
        recipe: name of the low-precision recipe.
    """

    parametrisation: str
    rows: tuple[ParamRow, ...]
    sites: tuple[SiteRow, ...]
    hps: Mapping[str, float]
    base: Scale | None
    target: Scale
    recipe: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "hps", MappingProxyType(dict(self.hps)))

    def row(self, name: str) -> ParamRow:
        """The row of one parameter.

        Raises:
            PlanError: no such name; the nearest ones are suggested.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise PlanError(
            f"the plan has no parameter {name!r}",
            key=name,
            hint=did_you_mean(name, [row.name for row in self.rows])[:300],
        )

    def apply(self, model: nn.Module, *, seed: int = 0, init: bool = True) -> nn.Module:
        """Set the model's site multipliers and, unless `init` is False, draw its initial weights.

        The draw of each tensor depends on (seed, name) alone: the same bits on any device, sharding or order.

        Raises:
            PlanError: the model's parameters and the rows do not match.
        """
        return apply_plan(self.rows, self.sites, model, seed=seed, init=init)

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Optimiser groups for AdamW: parameters of equal lr, eps, weight decay and betas share one.

        Raises:
            PlanError: the model's parameters and the rows do not match.
        """
        return param_groups(self.rows, model)

    def diff(self, other: Plan) -> tuple[Change, ...]:
        """What differs in `other`, per quantity; blocks of like value are folded into one line."""
        return diff_plans(self.rows, self.sites, other.rows, other.sites)

    def explain(self, name: str) -> str:
        """Where each number of one parameter or site comes from.

        Raises:
            PlanError: no such name.
        """
        for site in self.sites:
            if site.name == name:
                return explain_row(site)
        return explain_row(self.row(name))

    def to_json(self) -> str:
        """The whole plan as JSON text."""
        return json.dumps(
            {
                "version": VERSION,
                "parametrisation": self.parametrisation,
                "recipe": self.recipe,
                "hps": dict(self.hps),
                "base": asdict(self.base) if self.base else None,
                "target": asdict(self.target),
                "rows": [row.to_dict() for row in self.rows],
                "sites": [site.to_dict() for site in self.sites],
            },
            indent=1,
        )

    @staticmethod
    def from_json(text: str) -> Plan:
        """The plan back from `to_json`.

        Raises:
            PlanError: not a plan, or of a version this isoscale does not know.
        """
        try:
            data = json.loads(text)
            if data["version"] != VERSION:
                raise PlanError("a plan of another version", key="version", value=data["version"], hint=f"{VERSION}")
            return Plan(
                parametrisation=data["parametrisation"],
                rows=tuple(ParamRow.from_dict(row) for row in data["rows"]),
                sites=tuple(SiteRow(**site) for site in data["sites"]),
                hps=data["hps"],
                base=Scale(**data["base"]) if data["base"] else None,
                target=Scale(**data["target"]),
                recipe=data["recipe"],
            )
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise PlanError(f"not a plan: {error}") from None

    def __str__(self) -> str:
        return show_plan(self.parametrisation, self.recipe, self.base, self.target, self.hps, self.rows, self.sites)
