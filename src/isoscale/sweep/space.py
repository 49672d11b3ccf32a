"""Points of a search: which hyperparameters may move, between what, in which coordinates, under which identity.

All coordinates are octaves: log2 of a value, for betas log2 of 1 - beta (Complete(d)P, arXiv 2512.22382, section 5).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from isoscale._base.errors import ConfigError
from isoscale.config import RunConfig
from isoscale.config.hps import parse_key
from isoscale.planning.modules import blocks, depth_of, type_of, types
from isoscale.train.setup import meta_plan, resolved

Point = Mapping[str, float]
"""Hyperparameter (or factor, `lr/attn.q@0.5`) -> value in base units; what is left out keeps the config's value."""
_BETAS = ("beta1", "beta2")


def identity(point: Point, seed: int) -> str:
    """One short name for (point, seed): a retried trial is the same one, whatever number the storage gives it."""
    text = json.dumps({"point": {name: float(value) for name, value in sorted(point.items())}, "seed": seed})
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def centre_out(values: Sequence[float]) -> list[float]:
    """The values sorted by distance from the middle of the grid, so that a cut budget still brackets an optimum."""
    ordered = sorted(values)
    middle = (len(ordered) - 1) / 2
    return [ordered[i] for i in sorted(range(len(ordered)), key=lambda i: (abs(i - middle), i))]


def show(point: Point) -> str:
    """A point in words; powers of two as such."""
    parts = []
    for name, value in point.items():
        exponent = math.log2(value) if value > 0 else math.nan
        neat = abs(exponent - round(exponent, 1)) < 1e-9
        parts.append(f"{name}=2^{round(exponent, 1):g}" if neat else f"{name}={value:.4g}")
    return " ".join(parts) or "defaults"


@dataclass(frozen=True)
class Dim:
    """One number that may move.

    Args:
        name: as in a point.
        low, high: ends, in the value's own units.
        start: the config's value.
        values: the grid, sorted; empty for a factor that has only ends.
    """

    name: str
    low: float
    high: float
    start: float
    values: tuple[float, ...] = ()

    def octaves(self, value: float) -> float:
        """The coordinate of a value."""
        return math.log2(1 - value if self.name in _BETAS else value)

    def value(self, octaves: float) -> float:
        """The value at a coordinate."""
        power = float(2.0**octaves)
        return 1 - power if self.name in _BETAS else power

    @property
    def curve(self) -> str:
        """The depth curve that this is a knot of; empty for anything else."""
        return self.name.partition("@")[0] if "@" in self.name else ""

    @property
    def ends(self) -> tuple[float, float]:
        """Lowest and highest coordinate."""
        low, high = sorted((self.octaves(self.low), self.octaves(self.high)))
        return low, high


