"""Site rows: multipliers, predicted scales and cast formats of the places in a model's forward."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import replace

from torch import nn

from isoscale.formats.recipes import Assignment
from isoscale.models import Decoder
from isoscale.nn.factors import transformer_residual_taus
from isoscale.planning.expected import decoder_scales
from isoscale.planning.rows import SiteRow
from isoscale.rules import Table
from isoscale.rules.monomial import show_number

LONGEST = 2048  # the recursion costs length^2 per block
Prediction = Mapping[tuple[str, str], tuple[float, str]]
"""(path, port) -> expected rms and its reason."""


def predictions(
    model: nn.Module, hps: Mapping[str, float], stack: str, seq_len: int, share: float
) -> Prediction:
    """Expected scales of a decoder's sites that depend on how positions correlate; empty for other models."""
    if not isinstance(model, Decoder) or seq_len > LONGEST:
        return {}
    config = model.config
    blocks = decoder_scales(
        transformer_residual_taus(2 * config.depth, hps["alpha_res"], hps["alpha_res_attn_ratio"], share),
        length=seq_len, vocab=config.vocab, head_size=config.head_size,
        logit_scale=hps["alpha_attn"] / config.head_size, act_mult=hps["alpha_ffn_act"],
    )  # fmt: skip
    out: dict[tuple[str, str], tuple[float, str]] = {}
    for i, block in enumerate(blocks):
        why = f"mean-field recursion to block {i} (seq_len {seq_len}, vocab {config.vocab})"
        at = f"{stack}.{i}"
        for path, port, value in (
            (f"{at}.attn", "out", block.attn_out), (f"{at}.attn.out", "out", block.attn_out),
            (at, "attn_residual", block.attn_residual), (f"{at}.mlp", "act", block.act),
            (f"{at}.mlp.down", "out", block.act), (at, "mlp_residual", block.mlp_residual),
        ):  # fmt: skip
            out[path, port] = (value, f"{show_number(value)} = {why}")
    return out


def site_rows(
    model: nn.Module, table: Table, hps: Mapping[str, float], sizes: Mapping[str, float], depth: int, casts: Assignment,
    linear: Container[str], predicted: Prediction, tied: bool,
) -> tuple[SiteRow, ...]:  # fmt: skip
    """One row per site that the model describes; none for a model that describes none."""
    described = getattr(model, "sites", None)
    if described is None:
        return ()
    share = table.tau_share.evaluate(hps, sizes).number
    weights = hps["alpha_res"], hps["alpha_res_attn_ratio"]
    taus = transformer_residual_taus(2 * depth, *weights, share) if table.unit else ()
    rows = []
    for site in described():
        rule = table.sites[site.kind]
        if site.kind == "readout" and tied and table.tied_readout is not None:
            rule = replace(rule, multiplier=table.tied_readout)
        reasons: dict[str, str] = {}
        multiplier = expected = None
        if rule.multiplier == "tau":
            multiplier = taus[site.index]
            reasons["multiplier"] = (
                f"{show_number(multiplier)} = tau of branch {site.index} of {2 * depth} (alpha_res "
                f"{show_number(hps['alpha_res'])}, alpha_res_attn_ratio {show_number(hps['alpha_res_attn_ratio'])}, "
                f"a branch adds {show_number(share)} to the variance)"
            )
        elif rule.multiplier is not None and site.attr is not None:
            value = rule.multiplier.evaluate(hps, sizes)
            multiplier, reasons["multiplier"] = value.number, value.reason
        if (site.path, site.port) in predicted:
            expected, reasons["expected_scale"] = predicted[site.path, site.port]
        elif rule.expected is not None:
            value = rule.expected.evaluate(hps, sizes)
            expected, reasons["expected_scale"] = value.number, value.reason
        fmt = casts.formats(site.path).input if site.path in linear else "fp32"
        rows.append(SiteRow(path=site.path, port=site.port, kind=site.kind, multiplier=multiplier, attr=site.attr,
                            expected_scale=expected, format=fmt, cast_scale=None, reasons=reasons))  # fmt: skip
    return tuple(rows)
