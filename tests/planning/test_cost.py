from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

import isoscale as iso
from isoscale.config import OptimSection
from isoscale.models import Decoder, DecoderConfig
from isoscale.planning import cost


def test_counts_against_the_model_and_torch_flop_counter(make: Callable[..., Decoder]) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = make(scaling="plain")
    plan = iso.plan(model, "sp", recipe="fp8")
    told = cost(plan.rows, width=32, depth=2, seq_len=16)
    assert told.parameters == sum(p.numel() for p in model.parameters())
    ids = torch.arange(64).view(4, 16)
    with FlopCounterMode(display=False) as counter:
        model(ids, ids).backward()
    counted = counter.get_total_flops() / ids.numel()
    # The counter takes attention as if unmasked and counts its backward as 2.5 forwards.
    assert told.flops_per_token == pytest.approx(counted, rel=0.08)
    assert 0.3 < told.low_precision_share < 0.8
    assert cost(iso.plan(model, "sp").rows, width=32, depth=2, seq_len=16).low_precision_share == 0


def test_a_tied_embedding_multiplies_too(make: Callable[..., Decoder]) -> None:
    tied = cost(iso.plan(make(tied=True)).rows, width=32, depth=2, seq_len=16)
    untied = cost(iso.plan(make()).rows, width=32, depth=2, seq_len=16)
    assert tied.matmul_parameters == untied.matmul_parameters
    assert untied.parameters - tied.parameters == 64 * 32


def test_bits_come_from_the_formats(make: Callable[..., Decoder]) -> None:
    def told(recipe: str) -> object:
        return cost(iso.plan(make(), recipe=recipe).rows, width=32, depth=2, seq_len=16)

    head = 64 * 32
    hidden = told("none").matmul_parameters - head
    for recipe, bits in (("none", 32.0), ("bf16", 16.0), ("mxfp8-bare", 8.25), ("nvfp4-bare", 4.5), ("fp8-dynamic", 8.0)):
        top = 32.0 if recipe == "none" else 16.0
        assert told(recipe).weight_bits == pytest.approx((bits * hidden + top * head) / (hidden + head))
    whole = told("mxfp8-bare").low_precision_share
    assert whole == pytest.approx(hidden / (hidden + head))
    assert told("mxfp6-forward").low_precision_share == pytest.approx(whole / 3)  # one matmul of three


def test_lmds_state_is_counted_for_what_it_trains() -> None:
    model = Decoder(DecoderConfig(width=64, depth=2, scaling="plain"))
    plan = iso.plan(model, "sp", optimizer="lmd")
    count = {kind: sum(math.prod(row.shape) for row in plan.rows if row.optimizer == kind) for kind in ("lmd", "adamw")}
    for settings, state in ((OptimSection(name="lmd"), 16), (OptimSection(name="lmd", form="hypentropy"), 8),
                            (OptimSection(name="lmd", form="hypentropy", state="int8-log"), 2)):  # fmt: skip
        found = cost(plan.rows, width=64, depth=2, seq_len=8, lmd_bytes=settings.lmd_bytes)
        assert found.state_bytes == 16 * count["adamw"] + (8 + state) * count["lmd"]
        groups = [group for group in plan.param_groups(model) if group["optimizer"] == "lmd"]
        made = iso.optim.LMD(groups, form=settings.form, state=settings.state)
        for group in groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        made.step()
        held = sum(v.numel() * v.element_size() for s in made.state.values() for v in s.values() if v.dim() > 1)
        assert held == state * count["lmd"]
