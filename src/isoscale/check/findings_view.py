"""What is looked at in somebody's set-up: each tensor's settings at the base, and at one other size per axis.

Axes are taken one at a time (the base made wider, the base made deeper), so a factor of width is never mistaken for one
of depth. Roles and growing extents come from the forwards, as for a plan.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from isoscale._base.errors import PlanError
from isoscale.planning.example import make_example
from isoscale.planning.foreign_roles import foreign_infos
from isoscale.planning.growth import named, partners
from isoscale.planning.names import pattern
from isoscale.planning.roles import ParamInfo
from isoscale.planning.sizes import Ratios, shared_sizes, sizes_of
from isoscale.planning.temperature import temperature_sites
from isoscale.planning.trace import Trace, trace
from isoscale.planning.trace_flow import ends, residuals
from isoscale.planning.trace_record import record
from isoscale.rules import FAMILIES, Monomial, Options, Table
from isoscale.rules.table import HP_DEFAULTS

ADAM = FAMILIES["adamw"].classes
_ONES = dict.fromkeys(HP_DEFAULTS, 1.0)


@dataclass(frozen=True)
class Setup:
    """One size of what the user's function returned.

    Args:
        width, depth: as asked for.
        model: with its own initial values.
        optimizers: none, one or several.
        example: input of the forward; None to guess.
        loss: (model, example) -> scalar; None to choose one.
        clip: largest gradient norm; None where nothing is clipped.
        roles: pattern -> role, where the forward does not tell.
    """

    width: int
    depth: int
    model: nn.Module
    optimizers: tuple[torch.optim.Optimizer, ...] = ()
    example: Any = None
    loss: Any = None
    clip: float | None = None
    roles: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Held:
    """What one tensor has in one set-up; None where nothing trains it.

    Args:
        optimizer: class name.
        lr, eps, decay: of its group.
        std: root mean square of its values.
        adjust: Muon's way of adjusting the LR to shapes.
    """

    optimizer: str | None
    lr: float | None
    eps: float | None
    decay: float | None
    std: float
    adjust: str | None = None


@dataclass(frozen=True)
class Entry:
    """One tensor at the base and at the other end of an axis.

    Args:
        name: at the larger size.
        info: role and fans there.
        small, big: what it has.
        sizes: what rules may ask.
        tied: an embedding that is the readout too.
        takes: the site (`residual_attn`, `tied`) whose multiplier may have been moved into this tensor, or nothing.
    """

    name: str
    info: ParamInfo
    base: ParamInfo
    small: Held
    big: Held
    sizes: Mapping[str, float]
    tied: bool
    takes: str = ""

    def ratio(self, quantity: str) -> float | None:
        """The larger model's value over the base's; None where there is none or it is 0."""
        little, large = getattr(self.small, quantity), getattr(self.big, quantity)
        return large / little if little and large is not None else None

    def wanted(self, quantity: str, table: Table) -> float:
        """What a table would have this ratio be."""
        rule = table.resolved(self.info.role, self.info.in_stack)
        name = {"decay": "weight_decay", "std": "init"}.get(quantity, quantity)
        found: float = getattr(rule, name).evaluate(_ONES, self.sizes).number
        return found

    def lr_forms(self, table: Table) -> tuple[float, ...]:
        """LR ratios of the table's training: plain, and with a multiplier of the forward moved into the weight."""
        wanted = self.wanted("lr", table)
        site = table.tied_readout if self.takes == "tied" else None
        if self.takes == "residual_attn" and isinstance(found := table.sites[self.takes].multiplier, Monomial):
            site = found
        return (wanted,) if site is None else (wanted, wanted * site.evaluate(_ONES, self.sizes).number)


@dataclass(frozen=True)
class View:
    """Everything that the findings are read off.

    Args:
        setups: the base first, then the wider and the deeper one, by axis.
        entries: per axis, in the model's order.
        branches: the numbers that residual branches are multiplied with in the forward, at the base and the larger
            depth; empty where depth is not compared.
        inlined: attention scales that are written into code although the head size differs, in words.
    """

    setups: Mapping[str, Setup]
    entries: Mapping[str, tuple[Entry, ...]]
    branches: tuple[tuple[float, ...], tuple[float, ...]]
    inlined: tuple[str, ...]

    @property
    def base(self) -> Setup:
        """The set-up at the base."""
        return self.setups["base"]

    def all(self) -> list[tuple[str, Entry]]:
        """(axis, entry) over all axes."""
        return [(axis, entry) for axis, entries in self.entries.items() for entry in entries]


