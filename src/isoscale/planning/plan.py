"""The plan: parameter rows and site rows, and the few things one does with them.

Everything downstream (init, optimiser groups, casts, reports) reads rows; nothing recomputes a rule. Rows are keyed by
name, so nothing that happens to the Parameter objects (FSDP2, meta init, assign=True, deepcopy, compile) can lose them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from isoscale._base.errors import PlanError, did_you_mean
from isoscale.planning.apply import apply_plan
from isoscale.planning.diff import Change, diff_plans
from isoscale.planning.groups import param_groups, scaled_groups, update_groups
from isoscale.planning.names import pattern
from isoscale.planning.ramp import moved_plan
from isoscale.planning.rows import ParamRow, SiteRow
from isoscale.planning.show import explain_row, show_plan
from isoscale.rules import Scale

VERSION = 2


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
        optimizer: family that the rows are for.
        options: the switches of the rules, see `isoscale.rules.Options`.
        beta_ratio: m_B / m_D.
        clip: largest gradient norm at this scale; None: no clipping.
        notes: what may spoil the transfer, in words.
        finish: share of the run, at its end, that is trained with BF16 operands.
        norm: `none`, or the norm that takes its statistic from the casts behind it.
        modules: factors by module type and depth that the rows hold, see `planning/modules.py`.
    """

    parametrisation: str
    rows: tuple[ParamRow, ...]
    sites: tuple[SiteRow, ...]
    hps: Mapping[str, float]
    base: Scale | None
    target: Scale
    recipe: str
    optimizer: str = "adamw"
    options: Mapping[str, Any] = field(default_factory=dict)
    beta_ratio: float = 1.0
    clip: float | None = None
    notes: tuple[str, ...] = ()
    finish: float = 0.0
    norm: str = "none"
    modules: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "hps", MappingProxyType(dict(self.hps)))
        object.__setattr__(self, "options", MappingProxyType(dict(self.options)))
        object.__setattr__(self, "modules", MappingProxyType(dict(self.modules)))

    def row(self, name: str) -> ParamRow:
        """The row of one parameter; a name as the table prints it (`layers.*.mlp.up`) finds the first of its kind.

        Raises:
            PlanError: no such name; the nearest ones are suggested.
        """
        for row in self.rows:
            if row.name == name:
                return row
        for row in self.rows:
            if pattern(row.name) in (name, f"{name}.weight") or row.name == f"{name}.weight":
                return row
        raise PlanError(
            f"the plan has no parameter {name!r}",
            key=name,
            hint=did_you_mean(name, [row.name for row in self.rows])[:300],
        )

    def apply(self, model: nn.Module, *, seed: int = 0, init: bool = True, draw: bool = False) -> nn.Module:
        """Set the model's site multipliers and, unless `init` is False, its initial weights.

        isoscale's models are drawn: each tensor depends on (seed, name) alone, the same bits on any device, sharding
        or order. Any other model keeps its own values, scaled in place to what the rows say; applying twice changes
        nothing. With `draw` such a model is drawn too, for one that comes from `to_empty` and has no values.

        Raises:
            PlanError: the model's parameters and the rows do not match, or one that only the model can start.
        """
        return apply_plan(self.rows, self.sites, model, seed=seed, init=init, draw=draw)

    def param_groups(
        self, model: nn.Module, groups: Sequence[Mapping[str, Any]] | None = None, *, part: str | None = None
    ) -> list[dict[str, Any]]:
        """Optimiser groups: parameters of equal lr, eps, weight decay and betas share one; frozen ones are left out.

        Args:
            model: the plan's model, wrapped or not.
            groups: your own groups, with values tuned at the base: they are kept, split only where factors differ,
                and their lr, eps, weight_decay and betas are scaled. At base = target they come back as they are.
                What is to be scaled has to be in the group: a default of the optimiser is out of reach.
            part: only the parameters of one optimiser (`muon`, `adamw`), where a plan trains with two.

        Raises:
            PlanError: the model's parameters and the rows do not match; an unknown part; groups that leave out or
                repeat a trainable parameter, or lack a value that has to be scaled.
        """
        rows = self.rows
        if part is not None:
            kinds = sorted({row.optimizer for row in rows})
            if part not in kinds:
                raise PlanError(f"the plan has no part {part!r}", key="part", value=part, hint=f"one of {kinds}")
        if groups is not None:
            return scaled_groups(self, model, groups, part)
        return param_groups(rows, model, part)

    def update(self, optimizer: torch.optim.Optimizer, model: nn.Module, scheduler: Any = None) -> None:
        """Set an optimiser's groups to this plan's LR, eps, decay and betas, its state untouched.

        For a batch ramp or a resumed run: `plan.at(batch_tokens=...).update(optimizer, model, scheduler)`. Rows hold
        peaks: a group that a scheduler has given an `initial_lr` keeps its place in the schedule.

        Args:
            optimizer: made from this plan's groups, or those of the plan it was moved from.
            model: the model it trains.
            scheduler: torch's, of the kind that multiplies `base_lrs` (LambdaLR, Hugging Face's); it keeps peaks of its
                own and would bring the old ones back. Chained and recursive kinds (CosineAnnealingLR, OneCycleLR) have
                to be made anew.

        Raises:
            PlanError: the optimiser trains another model, or a group mixes parameters whose settings differ.
        """
        update_groups(self.rows, model, optimizer, scheduler)

    def at(self, *, batch_tokens: int | None = None, tokens: int | None = None) -> Plan:
        """The same plan at another batch or training length: LR, eps, decay and betas move, nothing else.

        Raises:
            PlanError: the plan has no base batch or length to take a ratio to, or its table is a custom one.
        """
        return moved_plan(self, batch_tokens, tokens)

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
                "optimizer": self.optimizer,
                "options": dict(self.options),
                "beta_ratio": self.beta_ratio,
                "clip": self.clip,
                "notes": list(self.notes),
                "finish": self.finish,
                "norm": self.norm,
                "modules": dict(self.modules),
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
                optimizer=data["optimizer"],
                options={k: tuple(v) if isinstance(v, list) else v for k, v in data["options"].items()},
                beta_ratio=data["beta_ratio"],
                clip=data["clip"],
                notes=tuple(data["notes"]),
                finish=data.get("finish", 0.0),
                norm=data.get("norm", "none"),
                modules=data.get("modules", {}),
            )
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise PlanError(f"not a plan: {error}") from None

    def __str__(self) -> str:
        return show_plan(self)
