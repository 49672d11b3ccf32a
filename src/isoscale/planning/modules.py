"""Factors on hyperparameters by module type and depth, in base units (Complete(d)P, arXiv 2512.22382, section 5).

A parameter's factor is that of its type times that of its depth: log z = log type + log curve(l / L). Curves are linear
in log between their knots and constant outside, so that they carry over to another depth. What the rules say comes
first: the factors multiply it, at any size alike.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from isoscale._base.errors import PlanError, did_you_mean
from isoscale.config.hps import MODULE_HPS, ModuleKey, parse_key
from isoscale.planning.names import pattern
from isoscale.planning.rows import ParamRow, SiteRow
from isoscale.rules.monomial import show_number

BRANCHES = {"residual_attn": "attn", "residual_ffn": "mlp"}
"""Site kind of a residual branch -> its type."""
_INDEX = re.compile(r"\.(\d+)\.")


def type_of(name: str) -> str:
    """The module type of a parameter: its name without the blocks' path and number, and without `.weight`."""
    return pattern(name).rpartition("*.")[2].removesuffix(".weight")


def depth_of(name: str, count: int) -> float | None:
    """l / L of a parameter or site; None outside the blocks."""
    found = _INDEX.search(f"{name}.")
    return int(found[1]) / count if found and count else None


def blocks(names: Iterable[str]) -> int:
    """How many blocks the names speak of."""
    return 1 + max((int(found[1]) for name in names if (found := _INDEX.search(f"{name}."))), default=-1)


def has(hp: str, row: ParamRow) -> bool:
    """Whether a row has a quantity that this hyperparameter moves."""
    if hp == "init_std":
        return row.init_std > 0
    if hp == "weight_decay":
        return row.weight_decay > 0
    return hp != "residual"


def types(rows: Sequence[ParamRow], sites: Sequence[SiteRow], hp: str) -> tuple[str, ...]:
    """The module types that have this hyperparameter, in the model's order."""
    if hp == "residual":
        return tuple(dict.fromkeys(BRANCHES[site.kind] for site in sites if site.kind in BRANCHES and site.attr))
    return tuple(dict.fromkeys(type_of(row.name) for row in rows if has(hp, row)))


@dataclass(frozen=True)
class Factors:
    """The factors of a config, sorted by what they act on.

    Args:
        plain: (hp, type) -> factor.
        curves: (hp, type or "") -> depth -> factor.
    """

    plain: Mapping[tuple[str, str], float]
    curves: Mapping[tuple[str, str], Mapping[float, float]]

    @staticmethod
    def of(modules: Mapping[str, float]) -> Factors:
        """From `HP/TYPE@DEPTH` -> factor.

        Raises:
            PlanError: a name that is none, or a factor that is not positive and finite.
        """
        plain: dict[tuple[str, str], float] = {}
        curves: dict[tuple[str, str], dict[float, float]] = {}
        for text, value in modules.items():
            key = _parsed(text)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise PlanError(f"the factor {text} must be positive and finite", key=f"modules.{text}", value=value)
            if key.depth is None:
                plain[key.hp, key.type] = float(value)
            else:
                curves.setdefault((key.hp, key.type), {})[key.depth] = float(value)
        return Factors(plain, curves)

    def at(self, hp: str, kind: str, depth: float | None) -> tuple[float, str]:
        """The factor on a hyperparameter of a type at a depth, and where it comes from."""
        factor, why = 1.0, []
        if (hp, kind) in self.plain:
            factor *= self.plain[hp, kind]
            why.append(f"{hp}/{kind} {show_number(self.plain[hp, kind])}")
        for name in ("", kind):
            if depth is not None and (hp, name) in self.curves:
                here = curve(self.curves[hp, name], depth)
                factor *= here
                why.append(f"{ModuleKey(hp, name, None)} {show_number(here)} at depth {depth:.3g}")
        return factor, " x ".join(why)


def _parsed(text: str) -> ModuleKey:
    try:
        key = parse_key(text)
    except ValueError as error:
        raise PlanError(str(error), key=f"modules.{text}", hint="lr/head, lr@0.5, lr/head@0.5") from None
    if key is None:
        raise PlanError(f"{text!r} names neither a module type nor a depth", key=f"modules.{text}",
                        hint=f"{text}/head; a global one goes into hps")  # fmt: skip
    return key


def curve(knots: Mapping[float, float], depth: float) -> float:
    """A depth curve: linear in log between knots, constant beyond the outer ones."""
    places = sorted(knots)
    if depth <= places[0]:
        return knots[places[0]]
    for low, high in pairwise(places):
        if depth <= high:
            share = (depth - low) / (high - low)
            return math.exp((1 - share) * math.log(knots[low]) + share * math.log(knots[high]))
    return knots[places[-1]]


