"""Parametrisations as data: role x quantity -> a product of hyperparameters and powers of sizes. No torch here."""

from isoscale.config.scale import Scale
from isoscale.rules.monomial import Monomial, Value, hp, size
from isoscale.rules.registry import by_name, names
from isoscale.rules.shift import shift
from isoscale.rules.table import ROLES, RoleRule, SiteRule, Table

__all__ = [
    "ROLES",
    "Monomial",
    "RoleRule",
    "Scale",
    "SiteRule",
    "Table",
    "Value",
    "by_name",
    "hp",
    "names",
    "shift",
    "size",
]
