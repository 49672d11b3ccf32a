"""A parametrisation as one table: what each role gets (forward, init, LR, eps, decay), and each site of the forward.

Quantities follow the abc notation of Tensor Programs V: W = A w, w_0 ~ N(0, B^2), w moves by C x (optimiser update).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

from isoscale._base.errors import PlanError, did_you_mean
from isoscale.rules.monomial import ONE, Monomial, hp

ROLES = ("embedding", "input", "hidden", "readout", "gain", "bias")
"""What a parameter is for. `input` is a dense layer whose fan-in does not grow with width."""

SITE_KINDS = (
    "embedding", "norm", "hidden", "attn_logits", "attn_out", "branch", "residual_attn", "residual_ffn",
    "ffn_act", "readout", "loss_logits",
)  # fmt: skip

HP_DEFAULTS: Mapping[str, float] = MappingProxyType({
    "lr": 1.0, "weight_decay": 0.0, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "init_std": 0.02, "lr_embedding": 1.0,
    "alpha_emb": 1.0, "alpha_attn": 1.0, "alpha_ffn_act": 1.0, "alpha_res": 1.0, "alpha_res_attn_ratio": 1.0,
    "alpha_out": 1.0, "alpha_loss": 1.0,
})  # fmt: skip
"""Every hyperparameter that some table reads, in base units."""


@dataclass(frozen=True)
class RoleRule:
    """The row of one role.

    Args:
        lr: C, the learning rate.
        init: B, the standard deviation of a normal init (ignored for constants).
        init_kind: `normal`, or the constants `one` and `zero`.
        forward: A, the factor on the weight; under unit scaling the op applies it and this row reports it.
        input_grad: the factor of the input gradient, where it differs from A (unit scaling); None: the same as A.
        weight_decay: what AdamW gets under coupled decay, so lr x weight_decay is one step's decay at peak LR.
        eps: Adam's epsilon.
    """

    lr: Monomial
    init: Monomial = ONE
    init_kind: Literal["normal", "one", "zero"] = "normal"
    forward: Monomial = ONE
    input_grad: Monomial | None = None
    weight_decay: Monomial = field(default_factory=lambda: hp("weight_decay"))
    eps: Monomial = field(default_factory=lambda: hp("eps"))


@dataclass(frozen=True)
class SiteRule:
    """The row of one kind of place in the forward.

    Args:
        multiplier: the factor applied there; None where nothing is set; `tau` marks the residual rule of u-muP.
        expected: the predicted rms of the tensor there at init; None where the parametrisation predicts none.
    """

    multiplier: Monomial | Literal["tau"] | None = None
    expected: Monomial | None = None


@dataclass(frozen=True)
class Table:
    """A whole parametrisation.

    Args:
        name: as users type it.
        source: paper and table.
        roles: role -> RoleRule.
        sites: site kind -> SiteRule.
        stack_lr: an extra LR factor for parameters inside the depth stack.
        unit: whether it needs a model made of unit-scaled ops.
        independent_decay: whether decay is independent of the LR (else as torch has it: lr x weight_decay).
        needs_base: whether its rules hold ratios to a base.
        optimizer: the family that the LR column is for.
    """

    name: str
    source: str
    roles: Mapping[str, RoleRule]
    sites: Mapping[str, SiteRule]
    stack_lr: Monomial = ONE
    unit: bool = False
    independent_decay: bool = False
    needs_base: bool = False
    optimizer: str = "adamw"

    def __post_init__(self) -> None:
        object.__setattr__(self, "roles", MappingProxyType(dict(self.roles)))
        object.__setattr__(self, "sites", MappingProxyType(dict(self.sites)))

    def role(self, name: str) -> RoleRule:
        """The rule of a role.

        Raises:
            PlanError: the table has no such role.
        """
        if name not in self.roles:
            raise PlanError(
                f"{self.name} has no rule for the role {name!r}", key=name, hint=did_you_mean(name, self.roles)
            )
        return self.roles[name]

    def with_role(self, name: str, **changes: object) -> Table:
        """A copy with some quantities of one role replaced (how an ablation is written)."""
        return replace(self, roles={**self.roles, name: replace(self.role(name), **changes)})  # type: ignore[arg-type]

    def resolved(self, role: str, in_stack: bool) -> RoleRule:
        """The rule of a role with the stack's LR factor and the decay mode worked in.

        Independent decay (u-muP section 3.1): lr x weight_decay = weight_decay at peak, whatever the LR; it still
        follows the schedule. A role that is never decayed (gain, bias) stays so.
        """
        rule = self.role(role)
        rate = rule.lr * self.stack_lr if in_stack else rule.lr
        decay = rule.weight_decay
        if self.independent_decay and decay.coefficient != 0:
            decay = hp("weight_decay") / rate
        return replace(rule, lr=rate, weight_decay=decay)
