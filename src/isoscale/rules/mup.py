"""muP in the form of Tensor Programs V, table 8, for Adam (width only), with the multipliers its users sweep.

Ratios are to the base model's own fan-in of the same tensor, so a model at base size is the SP model bit for bit.
Attention: 1/d logits relative to the base head size, i.e. alpha_attn x head_size^-1/2 x head_size_ratio^-1/2.
The two other forms of the paper are the same training by the abc symmetry, and are made by it.
Decay: lr x weight_decay of a hidden matrix is kept at its base value (the weight decay of a hidden matrix grows as its
LR shrinks), as microsoft/mup's MuAdamW does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from isoscale.rules.monomial import ONE, Monomial, hp, size
from isoscale.rules.shift import shift
from isoscale.rules.standard import PLAIN_SITES
from isoscale.rules.table import RoleRule, SiteRule, Table

_NO_DECAY = Monomial(0.0)

MUP = Table(
    name="mup",
    source="arXiv 2203.03466, table 8 (Adam)",
    roles={
        "embedding": RoleRule(hp("lr") * hp("lr_embedding"), hp("init_std")),
        "input": RoleRule(hp("lr"), hp("init_std")),
        "hidden": RoleRule(
            hp("lr") * size("fan_in_ratio", -1),
            hp("init_std") * size("fan_in_ratio", -1 / 2),
            weight_decay=hp("weight_decay") * size("fan_in_ratio"),
        ),
        "readout": RoleRule(hp("lr"), hp("init_std"), forward=hp("alpha_out") * size("fan_in_ratio", -1)),
        "gain": RoleRule(hp("lr"), init_kind="one", weight_decay=_NO_DECAY),
        "bias": RoleRule(hp("lr"), init_kind="zero", weight_decay=_NO_DECAY),
    },
    sites={
        **PLAIN_SITES,
        "attn_logits": SiteRule(hp("alpha_attn") * size("head_size", -1 / 2) * size("head_size_ratio", -1 / 2)),
        "readout": SiteRule(hp("alpha_out") * size("fan_in_ratio", -1)),
    },
    needs_base=True,
)


def _form(name: str, moves: Mapping[str, Monomial], sites: Mapping[str, SiteRule]) -> Table:
    table = MUP
    for role, theta in moves.items():
        table = shift(table, role, theta)
    source = f"arXiv 2203.03466, {name.removeprefix('mup-')} (Adam)"
    # A shared weight cannot move its embedding half without its readout half: the readout's site makes up for it.
    tied = hp("alpha_out") * size("width_ratio", -1) * moves.get("embedding", ONE)
    return replace(table, name=name, source=source, sites={**MUP.sites, **sites}, tied_readout=tied)


MUP_TABLE3 = _form(
    "mup-table3", {"readout": size("fan_in_ratio", -1)}, {"readout": SiteRule(hp("alpha_out"))},
)  # fmt: skip
"""The same without multipliers: the readout's 1/m moves into its init and LR."""

MUP_TABLE9 = _form(
    "mup-table9",
    {"embedding": size("fan_out_ratio", -1 / 2), "readout": size("fan_in_ratio", -1 / 2)},
    {
        "embedding": SiteRule(hp("alpha_emb") * size("width_ratio", 1 / 2)),
        "readout": SiteRule(hp("alpha_out") * size("width_ratio", -1 / 2)),
    },
)
"""The same with one init variance, 1/m, for all weights."""
