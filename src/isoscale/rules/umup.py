"""u-muP (arXiv 2407.17465, table 2): muP moved by the abc symmetry until every weight starts at N(0, 1).

Base-free in width and depth. The forward and gradient factors below are *owned by the unit-scaled ops*; the table
reports them, and a contract test holds the two equal. The embedding LR, lr x fan_out^-1/2, is empirical (the authors
could not justify it by theory); `embedding_lr = "constant"` switches it off. Weight decay is independent of the LR.
"""

from __future__ import annotations

from isoscale.rules.monomial import ONE, Monomial, hp, size
from isoscale.rules.table import RoleRule, SiteRule, Table

_NO_DECAY = Monomial(0.0)
_UNIT = SiteRule(expected=ONE)

UMUP = Table(
    name="u-mup",
    source="arXiv 2407.17465, table 2",
    roles={
        "embedding": RoleRule(hp("lr") * hp("lr_embedding") * size("fan_out", -1 / 2)),
        "input": RoleRule(hp("lr"), forward=size("fan_in", -1 / 2)),
        "hidden": RoleRule(hp("lr") * size("fan_in", -1 / 2), forward=size("fan_in", -1 / 2)),
        "readout": RoleRule(hp("lr"), forward=size("fan_in", -1), input_grad=size("fan_out", -1 / 2)),
        "gain": RoleRule(hp("lr"), init_kind="one", weight_decay=_NO_DECAY),
        "bias": RoleRule(hp("lr"), init_kind="zero", weight_decay=_NO_DECAY),
    },
    sites={
        "embedding": SiteRule(ONE, expected=ONE),
        "norm": _UNIT,
        "hidden": _UNIT,
        "attn_logits": SiteRule(
            hp("alpha_attn") * size("head_size", -1), expected=hp("alpha_attn") * size("head_size", -1 / 2)
        ),
        "attn_out": _UNIT,
        "branch": _UNIT,
        "residual_attn": SiteRule("tau", expected=ONE),
        "residual_ffn": SiteRule("tau", expected=ONE),
        "ffn_act": SiteRule(hp("alpha_ffn_act"), expected=ONE),
        "readout": SiteRule(ONE, expected=size("fan_in", -1 / 2)),
        "loss_logits": SiteRule(hp("alpha_loss"), expected=hp("alpha_loss") * size("fan_in", -1 / 2)),
    },
    stack_lr=size("stack_depth", -1 / 2),
    tau_share=size("stack_depth", -1),
    unit=True,
    independent_decay=True,
)
