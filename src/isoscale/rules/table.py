"""A parametrisation as one table: what each role gets (forward, init, LR, eps, decay), and each site of the forward.

Quantities follow the abc notation of Tensor Programs V: W = A w, w_0 ~ N(0, B^2), w moves by C x (optimiser update).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

from isoscale._base.errors import PlanError, did_you_mean
from isoscale.rules.monomial import ONE, Monomial, hp

ROLES = (
    "embedding", "input", "hidden", "readout", "router", "gain", "bias", "vector", "finite", "final_norm",
)  # fmt: skip
"""What a parameter is for.

embedding: a table looked up or added to the stream (tokens, positions, a class token); input: a dense layer or
convolution whose fan-in does not grow with width; hidden: both fans grow, or the fan-in does inside the stack;
readout: the fan-in grows, the fan-out (classes) does not; router: a readout inside the stack that chooses experts;
gain: of a norm; bias; vector: any other parameter along the width (a Mamba's A_log, a layer scale); finite: no extent
grows (a QK norm's gain shared over heads, a readout's bias); final_norm: gain and bias of the norm after the stack.
"""

_LIKE = {"router": "readout", "vector": "gain", "finite": "gain", "final_norm": "gain"}
"""Where a table says nothing of a role, it is treated as this one."""

SITE_KINDS = (
    "embedding", "norm", "hidden", "attn_logits", "attn_out", "branch", "residual_attn", "residual_ffn",
    "ffn_act", "readout", "loss_logits",
)  # fmt: skip

HP_DEFAULTS: Mapping[str, float] = MappingProxyType({
    "lr": 1.0, "weight_decay": 0.0, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "init_std": 0.02, "lr_embedding": 1.0,
    "alpha_emb": 1.0, "alpha_attn": 1.0, "alpha_ffn_act": 1.0, "alpha_res": 1.0, "alpha_res_attn_ratio": 1.0,
    "alpha_out": 1.0, "alpha_loss": 1.0, "lr_rest": 1.0, "sigma": 0.05,
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
class RunRule:
    """What batch and training length do, to every parameter alike.

    Args:
        lr, eps: factors.
        decay: of the coupled (torch's) weight decay.
        step_decay: of a step's whole decay, lr x decay.
    """

    lr: Monomial = ONE
    eps: Monomial = ONE
    decay: Monomial = ONE
    step_decay: Monomial = ONE


@dataclass(frozen=True)
class Table:
    """A whole parametrisation.

    Args:
        name: as users type it.
        source: paper and table.
        roles: role -> RoleRule.
        sites: site kind -> SiteRule.
        stack_lr, stack_eps, stack_decay: extra factors for parameters inside the depth stack.
        stack_grad: how the size of a gradient in the stack depends on depth.
        run: factors from batch and training length, for every parameter.
        betas: in which form they do.
        tied_readout: the readout's forward factor where it shares the embedding's weight; None: as untied.
        tau_share: under unit scaling, what one pair of branches adds to the variance of the stream.
        unit: whether it needs a model made of unit-scaled ops.
        independent_decay: whether decay is independent of the LR (else as torch has it: lr x weight_decay).
        needs_base: whether its rules hold ratios to a base.
        optimizer: the family that the LR column is for.
        rest: table of the parameters that this optimiser does not train (Muon trains matrices only).
        dims: numbers of dimensions that it trains, where there is a rest.
    """

    name: str
    source: str
    roles: Mapping[str, RoleRule]
    sites: Mapping[str, SiteRule]
    stack_lr: Monomial = ONE
    stack_eps: Monomial = ONE
    stack_decay: Monomial = ONE
    stack_grad: Monomial = ONE
    run: RunRule = RunRule()
    betas: Literal["linear", "power", "constant"] = "constant"
    tied_readout: Monomial | None = None
    tau_share: Monomial = ONE
    unit: bool = False
    independent_decay: bool = False
    needs_base: bool = False
    optimizer: str = "adamw"
    rest: Table | None = None
    dims: range = range(64)

    def __post_init__(self) -> None:
        object.__setattr__(self, "roles", MappingProxyType(dict(self.roles)))
        object.__setattr__(self, "sites", MappingProxyType(dict(self.sites)))

    def role(self, name: str) -> RoleRule:
        """The rule of a role.

        Raises:
            PlanError: the table has no such role.
        """
        name = _LIKE.get(name, name) if name not in self.roles else name
        if name not in self.roles:
            raise PlanError(
                f"{self.name} has no rule for the role {name!r}", key=name, hint=did_you_mean(name, self.roles)
            )
        return self.roles[name]

    def owner(self, role: str, dims: int) -> Table:
        """The table that a parameter's rule is in: this one, or `rest` for what this optimiser does not train.

        Args:
            role: of the parameter.
            dims: its number of dimensions.
        """
        return self if self.rest is None or (role in self.roles and dims in self.dims) else self.rest

    def with_role(self, name: str, **changes: object) -> Table:
        """A copy with some quantities of one role replaced (how an ablation is written)."""
        return replace(self, roles={**self.roles, name: replace(self.role(name), **changes)})  # type: ignore[arg-type]

    def resolved(self, role: str, in_stack: bool) -> RoleRule:
        """The rule of a role with the factors of stack and run and the decay mode worked in.

        Independent decay (u-muP section 3.1): lr x weight_decay = weight_decay at peak, whatever the LR; it still
        follows the schedule. A role that is never decayed (gain, bias) stays so.
        """
        rule = self.role(role)
        rate, eps = rule.lr * self.run.lr, rule.eps * self.run.eps
        if in_stack:
            rate, eps = rate * self.stack_lr, eps * self.stack_eps
        decay = rule.weight_decay
        if decay.coefficient != 0:
            decay = decay * self.run.decay * (self.stack_decay if in_stack else ONE)
            if self.independent_decay:
                decay = hp("weight_decay") * self.run.step_decay / rate
        return replace(rule, lr=rate, eps=eps, weight_decay=decay)

    def scaled_beta(self, beta: float, ratio: float) -> float:
        """See `scaled_beta`."""
        return scaled_beta(beta, ratio, self.betas)


def each(table: Table, change: Callable[[RoleRule], RoleRule], name: str, **fields: object) -> Table:
    """The table of another optimiser: `change` on every role, and other fields."""
    roles = {role: change(rule) for role, rule in table.roles.items()}
    return replace(table, roles=roles, optimizer=name, **fields)  # type: ignore[arg-type]


def scaled_beta(beta: float, ratio: float, form: str) -> float:
    """A beta tuned at the base, where the target takes `ratio` = m_B / m_D times as much of a run per step.

    Raises:
        PlanError: the linear form has left [0, 1).
    """
    if form == "constant" or ratio == 1.0:
        return beta
    if form == "power":
        return float(beta**ratio)
    out = 1.0 - (1.0 - beta) * ratio
    if out < 0:
        raise PlanError(
            f"1 - beta = {1 - beta:g} times m_B / m_D = {ratio:g} leaves the range: no beta is {out:g}",
            key="betas", value=beta, hint="betas='power' is beta^(m_B / m_D), which stays in (0, 1)",
        )  # fmt: skip
    return out