def check(modules: Mapping[str, float], rows: Sequence[ParamRow], sites: Sequence[SiteRow]) -> None:
    """Refuse a factor that would act on nothing.

    Raises:
        PlanError: names the factor and the types that there are.
    """
    count = blocks(row.name for row in rows)
    for text in modules:
        key = _parsed(text)
        known = types(rows, sites, key.hp)
        if not known:
            raise PlanError(f"no module of this model has {key.hp}", key=f"modules.{text}",
                            hint="a plan with weight_decay > 0" if key.hp == "weight_decay" else "")  # fmt: skip
        if key.type and key.type not in known:
            every = {kind for hp in MODULE_HPS for kind in types(rows, sites, hp)}
            what = f"has no {key.hp}" if key.type in every else "is no module type of this model"
            raise PlanError(f"{key.type!r} {what}", key=f"modules.{text}", value=key.type,
                            hint=did_you_mean(key.type, known))  # fmt: skip
        if key.depth is not None and not count:
            raise PlanError("the model has no blocks, so there is no depth", key=f"modules.{text}")


def scaled_beta(beta: float, factor: float) -> float:
    """A beta with (1 - beta) / beta times a factor: for betas near 1 that is 1 - beta, and no factor leaves [0, 1)."""
    return beta / (beta + (1 - beta) * factor)


def with_factors(
    modules: Mapping[str, float], rows: Sequence[ParamRow], sites: Sequence[SiteRow], independent: bool
) -> tuple[tuple[ParamRow, ...], tuple[SiteRow, ...]]:
    """Rows and sites with the factors on them, reasons included.

    Args:
        modules: `HP/TYPE@DEPTH` -> factor.
        rows: of a plan.
        sites: of it.
        independent: whether decay is independent of the LR: then a factor on the LR leaves a step's decay as it is.

    Raises:
        PlanError: a factor that acts on nothing.
    """
    check(modules, rows, sites)
    factors, count = Factors.of(modules), blocks(row.name for row in rows)
    return (tuple(_row(row, factors, count, independent) for row in rows),
            tuple(_site(site, factors, count) for site in sites))  # fmt: skip


def moved_betas(modules: Mapping[str, float], rows: Sequence[ParamRow]) -> tuple[ParamRow, ...]:
    """The factors on betas alone, for rows whose betas were made anew."""
    factors, count = Factors.of(modules), blocks(row.name for row in rows)
    return tuple(replace(row, betas=_betas(row, factors, count)[0]) for row in rows)


def _betas(row: ParamRow, factors: Factors, count: int) -> tuple[tuple[float, float], str]:
    out, why = [], []
    for name, beta in zip(("beta1", "beta2"), row.betas):
        factor, said = factors.at(name, type_of(row.name), depth_of(row.name, count))
        out.append(scaled_beta(beta, factor))
        why += [said] * bool(said)
    return (out[0], out[1]), " x ".join(why)


def _row(row: ParamRow, factors: Factors, count: int, independent: bool) -> ParamRow:
    kind, depth = type_of(row.name), depth_of(row.name, count)
    found = {hp: factors.at(hp, kind, depth) for hp in ("lr", "weight_decay", "eps", "init_std")}
    betas, said = _betas(row, factors, count)
    if not said and not any(why for _, why in found.values()):
        return row
    reasons = dict(row.reasons)
    for hp, (factor, why) in found.items():
        if why:
            reasons[hp] += f", times {show_number(factor)} = {why}"
    if said:
        reasons["betas"] += f", (1 - beta) / beta times {said}"
    lr, decay, eps = found["lr"][0], found["weight_decay"][0], found["eps"][0]
    if independent and lr != 1:
        decay /= lr
        reasons["weight_decay"] += f", over {show_number(lr)}: independent of the LR"
    relative = replace(row.relative, lr=row.relative.lr * lr, eps=row.relative.eps * eps,
                       weight_decay=row.relative.weight_decay * decay)  # fmt: skip
    return replace(row, lr=row.lr * lr, eps=row.eps * eps, weight_decay=row.weight_decay * decay, betas=betas,
                   init_std=row.init_std * found["init_std"][0], relative=relative, reasons=reasons)  # fmt: skip


def _site(site: SiteRow, factors: Factors, count: int) -> SiteRow:
    if site.kind not in BRANCHES or not site.attr:
        return site
    factor, why = factors.at("residual", BRANCHES[site.kind], depth_of(site.path, count))
    if not why:
        return site
    old = 1.0 if site.multiplier is None else site.multiplier
    said = f"{site.reasons.get('multiplier', '1')}, times {show_number(factor)} = {why}"
    return replace(site, multiplier=old * factor, expected_scale=None, reasons={**site.reasons, "multiplier": said})
