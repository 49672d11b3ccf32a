"""What may be switched in a parametrisation: the depth exponent, the batch and duration rules, the printed variants.

The defaults are Complete(d)P as printed (arXiv 2512.22382, table 1) at alpha = 1. Where the field disagrees (duration,
decay over tokens per parameter) the choice is the user's and stands in the plan.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from isoscale._base.errors import PlanError, did_you_mean

AXES = ("width", "depth", "batch", "duration")
QUANTITIES = ("init", "lr", "eps", "weight_decay", "betas", "multipliers")

Duration = Literal["iso-horizon", "tau-constant", "none"]
Betas = Literal["linear", "power", "constant"]
FinalNormEps = Literal["printed", "derived"]


@dataclass(frozen=True)
class Options:
    """Switches of the rules. Parametrisations without a rule for an axis ignore its switches.

    Args:
        alpha: depth exponent, in [1/2, 1]: a branch is multiplied by m_L^-alpha.
        duration_exponent: the LR falls as m_D^-exponent. 1/2 is the SDE's; others measured 0.28 to 0.32.
        duration: `iso-horizon` moves LR, decay, betas and eps with the training length; `tau-constant` only the decay,
            so that 1 / (lr x decay) stays the same share of the run; `none` nothing.
        tau_exponent: 0 keeps that share; 1/2 lets it fall as (tokens per parameter)^-1/2 (arXiv 2505.13738).
        betas: `linear` is 1 - beta times m_B / m_D as printed; `power` is beta^(m_B / m_D), which agrees to first
            order and never leaves (0, 1); `constant` keeps them.
        final_norm_eps: the final norm's eps has no width factor as printed; `derived` gives it m_N^-1, the size of
            its gradient.
        axes: whose ratios count; an axis left out is treated as if base and target agreed on it (an ablation).
        constant: quantities whose rule is switched off (an ablation): init, lr, eps, weight_decay, betas, multipliers.

    Raises:
        PlanError: alpha outside [1/2, 1], another number not finite, or a name that is not known.
    """

    alpha: float = 1.0
    duration_exponent: float = 0.5
    duration: Duration = "iso-horizon"
    tau_exponent: float = 0.0
    betas: Betas = "linear"
    final_norm_eps: FinalNormEps = "printed"
    axes: tuple[str, ...] = AXES
    constant: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for key in ("alpha", "duration_exponent", "tau_exponent"):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise PlanError(f"{key} must be a number", key=key, value=value, hint="0.5")
        if not 0.5 <= self.alpha <= 1:
            raise PlanError("alpha must lie in [1/2, 1]", key="alpha", value=self.alpha, hint="1.0, or 0.5")
        for key, top in (("duration_exponent", 1.0), ("tau_exponent", 1.0)):
            value = getattr(self, key)
            if not (math.isfinite(value) and 0 <= value <= top):
                raise PlanError(f"{key} must lie in [0, {top:g}]", key=key, value=value, hint="0.5")
        for key, choices in (
            ("duration", ("iso-horizon", "tau-constant", "none")), ("betas", ("linear", "power", "constant")),
            ("final_norm_eps", ("printed", "derived")),
        ):  # fmt: skip
            value = getattr(self, key)
            if value not in choices:
                raise PlanError(f"unknown {key} {value!r}", key=key, value=value, hint=did_you_mean(value, choices))
        for key, known in (("axes", AXES), ("constant", QUANTITIES)):
            for value in getattr(self, key):
                if value not in known:
                    raise PlanError(f"unknown name {value!r}", key=key, value=value, hint=did_you_mean(value, known))
