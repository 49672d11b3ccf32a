"""The abc symmetry: five columns move together and the training trajectory of W = A w stays the same.

Adam's update does not see the gradient's scale, so A -> A / theta must be met by B -> B theta and C -> C theta; the
gradient of w shrinks by theta, so eps -> eps / theta; decay acts as lr x decay x w, so in torch's coupled form
decay -> decay / theta keeps the product. For SGD the step carries the gradient, hence C -> C theta^2 and decay ->
decay / theta^2 (arXiv 2407.17465 section 2.1; eps and decay are part of the law although the paper omits them).
"""

from __future__ import annotations

from dataclasses import replace

from isoscale._base.errors import PlanError
from isoscale.rules.families import family
from isoscale.rules.monomial import Monomial
from isoscale.rules.table import RoleRule, Table


def shift(table: Table, role: str, theta: Monomial, optimizer: str = "adamw") -> Table:
    """The table with one role's factor moved out of the forward by `theta`.

    Args:
        table: the parametrisation to shift.
        role: which role moves.
        theta: the factor, e.g. `size("fan_in", 1/2)`; any positive monomial.
        optimizer: the family whose law is applied.

    Raises:
        PlanError: an unknown optimiser or one whose updates no factor leaves alone, a theta that is not positive, a
            role whose input gradient has a factor of its own (no single theta moves both), or a constant non-zero init,
            which cannot be scaled.
    """
    law = family(optimizer)
    if not law.exact:
        raise PlanError(f"the abc symmetry is not exact for {optimizer}", key="optimizer", value=optimizer)
    if not theta.coefficient > 0:
        raise PlanError("theta must be positive", key="theta", value=theta.coefficient)
    rule = table.role(role)
    if rule.input_grad is not None:
        raise PlanError(
            f"{table.name}: the role {role!r} has different forward and backward factors, so it cannot be shifted",
            key=role, hint="shift a role whose factors agree, or remove input_grad first",
        )  # fmt: skip
    if rule.init_kind == "one":
        raise PlanError(f"the role {role!r} starts at the constant 1, which a shift would change", key=role)
    return replace(table, name=f"{table.name}+shift", roles={**table.roles, role: move(rule, theta, law.lr_power)})


def move(rule: RoleRule, theta: Monomial, power: float) -> RoleRule:
    """One role's columns after `theta` has left the forward, for an optimiser whose LR moves as theta^power.

    Under SGD the coupled decay moves as theta^-2, which `theta^-power` is; eps scales with the gradient.
    """
    return replace(
        rule,
        forward=rule.forward / theta,
        init=rule.init * theta,
        lr=rule.lr * theta**power,
        eps=rule.eps / theta,
        weight_decay=rule.weight_decay / theta**power,
    )
