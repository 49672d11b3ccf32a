"""Hyperparameters in base units: the global ones, and factors on them by module type and depth."""

from __future__ import annotations

import math
from typing import Annotated, NamedTuple

from pydantic import AfterValidator, Field

from isoscale._base.errors import did_you_mean
from isoscale.config.section import Positive, Section, wrong


class HpsSection(Section):
    """Hyperparameters in base units. A parametrisation reads those it knows.

    The defaults are AdamW's; an optimiser with others (lmd) has them for what is left out.
    """

    lr: Positive = Field(1.0, description="peak learning rate; lmd, madam: in log units a step")
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        0.0, description="lmd: lambda, the pull of log-medians to the prior's centre"
    )
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    eps: Positive = 1e-8
    init_std: Positive = Field(0.02, description="SP and muP")
    lr_embedding: Positive = Field(1.0, description="LR of the embedding against the global one")
    lr_rest: Positive = Field(1.0, description="muon, lmd, madam: LR of what AdamW trains against the global one")
    sigma: Annotated[Positive, Field(le=1)] = Field(0.05, description="lmd: noise on the log of each weight")
    alpha_emb: Positive = Field(1.0, description="SP and muP: multiplier after the embedding")
    alpha_attn: Positive = Field(1.0, description="attention logits")
    alpha_ffn_act: Positive = Field(1.0, description="input of the FFN non-linearity")
    alpha_res: Positive = Field(1.0, description="residual branches against the embedding")
    alpha_res_attn_ratio: Positive = Field(1.0, description="attention branches against FFN branches (u-muP)")
    alpha_out: Positive = Field(1.0, description="SP and muP: multiplier of the readout")
    alpha_loss: Positive = Field(1.0, description="logits inside the loss")


MODULE_HPS = ("lr", "weight_decay", "beta1", "beta2", "eps", "init_std", "residual")
"""What may differ by module. A factor on a beta acts on (1 - beta) / beta; `residual` weighs a residual branch."""


class ModuleKey(NamedTuple):
    """The name of one factor, `HP/TYPE`, `HP@DEPTH` or `HP/TYPE@DEPTH`.

    Args:
        hp: one of `MODULE_HPS`.
        type: a module type as the plan prints it (`attn.q`, `head`), or empty: all.
        depth: l / L of a knot, in [0, 1): block l of L blocks, log-linear between knots; None: at any depth.
    """

    hp: str
    type: str
    depth: float | None

    def __str__(self) -> str:
        kind = f"/{self.type}" if self.type else ""
        return f"{self.hp}{kind}" + ("" if self.depth is None else f"@{self.depth:g}")


def parse_key(text: str) -> ModuleKey | None:
    """A factor's name in its parts; None for the name of a global hyperparameter.

    Raises:
        ValueError: a depth that is no number in [0, 1), an empty type, an HP that cannot differ by module.
    """
    name, mark, at = text.partition("@")
    hp, slash, kind = name.partition("/")
    if not mark and not slash:
        return None
    if hp not in MODULE_HPS:
        raise ValueError(f"{hp!r} cannot differ by module; {did_you_mean(hp, MODULE_HPS)}")
    if slash and not kind:
        raise ValueError(f"{text!r} names no module type; for example {hp}/head")
    depth = None
    if mark:
        try:
            depth = float(at)
        except ValueError:
            depth = math.nan
        if not 0 <= depth < 1:
            raise ValueError(f"{at!r} is no depth: l / L in [0, 1), for example {name}@0.5")
    return ModuleKey(hp, kind, depth)


def _keys(factors: dict[str, float]) -> dict[str, float]:
    for text in factors:
        try:
            found = parse_key(text)
        except ValueError as error:
            raise wrong(text, str(error), '"lr/head" = 0.5, "lr@0.5" = 2.0') from None
        if found is None:
            hint = f"hps.{text} is the global one; here: \"{text}/head\" = 0.5"
            raise wrong(text, f"{text!r} names neither a module type nor a depth", hint)
    return factors


Modules = Annotated[dict[str, Positive], AfterValidator(_keys)]