@dataclass(frozen=True)
class Space:
    """What a search may move, in a fixed order: the global hyperparameters, then factors by module."""

    dims: tuple[Dim, ...]

    @staticmethod
    def of(config: RunConfig, vocab: int = 256) -> Space:
        """The space of a config's `sweep` section.

        Args:
            config: its model says which module types there are.
            vocab: of the corpus.

        Raises:
            ConfigError: a module type that no module has, a weight decay that may not be split because it is zero.
            PlanError: values that no plan can have.
        """
        config = resolved(config)
        dims = []
        for name, values in config.sweep.space.items():
            start = config.modules.get(name, 1.0) if parse_key(name) else getattr(config.hps, name)
            dims.append(Dim(name, min(values), max(values), start, tuple(sorted(values))))
        known = {dim.name for dim in dims}
        for name in _factors(config, vocab):
            if name not in known:
                start = config.modules.get(name, 1.0)
                dims.append(Dim(name, start / config.sweep.modules.reach, start * config.sweep.modules.reach, start))
        return Space(tuple(dims))

    def point(self, octaves: Sequence[float]) -> Point:
        """The point at some coordinates, clipped into the space; what stays at the config's value is left out.

        The knots of a depth curve stay or go together: without the others, one alone would be the factor at any depth.
        """
        values = {dim: min(max(dim.value(at), dim.low), dim.high) for dim, at in zip(self.dims, octaves)}
        moved = {dim for dim, value in values.items() if not math.isclose(value, dim.start, rel_tol=1e-12)}
        curves = {dim.curve for dim in moved} - {""}
        return {dim.name: value for dim, value in values.items() if dim in moved or dim.curve in curves}

    def octaves(self, point: Point) -> list[float]:
        """The coordinates of a point."""
        return [dim.octaves(point.get(dim.name, dim.start)) for dim in self.dims]

    def to_dict(self) -> dict[str, list[float]]:
        """Name -> the grid, or both ends."""
        return {dim.name: list(dim.values or (dim.low, dim.high)) for dim in self.dims}

    def __str__(self) -> str:
        """A table: global ones a line each, factors by hyperparameter and kind."""
        lines = [f"{len(self.dims)} numbers"]
        groups: dict[tuple[str, str], list[Dim]] = {}
        for dim in self.dims:
            key = parse_key(dim.name)
            if key is None or dim.values:
                lines.append(f"  {dim.name:16s} {dim.low:.4g} to {dim.high:.4g}, now {dim.start:.4g}")
                continue
            form = "by type and depth" if key.type and key.depth is not None else "by type" if key.type else "by depth"
            groups.setdefault((key.hp, form), []).append(dim)
        for (hp, form), dims in groups.items():
            first = parse_key(dims[0].name)
            assert first is not None
            named = ", ".join(dict.fromkeys((k.type if first.type else f"{k.depth:g}")
                                            for dim in dims if (k := parse_key(dim.name)) is not None))  # fmt: skip
            lines.append(f"  {hp} {form}: {len(dims)} factors, 1/{dims[0].high / dims[0].start:g} to "
                         f"{dims[0].high / dims[0].start:g}: {named}")  # fmt: skip
        return "\n".join(lines)


def _factors(config: RunConfig, vocab: int) -> list[str]:
    """Names of the factors that the per-module search moves."""
    said = config.sweep.modules
    if not said.hps:
        return []
    plan = meta_plan(config, vocab)
    count = said.depth or blocks(row.name for row in plan.rows)
    knots = [k / count for k in range(count)]
    out = []
    for hp in said.hps:
        there = types(plan.rows, plan.sites, hp)
        if not there:
            why = "hps.weight_decay is 0" if hp == "weight_decay" else "the model has none"
            raise ConfigError(f"{hp} cannot differ by module: {why}", key="sweep.modules.hps", value=hp,
                              hint="hps.weight_decay = 0.1" if hp == "weight_decay" else "leave it out")  # fmt: skip
        every = types(plan.rows, plan.sites, "lr") + types(plan.rows, plan.sites, "residual")
        for kind in said.types:
            if kind not in every:
                raise ConfigError(f"{kind!r} is no module type of this model", key="sweep.modules.types", value=kind,
                                  hint=f"one of {', '.join(every)}")  # fmt: skip
        chosen = [kind for kind in there if not said.types or kind in said.types]
        if said.form == "free":
            inside = {type_of(row.name) for row in plan.rows if depth_of(row.name, count) is not None}
            for kind in chosen:
                out += [f"{hp}/{kind}@{k:g}" for k in knots] if kind in inside or hp == "residual" else [f"{hp}/{kind}"]
        else:
            out += [f"{hp}/{kind}" for kind in chosen]
            out += [f"{hp}@{k:g}" for k in knots] if said.form == "kronecker" else []
    return out


def trial_config(config: RunConfig, point: Point, seed: int) -> RunConfig:
    """A sweep's config at one point."""
    hps = {f"hps.{name}": value for name, value in point.items() if parse_key(name) is None}
    factors = {name: value for name, value in point.items() if parse_key(name) is not None}
    values: dict[str, object] = {**hps, "seed": seed}
    if factors:
        values["modules"] = {**config.modules, **factors}
    return config.with_values(**values)
