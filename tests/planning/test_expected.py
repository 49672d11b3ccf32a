"""The mean-field prediction against measurement, where independence (a prediction of 1) must fail."""

from __future__ import annotations

import pytest
import torch

import isoscale as iso
from isoscale.models import Decoder, DecoderConfig
from isoscale.probe import site_scales


@pytest.mark.parametrize(
    ("width", "depth", "length", "alphas"),
    [(128, 6, 128, {}), (256, 4, 64, {"alpha_res": 2.0}), (128, 4, 256, {"alpha_ffn_act": 4.0})],
)
def test_every_site_is_at_its_predicted_scale(width: int, depth: int, length: int, alphas: dict[str, float]) -> None:
    model = Decoder(DecoderConfig(width=width, depth=depth))
    plan = iso.plan(model, "u-mup", hps=alphas, seq_len=length)
    plan.apply(model, seed=1)
    ids = torch.randint(0, 256, (4, length), generator=torch.Generator().manual_seed(0))
    measured = {(s.path, s.port): s.rms for s in site_scales(model, ids, ids)}
    off = {}
    for site in plan.sites:
        assert site.expected_scale is not None
        ratio = measured[site.path, site.port] / site.expected_scale
        if not 0.8 < ratio < 1.25:
            off[site.name] = ratio
    assert not off
    # Control: taking positions as independent (a prediction of 1) is wrong by more than a factor of 2.
    plain = iso.plan(model, "u-mup", hps=alphas)
    worst = max(measured[s.path, s.port] / (s.expected_scale or 1.0) for s in plan_sites(plain, "attn_out"))
    assert worst > 2


def plan_sites(plan: iso.Plan, kind: str) -> list[iso.planning.SiteRow]:
    """The sites of one kind."""
    return [site for site in plan.sites if site.kind == kind]


def test_reason_says_how_it_was_predicted() -> None:
    plan = iso.plan(Decoder(DecoderConfig(width=32, depth=2)), "u-mup", seq_len=32)
    assert "mean-field recursion to block 1 (seq_len 32, vocab 256)" in plan.explain("blocks.1.attn.out")
