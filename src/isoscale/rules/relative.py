"""Relative sign updates (LMD, Madam): how Adam's table becomes one in log units. Derived here, not from a paper.

LMD holds w = m+ - m- and adds -alpha s to log m+ and +alpha s to log m-, |s| = 1. In the exact form m+ m- = b^2, so a
step moves w by alpha (m+ + m-) = alpha sqrt(w^2 + 4 b^2), and b is a share of rms(w_0). So a step moves a weight by
alpha x the init's size, where Adam's moves it by the LR: **alpha = Adam's LR / init std**, in sizes. Under muP's family
that is m_N^-1/2 for hidden weights, (1/m_N) / (m_N^-1/2), and constant for input weights and the readout, whose LR and
init move together; depth, batch and length enter as they do in Adam's LR. Madam's w exp(-alpha d sign w), d about a
sign, moves w by alpha |w|: the same.
- Moving a factor out of the forward (abc) leaves alpha as it is, exactly: the LR falls with the init, and b, the
  prior's centre and Madam's bound are shares of rms(w_0).
- Decay: the pull towards log b has the coefficient lambda inside the step, -alpha (s + lambda R). It sets two things:
  the farthest that a log-median can go, 1 / lambda, and the time to get there, 1 / (alpha lambda). Both cannot stay
  when alpha moves. Kept is the *time* as a share of the run: alpha lambda moves as Adam's LR x decay does. The reason:
  log-displacements of all weights then keep their shape, log m(t) = log m(0) + m_N^-1/2 f(t / T) for hidden weights,
  and the bound shrinks with them. `constant=("weight_decay",)` keeps the bound, 1 / lambda, instead.
- sigma stays: noise is a share of the weights, so outputs have it as the same share at any fan-in.
- Betas average gradients over time and follow Adam's rule.

What starts at zero or one has no size to be relative to; and an embedding's rows are moved by stale signs while their
tokens are absent. So matrices of the roles below are trained this way, and all else by AdamW at lr x lr_rest.

Unit-scaled tables: the gradient's factors do not matter to a sign. Their decay is independent of the LR; lambda cannot
be, being the inverse of a distance. `weight_decay` is lambda at alpha = lr here, and alpha x lambda = lr x weight_decay
for every tensor, AdamW's too. `decay="independent"` makes alpha x lambda the hyperparameter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from isoscale.rules.monomial import ONE, Monomial, hp, size
from isoscale.rules.table import RoleRule, Table, each

ROLES = ("hidden", "input", "readout", "router")
"""Roles that are trained by factors, where they have two dimensions or more."""


_TO_BASE = {"fan_in": size("fan_in_ratio"),
            "fan_out_share": size("fan_out_over_in_ratio") * size("muon_original_ratio", -2)}  # fmt: skip
"""Absolute sizes of an init as ratios to the base, where alpha is the hyperparameter itself."""


def _init(rule: RoleRule, table: Table) -> Monomial:
    """How the size of the initial weights moves from base to target."""
    out = ONE
    if table.needs_base or table.unit:  # else standard practice: one LR for all, and no rule to convert
        for name, power in rule.init.sizes.items():
            out = out * _TO_BASE.get(name, size(name)) ** power
    return out


def _with_the_lr(table: Table) -> Table:
    """The table with its independent decay, if it has one, as lr x weight_decay a step for every tensor."""
    if not table.independent_decay:
        return table

    def change(rule: RoleRule) -> RoleRule:
        if not rule.weight_decay.coefficient:
            return rule
        return replace(rule, weight_decay=hp("weight_decay") * hp("lr") / rule.lr)

    return each(table, change, table.optimizer, independent_decay=False, stack_decay=ONE / table.stack_lr)


def relative(name: str, decays: bool = True) -> Callable[[Table], Table]:
    """What makes the table of a relative optimiser from Adam's.

    Args:
        name: of the family.
        decays: whether it has a decay.
    """

    def derive(table: Table) -> Table:
        def change(rule: RoleRule) -> RoleRule:
            init = _init(rule, table)
            decay = rule.weight_decay * init if decays else Monomial(0.0)
            return replace(rule, lr=rule.lr / init, weight_decay=decay)

        rest = each(table, lambda rule: replace(rule, lr=rule.lr * hp("lr_rest")), "adamw")
        table = _with_the_lr(table)
        roles = {role: change(table.role(role)) for role in ROLES}
        return replace(table, roles=roles, dims=range(2, 64), optimizer=name, rest=_with_the_lr(rest))

    return derive
