"""Complete(d)P (arXiv 2512.22382, table 1) and its ancestors: transfer over width, depth, batch and training length.

One table without forward multipliers on the readout, so that fused losses work; a branch is multiplied by m_L^-alpha.
Notation: m_N width, m_L blocks, m_B tokens per step, m_D tokens of the run, each target / base; s = sqrt(m_B / m_D).
Factors of width are taken from the tensor's own extents (fan-in for init, LR and decay, fan-out for eps), which is the
printed table where all widths grow together and stays right where they do not (FFN ratios, grouped heads).

Marks: the entries are the paper's unless a comment says derived. CompleteP (arXiv 2505.01618) and depth-muP
(alpha = 1/2; Tensor Programs VI) are the width and depth part in the older form with a multiplier on the logits.
"""

from __future__ import annotations

from dataclasses import replace

from isoscale.rules.monomial import ONE, hp, size
from isoscale.rules.options import Options
from isoscale.rules.standard import PLAIN_SITES
from isoscale.rules.table import RoleRule, RunRule, SiteRule, Table

_WIDTH_EPS = hp("eps") * size("fan_out_ratio", -1)
_LOGITS = SiteRule(hp("alpha_attn") * size("head_size", -1 / 2) * size("head_size_ratio", -1 / 2))


def run_rule(options: Options) -> RunRule:
    """Factors of batch and training length.

    At an exponent other than 1/2 the paper's sentence about the decay is kept, not its product: 1 / (lr x decay) stays
    the same share of the run, so decay takes what the LR does not.
    """
    batch, tokens = size("batch_ratio"), size("token_ratio")
    length = options.duration
    lr_power = options.duration_exponent if length == "iso-horizon" else 0.0
    lr = batch ** (1 / 2) * tokens ** (-lr_power)
    share = batch * (ONE if length == "none" else tokens**-1)  # of lr x decay
    if options.tau_exponent:
        share = share * size("tokens_per_parameter_ratio", options.tau_exponent)
    whole = length == "iso-horizon"
    eps_tokens = tokens ** (1 / 2) if whole else ONE
    return RunRule(lr, batch ** (-1 / 2) * eps_tokens, share / lr, share)


def complete_d(options: Options) -> Table:
    """Complete(d)P for AdamW as printed, at the given depth exponent."""
    depth = size("depth_ratio")
    vector = RoleRule(hp("lr"), init_kind="one", eps=_WIDTH_EPS)
    final_eps = hp("eps") if options.final_norm_eps == "printed" else _WIDTH_EPS  # 1.6: its gradient shrinks as 1/m_N
    wide = hp("weight_decay") * size("fan_in_ratio")
    rate = hp("lr") * size("fan_in_ratio", -1)
    readout = RoleRule(rate, hp("init_std") * size("fan_in_ratio", -1), weight_decay=wide, eps=hp("eps"))
    branch = SiteRule(hp("alpha_res") * depth**-options.alpha)
    return Table(
        name="complete-d",
        source=f"arXiv 2512.22382, table 1, alpha {options.alpha:g}",
        roles={
            "embedding": RoleRule(hp("lr") * hp("lr_embedding"), hp("init_std"), eps=_WIDTH_EPS),
            "input": RoleRule(hp("lr"), hp("init_std"), eps=_WIDTH_EPS),  # derived: as the embedding
            "hidden": RoleRule(rate, hp("init_std") * size("fan_in_ratio", -1 / 2), weight_decay=wide, eps=_WIDTH_EPS),
            "readout": readout,
            "router": readout,  # derived: an output weight inside the stack
            "gain": vector,
            "bias": replace(vector, init_kind="zero"),
            "vector": vector,
            "finite": replace(vector, eps=hp("eps")),  # the QK norm's row: the gradient sums over the heads
            "final_norm": replace(vector, eps=final_eps),
        },
        sites={**PLAIN_SITES, "attn_logits": _LOGITS, "residual_attn": branch, "residual_ffn": branch},
        stack_lr=depth ** (options.alpha - 1),
        stack_eps=depth**-options.alpha,
        stack_grad=depth**-options.alpha,
        betas=options.betas,
        tied_readout=hp("alpha_out") * size("width_ratio", -1),  # derived: reference 1.3, CompleteP's form
        needs_base=True,
        run=run_rule(options),
    )


def completep(options: Options) -> Table:
    """CompleteP as of May 2025: width and depth only; the eps rule holds in the residual blocks alone."""
    table = complete_d(options)
    eps = hp("eps")  # table 1 gives an eps rule for the residual blocks, and nothing elsewhere
    gain = replace(table.roles["gain"], eps=_WIDTH_EPS)
    multiplier = hp("alpha_out") * size("fan_in_ratio", -1)
    readout = RoleRule(hp("lr"), hp("init_std"), forward=multiplier, eps=eps)
    return replace(
        table,
        name="completep",
        source=f"arXiv 2505.01618, table 1, alpha {options.alpha:g}",
        roles={
            **table.roles, "embedding": replace(table.roles["embedding"], eps=eps),
            "input": replace(table.roles["input"], eps=eps), "readout": readout,
            "router": replace(readout, eps=_WIDTH_EPS), "final_norm": replace(gain, eps=eps),
            "finite": replace(gain, eps=eps),
        },
        sites={**table.sites, "readout": SiteRule(multiplier)},
        betas="constant", tied_readout=None,
        run=RunRule(),
    )  # fmt: skip


def depth_mup(options: Options) -> Table:
    """Depth-muP: CompleteP's table at alpha = 1/2, whatever `options.alpha`."""
    table = completep(replace(options, alpha=0.5))
    return replace(table, name="depth-mup", source="Tensor Programs VI (arXiv 2310.02244); alpha 1/2")
