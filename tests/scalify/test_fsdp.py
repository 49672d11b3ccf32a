"""FSDP2 with scales on the wire, on two gloo ranks, against what `fully_shard` does by default."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from isoscale import IsoscaleError
from isoscale.scalify import RuleError, ScaledAllGather, ScaledReduceScatter, scalify

from gloo_ranks import Check, distance, gathered, run_on_ranks, same_everywhere  # isort: skip

CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    CHECKS[function.__name__] = function
    return function


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 50), nn.ReLU(), nn.Linear(50, 7))  # 7 rows: the last shard is padded


def _sharded(reduce: object = None, gather: object = None, model: nn.Sequential | None = None, **policy: object) -> nn.Module:
    model = copy.deepcopy(model or _model())
    for part in (*model, model):
        if isinstance(part, nn.Linear) or part is model:
            fully_shard(part, **policy)
            assert isinstance(part, FSDPModule)
            if reduce is not None:
                part.set_custom_reduce_scatter(reduce)
            if gather is not None:
                part.set_custom_all_gather(gather)
    return model


def _batch(rank: int, n: int = 8) -> Tensor:
    return torch.randn(n, 20, generator=torch.Generator().manual_seed(rank))


def _gradients(model: nn.Module, rank: int, size: float) -> list[Tensor]:
    (model(_batch(rank)).square().mean() * size).backward()
    return [p.grad.full_tensor() for p in model.parameters()]


@check
def gradients_of_every_size_and_wire(rank: int, world: int) -> None:
    for size in (1.0, 1e-7, 1e-9):
        right = _gradients(_sharded(), rank, size)
        for wire, allowed in (("fp16", 1e-3), ("fp8", 0.1), ("bf16", 6e-3), ("fp32", 1e-6)):
            found = _gradients(_sharded(ScaledReduceScatter(wire)), rank, size)
            for g, exact in zip(found, right):
                assert distance(g, exact) <= allowed, (wire, size, distance(g, exact))
                assert same_everywhere(g)


@check
def control_a_plain_fp16_reduction_loses_them(rank: int, world: int) -> None:
    right = _gradients(_sharded(), rank, 1e-7)
    found = _gradients(_sharded(mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float16)), rank, 1e-7)
    assert max(distance(g, exact) for g, exact in zip(found, right)) >= 2e-2


@check
def tensors_of_very_different_size_share_a_buffer(rank: int, world: int) -> None:
    """Scales are per block of it: one for all would lose the small ones."""
    n = 1024
    sizes = 10.0 ** -torch.arange(0, 4 * n // 256 * 2, 2).repeat_interleave(256).float().clamp(max=30)
    rows = (torch.randn(world, 4 * n, generator=torch.Generator().manual_seed(rank)) * sizes).flatten()
    exact = gathered(rows).double().sum(0).view(world, -1)[rank]
    for wire, allowed in (("fp16", 1e-3), ("fp8", 0.1)):
        out = torch.empty(4 * n)
        assert ScaledReduceScatter(wire)(out, rows, dist.group.WORLD, dist.ReduceOp.SUM) is None
        mean = torch.empty(4 * n)
        ScaledReduceScatter(wire)(mean, rows, dist.group.WORLD, dist.ReduceOp.AVG)
        for part, right in zip(out.view(-1, 256), exact.view(-1, 256)):
            assert distance(part, right) <= allowed
        assert distance(mean, exact / world) <= allowed


@check
def what_is_not_finite_stays_visible(rank: int, world: int) -> None:
    for bad in (float("inf"), float("nan")):
        rows = torch.ones(world * 600)
        if rank == 0:
            rows[3] = bad
        out = torch.empty(600)
        ScaledReduceScatter("fp8")(out, rows, dist.group.WORLD, dist.ReduceOp.SUM)
        assert torch.isfinite(out).all() == (rank != 0)
        assert torch.isfinite(out[256:]).all()


@check
def another_reduction_is_refused(rank: int, world: int) -> None:
    with pytest.raises(IsoscaleError, match="SUM and AVG"):
        ScaledReduceScatter()(torch.empty(4), torch.ones(world * 4), dist.group.WORLD, dist.ReduceOp.MAX)


@check
def weights_on_the_wire(rank: int, world: int) -> None:
    right = _gradients(_sharded(), rank, 1e-7)
    for wire, allowed in (("fp32", 1e-6), ("fp16", 1e-3), ("bf16", 1e-2), ("fp8", 0.1)):
        model = _sharded(gather=ScaledAllGather(wire))
        y = model(_batch(rank))
        assert distance(y, _model()(_batch(rank))) <= allowed
        for g, exact in zip(_gradients(_sharded(gather=ScaledAllGather(wire)), rank, 1e-7), right):
            assert distance(g, exact) <= 2 * allowed, wire


@check
def parameters_of_two_dtypes_travel_as_they_are(rank: int, world: int) -> None:
    mixed = nn.Sequential(nn.Linear(20, 50), nn.ReLU(), nn.Linear(50, 7).bfloat16().requires_grad_(False))
    whole = copy.deepcopy(mixed)
    fully_shard(whole)
    whole.set_custom_all_gather(ScaledAllGather("fp8"))
    hidden = mixed[1](mixed[0](_batch(rank))).bfloat16()
    whole.unshard()
    assert torch.equal(whole[2](hidden), mixed[2](hidden))


@check
def narrow_parameters_with_a_float32_reduction(rank: int, world: int) -> None:
    policy = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)}
    right = _gradients(_sharded(**policy), rank, 1e-7)
    found = _gradients(_sharded(ScaledReduceScatter("fp16"), ScaledAllGather("bf16"), **policy), rank, 1e-7)
    for g, exact in zip(found, right):
        assert distance(g, exact) <= 1e-3


@check
def training_follows_the_default(rank: int, world: int) -> None:
    def losses(model: nn.Module) -> list[float]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        told = []
        for step in range(15):
            x = _batch(1000 * rank + step, 32)
            loss = (model(x) - x[:, :7].sin()).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total = loss.detach().clone()
            dist.all_reduce(total)
            told.append(float(total) / world)
        return told

    right = losses(_sharded())
    assert right[-1] < 0.7 * right[0]
    near = losses(_sharded(ScaledReduceScatter("fp16"), ScaledAllGather("fp16")))
    assert max(abs(a - b) for a, b in zip(near, right)) <= 3e-3 * right[0]
    low = losses(_sharded(ScaledReduceScatter("fp8"), ScaledAllGather("fp8")))
    assert max(abs(a - b) for a, b in zip(low, right)) <= 0.06 * right[0]


@check
def a_scaled_model_is_refused_and_told_what_to_do(rank: int, world: int) -> None:
    model, _ = scalify(_model(), None, "fp16")
    fully_shard(model)
    with pytest.raises(RuleError, match=r"fully_shard the plain model, with\s+set_custom_reduce_scatter"):
        model(_batch(rank))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_on_ranks(2, tmp_path_factory.mktemp("two"), CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_two_ranks(two: dict[str, str], name: str) -> None:
    assert two[name] == ""


@pytest.mark.parametrize("kind", [ScaledReduceScatter, ScaledAllGather])
def test_an_unknown_wire_is_refused(kind: type) -> None:
    with pytest.raises(IsoscaleError, match="did you mean fp8"):
        kind("fp88")
