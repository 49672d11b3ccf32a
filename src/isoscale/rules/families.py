"""Optimiser families: how a table for Adam becomes one for SGD, Lion, Muon, Adafactor, Madam or LMD.

What differs is one fact: how an update depends on the size of the gradient and of the weight. With Adam's LR column
known, the others follow: SGD's update carries the gradient, so its LR is Adam's divided by the gradient's size (this
gives Tensor Programs V's SGD rows); a sign's does not, so Lion's is Adam's; Adafactor's carries the weight's rms, so
its LR is Adam's divided by the init std; Muon's matrix update has spectral norm 1 before its own shape factor, so the
LR has to supply what is left of sqrt(fan_out / fan_in) (arXiv 2310.17813). Batch and length: SGD's LR is linear in
m_B / m_D (its SDE), the others take Adam's square root; Muon's momentum is left alone, as its ports do.
Madam and LMD step in log units: see `relative.py`.
All of this but Adam's rows is derived here, not printed in the papers; SGD's width rows are Tensor Programs V's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from isoscale._base.errors import PlanError, did_you_mean
from isoscale.rules.monomial import ONE, Monomial, hp, size
from isoscale.rules.relative import relative
from isoscale.rules.table import RoleRule, Table, each


@dataclass(frozen=True)
class Family:
    """One kind of optimiser.

    Args:
        name: as users type it.
        classes: class names of optimisers that behave so.
        lr_power: of theta in the abc symmetry (A, B, C) -> (A / theta, B theta, C theta^power).
        exact: whether that symmetry is exact for it.
        fields: keys that its parameter groups take besides lr.
        derive: Adam's table -> this family's.
        hps: hyperparameters whose default is not the common one (`HP_DEFAULTS`).
        unit_hps: the same for unit-scaled tables, whose rules are absolute.
        unit: whether it takes unit-scaled tables, whose gradients carry factors: those whose update does not see them.
        relative: whether a step multiplies weights, so that its LR is in log units: one over 1 is refused, and a tensor
            that starts at zero is left to the rest.
        whole: whether one optimiser object trains both kinds; its groups then name theirs under `optimizer`.
    """

    name: str
    classes: tuple[str, ...]
    lr_power: float
    exact: bool
    fields: tuple[str, ...]
    derive: Callable[[Table], Table]
    hps: Mapping[str, float] = field(default_factory=dict)
    unit_hps: Mapping[str, float] = field(default_factory=dict)
    unit: bool = False
    relative: bool = False
    whole: bool = False

    def defaults(self, unit: bool) -> dict[str, float]:
        """What a user who says nothing gets, over `HP_DEFAULTS`.

        Args:
            unit: for a unit-scaled table.
        """
        return {**self.hps, **(self.unit_hps if unit else {})}


def _sgd(table: Table) -> Table:
    def change(rule: RoleRule) -> RoleRule:
        if not table.needs_base:  # standard practice has no rule to convert
            return rule
        grad = size("fan_out_ratio", -1) * rule.forward.of_sizes()
        decay = rule.weight_decay * grad if rule.weight_decay.coefficient else rule.weight_decay
        return replace(rule, lr=rule.lr / grad, weight_decay=decay)

    # what lr x decay moves by: all of it goes into SGD's LR
    run = replace(table.run, lr=table.run.lr * table.run.decay, decay=ONE)
    return each(table, change, "sgd", stack_lr=table.stack_lr / table.stack_grad, run=run)


def _sign(table: Table) -> Table:
    return each(table, lambda rule: rule, "lion")


def _adafactor(table: Table) -> Table:
    def change(rule: RoleRule) -> RoleRule:
        if rule.init_kind != "normal":
            return rule
        init = rule.init.of_sizes()
        decay = rule.weight_decay * init if rule.weight_decay.coefficient else rule.weight_decay
        return replace(rule, lr=rule.lr / init, weight_decay=decay)

    return each(table, change, "adafactor", betas="constant")


def _muon(name: str, left: Monomial) -> Callable[[Table], Table]:
    """`left`: what Muon's own shape factor leaves of sqrt(fan_out / fan_in)."""

    def derive(table: Table) -> Table:
        rest = each(table, lambda rule: replace(rule, lr=rule.lr * hp("lr_rest")), "adamw")
        hidden = table.role("hidden")
        if not table.needs_base:
            left_over, decay = ONE, hidden.weight_decay
        else:
            left_over, decay = left, hp("weight_decay") / left
        rule = replace(hidden, lr=hp("lr") * left_over, weight_decay=decay)
        return replace(table, roles={"hidden": rule}, dims=range(2, 3), optimizer=name, betas="constant", rest=rest)

    return derive


_ADAM = ("weight_decay", "betas", "eps")
_SGD = ("weight_decay", "momentum")
_LMD_HPS = {"lr": 0.02, "beta2": 0.99, "weight_decay": 0.1, "lr_rest": 0.15}
# half of that at fan-in 64: the readout gets lr itself there; 0.04 to 0.16 ended within 0.05 nats in short runs
_LMD_UNIT = {"lr": 0.08, "weight_decay": 0.025, "lr_rest": 12.0}

FAMILIES: Mapping[str, Family] = MappingProxyType({
    family.name: family
    for family in (
        Family("adamw", ("AdamW", "Adam", "NAdam", "RAdam", "Adam8bit", "AdamW8bit"), 1.0, True, _ADAM,
               lambda table: table, unit=True),
        Family("sgd", ("SGD",), 2.0, True, _SGD, _sgd),
        Family("lion", ("Lion", "SignSGD", "Signum"), 1.0, True, ("weight_decay", "betas"), _sign, unit=True),
        # torch.optim.Muon, adjust_lr_fn "original": updates times sqrt(max(1, fan_out / fan_in))
        Family("muon", ("Muon",), 1.0, True, _SGD,
               _muon("muon", size("fan_out_over_in_ratio", 1 / 2) * size("muon_original_ratio", -1))),
        # adjust_lr_fn "match_rms_adamw": updates times 0.2 sqrt(max(fan_out, fan_in))
        Family("muon-rms", (), 1.0, True, _SGD,
               _muon("muon-rms", size("fan_out_over_in_ratio", 1 / 2) * size("muon_rms_ratio", -1))),
        Family("adafactor", ("Adafactor",), 0.0, False, ("weight_decay",), _adafactor),
        Family("lmd", ("LMD",), 0.0, True, ("sigma", "betas", "decay"), relative("lmd"), _LMD_HPS, _LMD_UNIT,
               unit=True, relative=True, whole=True),
        Family("madam", ("Madam",), 0.0, True, ("beta",), relative("madam", decays=False),
               {"lr": 0.01, "beta2": 0.999, "lr_rest": 0.3}, {"lr": 0.08, "lr_rest": 12.0}, unit=True, relative=True),
    )
})  # fmt: skip


def family(name: str) -> Family:
    """A family by name.

    Raises:
        PlanError: unknown; the nearest ones are suggested.
    """
    if name not in FAMILIES:
        raise PlanError(
            f"unknown optimiser {name!r}", key="optimizer", value=name, hint=did_you_mean(name, FAMILIES)
        )  # fmt: skip
    return FAMILIES[name]