def held(setup: Setup) -> dict[str, Held]:
    """Each parameter's settings by name."""
    groups: dict[int, tuple[torch.optim.Optimizer, dict[str, Any]]] = {}
    for optimizer in setup.optimizers:
        for group in optimizer.param_groups:
            groups.update({id(parameter): (optimizer, group) for parameter in group["params"]})
    out = {}
    for name, parameter in named(setup.model).items():
        std = float(parameter.detach().float().square().mean().sqrt()) if not parameter.is_meta else float("nan")
        if id(parameter) not in groups:
            out[name] = Held(None, None, None, None, std)
            continue
        optimizer, group = groups[id(parameter)]
        kind = type(optimizer).__name__
        eps = group.get("eps") if kind in ADAM else None  # Muon's eps is of its iteration
        rate = group.get("initial_lr", group["lr"])
        out[name] = Held(kind, float(rate), eps, group.get("weight_decay"), std, group.get("adjust_lr_fn"))
    return out


def uses(setup: Setup) -> Counter[str]:
    """In how many places of the optimisers' groups each trainable parameter stands."""
    names = {id(parameter): name for name, parameter in named(setup.model).items()}
    found = Counter({name: 0 for name, parameter in named(setup.model).items() if parameter.requires_grad})
    for optimizer in setup.optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = names.get(id(parameter), "a parameter of another model")
                if parameter.requires_grad:
                    found[name] += 1 if id(parameter) in names else 2
    return found


def _branch_factors(setup: Setup) -> tuple[float, ...]:
    inputs = make_example(setup.model, setup.example)
    graph = record(setup.model, inputs.args, inputs.kwargs)
    adds = residuals(graph)
    streams = {add.add for add in adds} | {add.stream for add in adds}
    return tuple(ends(graph, graph.nodes[add.branch], streams).factor for add in adds)


def _infos(
    big: Setup, base: Setup, seen: Trace, kinds: Mapping[str, ParamInfo]
) -> tuple[dict[str, ParamInfo], dict[str, ParamInfo]]:
    """Roles and fans; along an axis on which nothing grows the roles are those that width told (`kinds`)."""
    pairs = partners(big.model, base.model)
    infos, little = foreign_infos(big.model, base.model, pairs, seen, big.roles)
    if kinds:
        for name, info in infos.items():
            known = kinds.get(little[name].name)
            if known is not None:
                infos[name] = replace(info, role=known.role)
    return infos, little


def view_of(setups: Mapping[str, Setup]) -> View:
    """Look at all set-ups.

    Args:
        setups: `base`, and `width`, `depth` or both.

    Raises:
        PlanError: models whose forward or roles cannot be read, or whose rules know no base; says what helps.
    """
    base = setups["base"]
    if any(getattr(module, "scaling", None) == "unit" for module in base.model.modules()):
        raise PlanError("the model is made of unit-scaled ops: its rules are no ratios to a base", key="--model",
                        hint="isoscale check says whether it transfers")  # fmt: skip
    base_seen, base_held = trace(base.model, base.example), held(base)
    entries: dict[str, tuple[Entry, ...]] = {}
    inlined = []
    kinds: dict[str, ParamInfo] = {}
    for axis in [name for name in ("width", "depth") if name in setups]:
        big = setups[axis]
        seen, mine = trace(big.model, big.example), held(big)
        infos, little = _infos(big, base, seen, kinds)
        if axis == "width":
            kinds = {little[name].name: info for name, info in infos.items()}
        few, many = len(base_seen.branches), len(seen.branches)
        found = Ratios(width=big.width / base.width, depth=many / few if few and axis == "depth" else 1.0)
        shared = shared_sizes(found, big.depth, None, None)
        options = Options()
        tied = {name for name, info in infos.items() if info.role == "embedding"
                and name in seen.uses and "matmul" in seen.uses[name].kinds}  # fmt: skip
        closing = frozenset().union(*(branch.ends for branch in seen.branches))
        gains = frozenset().union(*(seen.feeds.get(name, frozenset()) for name in tied))
        entries[axis] = tuple(
            Entry(name, info, little[name], base_held[little[name].name], mine[name],
                  sizes_of(info, little[name], shared, options),
                  name in tied, "residual_attn" if name in closing else "tied" if name in gains else "")
            for name, info in infos.items() if name in seen.uses
        )  # fmt: skip
        inlined += _inlined(big, seen, base_seen)
    deep = setups.get("depth")
    branches = (_branch_factors(base), _branch_factors(deep)) if deep else ((), ())
    return View(setups, entries, branches, tuple(dict.fromkeys(inlined)))


def _inlined(big: Setup, seen: Trace, base: Trace) -> list[str]:
    try:
        temperature_sites(big.model, seen, base, 1.0, big.example, ratios=True)
    except PlanError as error:
        small, large = base.attention[0].head_size, seen.attention[0].head_size
        return [f"{error.message} (head size {small} at the base, {large} at width {big.width})"]
    return []


def like(names: Sequence[str]) -> list[str]:
    """Names with block numbers as `*`, each once."""
    return list(dict.fromkeys(pattern(name) for name in names))
