"""What a check is asked to do, refused at birth where it makes no sense."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from isoscale._base.errors import ConfigError, did_you_mean
from isoscale.rules import FAMILIES, by_name

BARE = ("adamw", "sgd")
NONE = "none"
UNIT_LR, PLAIN_LR = 0.25, 1e-3


@dataclass(frozen=True)
class CheckSettings:
    """Sizes, rule and effort of one check.

    Args:
        widths: widths of the width axis (depth at base); a single one means no width axis.
        depths: depths of the depth axis (width at base); a single one means no depth axis.
        rule: a parametrisation, or `none` for the model as it is: its own init, one LR for all tensors.
        base_width: where the rule's ratios are 1; the smallest width if None.
        base_depth: likewise; the smallest depth if None.
        steps: optimiser steps of the coordinate check.
        seeds: runs of each size; each has its own init and its own order of the data.
        lr: peak learning rate, in base units; None: the optimiser's own default (lmd, madam), else 1e-3, or 0.25 under
            a unit-scaled rule.
        optimizer: a family of `isoscale.rules.FAMILIES`; without a rule `adamw` or `sgd`.
        data: text file or folder; None: the text that comes with isoscale.
        transfer: also sweep the LR at the smallest and the largest sizes.
        transfer_steps: steps of each run of that sweep.

    Raises:
        ConfigError: names the setting at fault.
    """

    widths: tuple[int, ...] = (64, 128, 256)
    depths: tuple[int, ...] = (2, 4, 8)
    rule: str = "complete-d"
    base_width: int | None = None
    base_depth: int | None = None
    steps: int = 5
    seeds: int = 3
    lr: float | None = None
    optimizer: str = "adamw"
    data: str | None = None
    transfer: bool = False
    transfer_steps: int = 200

    def __post_init__(self) -> None:
        for name in ("widths", "depths"):
            sizes, flag = getattr(self, name), f"--{name[:-1]}"
            if not sizes or any(type(size) is not int or size < 1 for size in sizes):
                raise ConfigError("sizes are whole numbers of at least 1", key=flag, value=sizes, hint=f"{flag} 2,4,8")
            if len(set(sizes)) < len(sizes):
                raise ConfigError("a size is given twice", key=flag, value=sizes)
            object.__setattr__(self, name, tuple(sorted(sizes)))
        for name, least in (("steps", 1), ("seeds", 1), ("transfer_steps", 10), ("base_width", 1), ("base_depth", 1)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < least):
                raise ConfigError(f"a whole number of at least {least}", key=f"--{name.replace('_', '-')}", value=value)
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise ConfigError("a learning rate is positive and finite", key="--lr", value=self.lr, hint="--lr 1e-3")
        if self.rule != NONE:
            by_name(self.rule)  # refuses an unknown name
        known = BARE if self.rule == NONE else tuple(FAMILIES)
        if self.optimizer not in known:
            hint = did_you_mean(self.optimizer, known)
            raise ConfigError("unknown optimiser", key="--optimizer", value=self.optimizer, hint=hint)

    @property
    def unit(self) -> bool:
        """Whether the rule needs a model made of unit-scaled ops."""
        return self.rule != NONE and by_name(self.rule).unit

    @property
    def peak_lr(self) -> float:
        """The learning rate that is used."""
        if self.lr is not None:
            return self.lr
        return FAMILIES[self.optimizer].defaults(self.unit).get("lr", UNIT_LR if self.unit else PLAIN_LR)

    @property
    def base(self) -> tuple[int, int]:
        """Width and depth of the base."""
        return self.base_width or self.widths[0], self.base_depth or self.depths[0]

    def axes(self, has_depth: bool) -> dict[str, list[tuple[int, int]]]:
        """Axis -> (width, depth) of its models, from small to large; an axis of one size is left out.

        Raises:
            ConfigError: no axis has two sizes.
        """
        width, depth = self.base
        out = {"width": [(size, depth) for size in self.widths], "depth": [(width, size) for size in self.depths]}
        if not has_depth:
            out["depth"] = []
        out = {axis: models for axis, models in out.items() if len(models) > 1}
        if not out:
            raise ConfigError("a check compares sizes, and there is only one", key="--width", hint="--width 64,128,256")
        return out

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {field.name: getattr(self, field.name) for field in fields(self)}
