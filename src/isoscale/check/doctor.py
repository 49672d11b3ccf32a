"""Finds by name what is wrong in a set-up that somebody already has.

A function `setup(width, depth)` returns the model, its optimiser and what belongs to a step; it is built at the base,
at the base made wider and at the base made deeper. Nothing is trained but a few steps where a clip is to be judged.
What is lost: a schedule, a scaler or a loop around it is not seen; only what differs between sizes can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from isoscale._base.errors import ConfigError, IsoscaleError, did_you_mean
from isoscale.check.findings import FAMILIES, JUDGES, Fault, clip_binds, follows
from isoscale.check.findings_view import Setup, View, view_of
from isoscale.check.subject import Built, function_of, takes_depth
from isoscale.check.task import make_task

STEPS = 5
EXTRAS = ("example", "loss", "clip", "roles")
_RETURNS = "return model, (model, optimizer) or (model, optimizer, {'example': .., 'loss': .., 'clip': ..})"


@dataclass(frozen=True)
class Diagnosis:
    """What was found.

    Args:
        name: of the function.
        sizes: axis -> (width, depth), the base under `base`.
        law: which law the LRs follow: `constant`, a parametrisation, or `none` without an optimiser.
        faults: what is wrong, in the order of the report.
        departures: (axis, tensor, LR ratio, ratio by the law) where a tensor leaves the law that the others follow.
    """

    name: str
    sizes: Mapping[str, tuple[int, int]]
    law: str
    faults: tuple[Fault, ...]
    departures: tuple[tuple[str, str, float, float], ...]

    def names(self) -> set[str]:
        """The names of the findings."""
        return {fault.name for fault in self.faults}

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        departures = [dict(zip(("axis", "tensor", "lr", "law"), one)) for one in self.departures]
        return {"model": self.name, "sizes": dict(self.sizes), "law": self.law,
                "findings": [fault.to_dict() for fault in self.faults], "departures": departures}  # fmt: skip


def _optimizers(said: Any) -> tuple[torch.optim.Optimizer, ...] | None:
    several = said if isinstance(said, (list, tuple)) else () if said is None else (said,)
    return tuple(several) if all(isinstance(one, torch.optim.Optimizer) for one in several) else None


def _made(function: Callable[..., Any], name: str, width: int, depth: int, deep: bool) -> Setup:
    place = f"width {width}, depth {depth}" if deep else f"width {width}"
    torch.manual_seed(0)
    try:
        made = function(width, depth) if deep else function(width)
    except IsoscaleError:
        raise
    except Exception as error:  # a user's function may raise anything
        message = f"the function raised {type(error).__name__}: {error}"
        raise ConfigError(message, key="--model", value=name, place=place) from error
    parts = made if isinstance(made, tuple) else (made,)
    optimizers = _optimizers(parts[1]) if len(parts) > 1 else ()
    extras = parts[2] if len(parts) > 2 else {}
    fits = len(parts) <= 3 and isinstance(extras, dict) and optimizers is not None
    if not parts or not isinstance(parts[0], nn.Module) or not fits:
        kinds = ", ".join(type(part).__name__ for part in parts)
        raise ConfigError(f"the function returned ({kinds})", key="--model", value=name, place=place, hint=_RETURNS)
    for key in extras:
        if key not in EXTRAS:
            raise ConfigError(f"unknown extra {key!r}", key=key, place=place, hint=did_you_mean(key, EXTRAS))
    return Setup(width, depth, parts[0], optimizers or (), **extras)


def _named(setup: str) -> Callable[..., Any]:
    try:
        return function_of(setup)
    except ConfigError as error:
        error.key = "--model"
        raise


def _sizes(values: Sequence[int], flag: str) -> tuple[int, ...]:
    if not 1 <= len(values) <= 2 or any(type(value) is not int or value < 1 for value in values):
        raise ConfigError("one size, or the base's and a larger one", key=flag, value=tuple(values),
                          hint=f"{flag} 64,256")  # fmt: skip
    if len(values) == 2 and values[1] <= values[0]:
        raise ConfigError("the base comes first and is the smaller one", key=flag, value=tuple(values),
                          hint=f"{flag} {min(values)},{max(max(values), 2 * min(values))}")  # fmt: skip
    return tuple(values)


def _norms(setup: Setup) -> list[float]:
    """Gradient norms of a few steps as they would be trained; the set-up is used up."""
    task = make_task(Built(setup.model, setup.example, setup.loss), 0, None)
    parameters = [parameter for parameter in setup.model.parameters() if parameter.requires_grad]
    out = []
    for step in range(STEPS):
        setup.model.zero_grad(set_to_none=True)
        task.loss(setup.model, task.batch(step)).backward()  # type: ignore[no-untyped-call]
        out.append(float(torch.nn.utils.clip_grad_norm_(parameters, setup.clip or float("inf"))))
        for optimizer in setup.optimizers:
            optimizer.step()
    return out


def _departures(view: View, law: str) -> Iterable[tuple[str, str, float, float]]:
    table = FAMILIES[law]() if law in FAMILIES else None
    for axis, entry in view.all():
        ratio, kind = entry.ratio("lr"), (entry.big.optimizer or "").lower()
        if table is None or not ratio or "muon" in kind or kind in ("lmd", "madam"):  # they have laws of their own
            continue
        forms = entry.lr_forms(table)
        if all(abs(ratio / wanted - 1) > 1e-3 for wanted in forms):
            yield axis, entry.name, ratio, forms[0]


def examine(
    setup: str | Callable[..., Any], widths: Sequence[int] = (64, 256), depths: Sequence[int] = (2, 8)
) -> Diagnosis:
    """What is wrong in a set-up.

    Args:
        setup: a function of width (and depth), or `module:function`. It returns the model, or `(model, optimizer)`, or
            `(model, optimizer, extras)`; the optimiser may be a list of several; extras may hold `example`,
            `loss` (of model and example), `clip` (largest gradient norm) and `roles` (pattern -> role).
        widths: of the base, and a larger one; one alone: width is not compared.
        depths: likewise.

    Raises:
        ConfigError: nothing to compare, or a function that does not return these.
        PlanError: models that cannot be compared tensor by tensor; says what helps.
    """
    wide, long = _sizes(widths, "--width"), _sizes(depths, "--depth")
    name = setup if isinstance(setup, str) else getattr(setup, "__name__", type(setup).__name__)
    function = _named(setup) if isinstance(setup, str) else setup
    deep = takes_depth(function, name)
    sizes = {"base": (wide[0], long[0])}
    if len(wide) > 1:
        sizes["width"] = (wide[1], long[0])
    if len(long) > 1 and deep:
        sizes["depth"] = (wide[0], long[1])
    if len(sizes) < 2:
        raise ConfigError("the doctor compares two sizes, and there is only one", key="--width", hint="--width 64,256")
    with torch.random.fork_rng(devices=[]):
        setups = {axis: _made(function, name, *size, deep) for axis, size in sizes.items()}
        view = view_of(setups)
        law = follows(view)
        faults = [fault for judge in JUDGES if (fault := judge(view)) is not None]
        departures = tuple(_departures(view, law))
        norms = {f"width {one.width}, depth {one.depth}": (one.clip, _norms(one))
                 for one in setups.values() if one.clip is not None}  # fmt: skip
    bound = clip_binds(norms)
    faults += [bound] if bound else []
    return Diagnosis(name, sizes, law, tuple(faults), departures)


