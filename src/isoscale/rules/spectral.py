"""The spectral condition (arXiv 2310.17813): ||W|| and ||dW|| of order sqrt(fan_out / fan_in).

Init std is fan_in^-1/2 x min(1, sqrt(fan_out / fan_in)), base-free. Adam's update has entries of order one and, being
nearly of rank one, the spectral norm lr x sqrt(fan_in x fan_out); the condition then asks for lr ~ 1 / fan_in, which is
taken as a ratio to the base so that the LR is in the user's units. A lookup table has fan-in 1.
"""

from __future__ import annotations

from isoscale.rules.monomial import ONE, hp, size
from isoscale.rules.standard import PLAIN_SITES
from isoscale.rules.table import RoleRule, SiteRule, Table

_INIT = size("fan_in", -1 / 2) * size("fan_out_share", 1 / 2)
_MATRIX = RoleRule(
    hp("lr") * size("fan_in_ratio", -1), _INIT, weight_decay=hp("weight_decay") * size("fan_in_ratio")
)  # fmt: skip

SPECTRAL = Table(
    name="spectral",
    source="arXiv 2310.17813, condition 1",
    roles={
        "embedding": RoleRule(hp("lr") * hp("lr_embedding"), ONE),
        "input": _MATRIX,
        "hidden": _MATRIX,
        "readout": _MATRIX,
        "gain": RoleRule(hp("lr"), init_kind="one"),
        "bias": RoleRule(hp("lr"), init_kind="zero"),
    },
    sites={
        **PLAIN_SITES,
        "attn_logits": SiteRule(hp("alpha_attn") * size("head_size", -1 / 2) * size("head_size_ratio", -1 / 2)),
    },
    tied_readout=hp("alpha_out") * size("fan_in", -1),
    needs_base=True,
)
"""`fan_out_share` is min(1, fan_out / fan_in)."""
