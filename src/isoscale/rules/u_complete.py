"""u-muP completed: u-muP's unit scales with Complete(d)P's depth exponent, batch and duration factors and eps. Ours.

Derived from Complete(d)P by moving every weight to N(0, 1) with the abc symmetry (arXiv 2407.17465, section 2.1):
A = fan_in^-1/2 for hidden weights, 1/fan_in for the readout, so LR and init columns follow from Complete(d)P's.
- Residual: u-muP's tau rule is x + w f(x) with w = alpha_res / sqrt(depth), rescaled to unit variance after every add,
  an exact move for normed blocks. Here w = alpha_res x base_depth^-1/2 x m_L^-alpha; at alpha = 1/2 that is u-muP's.
- LR in the stack: base_depth^-1/2 x m_L^(alpha - 1), u-muP's at alpha = 1/2.
- eps: unit-scaled gradients are of order one at any width and depth, so no factor of them is left. The weight gradient
  is a sum over tokens times 1 / sqrt(tokens), so eps_b / s in a mean's units is eps_b x m_D^1/2 here.
- Decay: independent as in u-muP, times m_B / m_D.

Departures from Complete(d)P, kept on purpose: the embedding's LR x fan_out^-1/2 (`embedding_lr="constant"` undoes it)
and decay independent of the LR, hence of depth (`decay="coupled"` undoes it). With both undone, no clipping, and eps
multiplied by each tensor's gradient factor, the two train the same function step for step. The tau rule need not go: it
is an exact move itself, as is the norm's scale.
"""

from __future__ import annotations

from dataclasses import replace

from isoscale.rules.complete import run_rule
from isoscale.rules.monomial import Monomial, hp, size
from isoscale.rules.options import Options
from isoscale.rules.table import RoleRule, Table
from isoscale.rules.umup import UMUP


def u_complete_d(options: Options) -> Table:
    """The table at the given options; needs the base's depth."""
    run = run_rule(options)
    whole = options.duration == "iso-horizon"

    def coupled(rule: RoleRule) -> RoleRule:
        if rule.weight_decay.coefficient == 0:
            return rule
        return replace(rule, weight_decay=hp("weight_decay") / Monomial(sizes=rule.lr.sizes))

    return replace(
        UMUP,
        name="u-complete-d",
        source=f"isoscale, from arXiv 2407.17465 table 2 and 2512.22382 table 1, alpha {options.alpha:g}",
        roles={name: coupled(rule) for name, rule in UMUP.roles.items()},
        stack_lr=size("base_depth", -1 / 2) * size("depth_ratio", options.alpha - 1),
        tau_share=size("base_depth", -1) * size("depth_ratio", -2 * options.alpha),
        betas=options.betas,
        needs_base=True,
        run=replace(run, eps=size("token_ratio", 1 / 2) if whole else Monomial()),
    )
