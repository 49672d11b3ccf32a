from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import isoscale as iso
from isoscale.models import Decoder
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
