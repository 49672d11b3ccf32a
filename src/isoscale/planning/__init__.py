"""The plan: one immutable row per parameter and per place in the forward, each number with its reason."""

from isoscale.planning.build import plan
from isoscale.planning.cost import Cost, cost
from isoscale.planning.diff import Change
from isoscale.planning.export import export
from isoscale.planning.foreign_roles import infer_roles
from isoscale.planning.names import normalise, pattern
from isoscale.planning.notes import PlanWarning
from isoscale.planning.plan import Plan
from isoscale.planning.roles import infer
from isoscale.planning.rows import ParamRow, SiteRow

__all__ = [
    "Change", "Cost", "ParamRow", "Plan", "PlanWarning", "SiteRow", "cost", "export", "infer", "infer_roles",
    "normalise", "pattern", "plan",
]  # fmt: skip
