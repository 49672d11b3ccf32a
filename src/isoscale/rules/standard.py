"""SP, the standard parametrisation: nothing depends on size. The control that must drift.

`sp` has the constant init of GPT-2 and its heirs (std `init_std`, 0.02 by default); `sp-lecun` has 1/sqrt(fan_in) on
matrices and N(0, 1) embeddings, as plain PyTorch users have it.
"""

from __future__ import annotations

from isoscale.rules.monomial import ONE, Monomial, hp, size
from isoscale.rules.table import RoleRule, SiteRule, Table

_NO_DECAY = Monomial(0.0)
_GAIN = RoleRule(hp("lr"), init_kind="one", weight_decay=_NO_DECAY)
_BIAS = RoleRule(hp("lr"), init_kind="zero", weight_decay=_NO_DECAY)

PLAIN_SITES = {
    "embedding": SiteRule(hp("alpha_emb")),
    "norm": SiteRule(),
    "hidden": SiteRule(),
    "attn_logits": SiteRule(hp("alpha_attn") * size("head_size", -1 / 2)),
    "attn_out": SiteRule(),
    "branch": SiteRule(),
    "residual_attn": SiteRule(hp("alpha_res")),
    "residual_ffn": SiteRule(hp("alpha_res")),
    "ffn_act": SiteRule(hp("alpha_ffn_act")),
    "readout": SiteRule(hp("alpha_out")),
    "loss_logits": SiteRule(hp("alpha_loss")),
}

_WEIGHT = RoleRule(hp("lr"), hp("init_std"))

SP = Table(
    name="sp",
    source="common practice (GPT-2 init)",
    roles={
        "embedding": RoleRule(hp("lr") * hp("lr_embedding"), hp("init_std")),
        "input": _WEIGHT,
        "hidden": _WEIGHT,
        "readout": _WEIGHT,
        "gain": _GAIN,
        "bias": _BIAS,
    },
    sites=PLAIN_SITES,
)

_LECUN = RoleRule(hp("lr"), size("fan_in", -1 / 2))

SP_LECUN = Table(
    name="sp-lecun",
    source="common practice (LeCun init)",
    roles={
        "embedding": RoleRule(hp("lr") * hp("lr_embedding"), ONE),
        "input": _LECUN,
        "hidden": _LECUN,
        "readout": _LECUN,
        "gain": _GAIN,
        "bias": _BIAS,
    },
    sites=PLAIN_SITES,
)
