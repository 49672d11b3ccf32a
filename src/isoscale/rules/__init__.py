"""Parametrisations as data: role x quantity -> a product of hyperparameters and powers of sizes. No torch here."""

from isoscale.config.scale import Scale
from isoscale.rules.families import FAMILIES, Family, family
from isoscale.rules.monomial import Monomial, Value, hp, size
from isoscale.rules.options import AXES, Options
from isoscale.rules.registry import by_name, names
from isoscale.rules.shift import shift
from isoscale.rules.table import ROLES, RoleRule, SiteRule, Table

__all__ = [
    "AXES",
    "FAMILIES",
    "ROLES",
    "Family",
    "Monomial",
    "Options",
    "RoleRule",
    "Scale",
    "SiteRule",
    "Table",
    "Value",
    "by_name",
    "family",
    "hp",
    "names",
    "shift",
    "size",
]
