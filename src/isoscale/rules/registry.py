"""The parametrisations by name. A newcomer adds one line, and the contract suite tests it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from isoscale._base.errors import PlanError, did_you_mean
from isoscale.rules.mup import MUP
from isoscale.rules.standard import SP, SP_LECUN
from isoscale.rules.table import Table
from isoscale.rules.umup import UMUP


def _register(*tables: Table) -> Mapping[str, Table]:
    out: dict[str, Table] = {}
    for table in tables:
        if table.name in out:
            raise PlanError(f"two parametrisations are named {table.name!r}", key=table.name)
        out[table.name] = table
    return MappingProxyType(out)


_TABLES = _register(SP, SP_LECUN, MUP, UMUP)


def names() -> tuple[str, ...]:
    """Every parametrisation's name."""
    return tuple(_TABLES)


def by_name(name: str) -> Table:
    """The table of a parametrisation.

    Raises:
        PlanError: no such name; the nearest ones are suggested.
    """
    if name not in _TABLES:
        raise PlanError(
            f"unknown parametrisation {name!r}", key="parametrisation", value=name, hint=did_you_mean(name, _TABLES)
        )
    return _TABLES[name]
