"""Collectives of scaled tensors on two and three gloo ranks, against float64 on one."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from isoscale import IsoscaleError
from isoscale.scalify import (
    RuleError,
    ScaledTensor,
    all_gather,
    all_reduce,
    as_block_scaled,
    as_plain,
    as_scaled,
    compress_hook,
    reduce_gradients,
    reduce_scatter,
    scalify,
)
from isoscale.scalify.collectives import all_reduce_many

from gloo_ranks import Check, distance, gathered, run_on_ranks, same_everywhere  # isort: skip

LOSS = {"fp32": 1e-6, "fp16": 1e-3, "bf16": 6e-3, "fp8": 0.1}  # relative, two roundings
CHECKS: dict[str, Check] = {}
ANY_WORLD: list[str] = []  # run with three ranks too


def check(world: int | None = None) -> Callable[[Check], Check]:
    def add(function: Check) -> Check:
        CHECKS[function.__name__] = function
        if world is None:
            ANY_WORLD.append(function.__name__)
        return function

    return add


def values(tensor: Tensor) -> Tensor:
    return as_plain(tensor.detach(), torch.float64)


def drawn(rank: int, *shape: int, size: float = 1e-7) -> Tensor:
    """Gradients of another magnitude on every rank."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank)) * size * (1 + 10 * rank)


def refused(match: str, function: Callable[..., object], *args: object, kind: type[Exception] = IsoscaleError, **named: object) -> None:
    with pytest.raises(kind) as caught:
        function(*args, **named)
    assert re.search(match, str(caught.value), re.DOTALL), str(caught.value)


@check()
def all_reduce_of_every_wire_op_and_dtype(rank: int, world: int) -> None:
    for dtype in (torch.float16, torch.float32, torch.bfloat16):
        own = as_scaled(drawn(rank, 7, 33), dtype=dtype)
        for wire in (None, *LOSS):
            for op in ("mean", "sum"):
                exact = gathered(values(own)).sum(0) / (world if op == "mean" else 1)
                out = all_reduce(own, op, wire=wire)
                names = {torch.float16: "fp16", torch.float32: "fp32", torch.bfloat16: "bf16"}
                allowed = max(LOSS[wire or names[dtype]], LOSS[names[dtype]])
                assert distance(values(out), exact) <= allowed, (dtype, wire, op)
                assert out.dtype == dtype
                assert same_everywhere(out.data_part), (dtype, wire, op)
                assert same_everywhere(out.scale)


@check()
def small_fp16_gradients_survive_where_a_plain_all_reduce_loses_them(rank: int, world: int) -> None:
    g = drawn(rank, 5000)
    exact = gathered(g.double()).mean(0)
    assert distance(values(all_reduce(as_scaled(g, dtype=torch.float16))), exact) <= 1e-3
    plain = (g / world).half()
    dist.all_reduce(plain)
    assert distance(plain, exact) >= 2e-2


@check()
def several_tensors_of_several_dtypes_in_one_call(rank: int, world: int) -> None:
    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.float16, torch.float64, torch.float32)
    sizes = (1.0, 1e-7, 1e5, 1e-12, 1e-3, 1e8)
    shapes = ((3, 4), (), (5,), (0, 3), (2, 2, 2), (1,))
    own = [as_scaled(drawn(rank, *shape, size=size), dtype=dtype) for dtype, size, shape in zip(dtypes, sizes, shapes)]
    exact = [gathered(values(x)).mean(0) for x in own]
    for wire in (None, "fp8"):
        for x, out, right in zip(own, all_reduce_many(own, wire=wire), exact):
            assert out.shape == x.shape
            assert out.dtype == x.dtype
            if x.numel():
                assert distance(values(out), right) <= (0.2 if wire else 6e-3), (x.dtype, x.shape, wire)
    assert all_reduce_many([]) == []


@check()
def float64_data_stay_float64(rank: int, world: int) -> None:
    own = as_scaled(drawn(rank, 50).double() * (1 + 1e-12))
    assert distance(values(all_reduce(own)), gathered(values(own)).mean(0)) <= 1e-15
    rows = as_scaled(drawn(rank, world, 9).double())
    assert distance(values(reduce_scatter(rows)), gathered(values(rows)).mean(0)[rank]) <= 1e-15


@check()
def zeros_under_any_scale_take_the_others_scale(rank: int, world: int) -> None:
    g = drawn(1, 40) if rank == 0 else torch.zeros(40)
    own = as_scaled(g, dtype=torch.float16)
    assert (float(own.scale) == 0) == (rank != 0)
    for wire in (None, "fp8"):
        out = all_reduce(own, wire=wire)
        assert distance(values(out), drawn(1, 40).double() / world) <= LOSS[wire or "fp16"]
        assert float(out.scale) > 0
        none = all_reduce(as_scaled(torch.zeros(40)), "sum", wire=wire)
        assert not values(none).any()
        assert float(none.scale) == 0
    assert not values(all_gather(as_scaled(torch.zeros(4, 2)))).any()
    parts = values(all_gather(own)).view(world, 40)
    assert distance(parts[0], drawn(1, 40)) <= 1e-3
    assert not parts[1:].any()


@check()
def a_prediction_far_off_costs_nothing_on_the_wire(rank: int, world: int) -> None:
    g = drawn(rank, world, 100, size=1.0)
    exact = gathered(g.double()).mean(0)
    for scale in (2.0**-30, 2.0**30, 2.0 ** (20 * rank)):
        own = as_scaled(g, scale=scale)
        for wire in ("fp16", "fp8"):
            assert distance(values(all_reduce(own, wire=wire)), exact) <= LOSS[wire]
            assert distance(values(reduce_scatter(own, wire=wire)), exact[rank]) <= LOSS[wire]
            assert distance(values(all_gather(own, wire=wire)), gathered(g).flatten(0, 1)) <= LOSS[wire]


@check()
def what_is_not_finite_stays_visible(rank: int, world: int) -> None:
    g = torch.ones(world, 6)
    if rank == 0:
        g[0, 0], g[0, 1] = float("inf"), float("nan")
    for wire in (None, "fp16", "fp8"):
        for out in (values(all_reduce(as_scaled(g), wire=wire)), values(reduce_scatter(as_scaled(g), wire=wire))):
            if out.shape[0] == world or rank == 0:
                assert out[0, 0] == float("inf")
                assert out[0, 1].isnan()
            assert torch.isfinite(out[..., 2:]).all()


@check()
def large_sums_do_not_overflow(rank: int, world: int) -> None:
    own = as_scaled(torch.full((world, 1000), 1e30), dtype=torch.float16)
    for wire in (None, "fp16", "fp8"):
        for out in (all_reduce(own, "sum", wire=wire), reduce_scatter(own, "sum", wire=wire)):
            assert distance(values(out), torch.full(out.shape, 1e30 * world)) <= (0.2 if wire == "fp8" else 1e-3)


@check()
def reduce_scatter_gives_each_rank_its_rows(rank: int, world: int) -> None:
    own = as_scaled(drawn(rank, 2 * world, 5, 3), dtype=torch.float16)
    for wire in (None, *LOSS):
        for op in ("mean", "sum"):
            exact = gathered(values(own)).sum(0)[2 * rank : 2 * rank + 2] / (world if op == "mean" else 1)
            out = reduce_scatter(own, op, wire=wire)
            assert out.shape == (2, 5, 3)
            assert distance(values(out), exact) <= LOSS[wire or "fp16"] + 1e-3
            assert same_everywhere(out.scale)


@check()
def all_gather_stacks_the_ranks(rank: int, world: int) -> None:
    own = as_scaled(drawn(rank, 3, 50), dtype=torch.float16)
    for wire in (None, *LOSS):
        out = all_gather(own, wire=wire)
        assert out.shape == (3 * world, 50)
        assert distance(values(out), gathered(values(own)).flatten(0, 1)) <= LOSS[wire or "fp16"] + 1e-3
        assert same_everywhere(out.data_part)
    exact = as_scaled(drawn(rank, 3, 50).half().float(), dtype=torch.float32)
    assert torch.equal(values(all_gather(exact)), gathered(values(exact)).flatten(0, 1))


@check()
def the_argument_and_its_strides_are_left_alone(rank: int, world: int) -> None:
    own = as_scaled(drawn(rank, 8, 2 * world)).t()
    before, scale = own.data_part.clone(), own.scale.clone()
    out = all_reduce(own)
    assert torch.equal(own.data_part, before)
    assert torch.equal(own.scale, scale)
    assert out.data_part.is_contiguous()
    assert distance(values(out), gathered(values(own)).mean(0)) <= 1e-6
    assert distance(values(reduce_scatter(own)), gathered(values(own)).mean(0)[2 * rank : 2 * rank + 2]) <= 1e-6


@check()
def block_scales_are_brought_under_one(rank: int, world: int) -> None:
    own = as_block_scaled(drawn(rank, 2 * world, 64) * torch.logspace(0, 6, 64))
    exact = gathered(values(own))
    for out, right in ((all_reduce(own), exact.mean(0)), (all_gather(own), exact.flatten(0, 1)),
                       (reduce_scatter(own), exact.mean(0)[2 * rank : 2 * rank + 2])):  # fmt: skip
        assert out.scale.dim() == 0
        assert distance(values(out), right) <= 1e-6


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.LayerNorm(24), nn.Linear(24, 4))


def _batch(n: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(n, 12, generator=draw), torch.randint(0, 4, (n,), generator=draw)


@check()
def shares_of_a_batch_give_the_gradient_of_the_whole(rank: int, world: int) -> None:
    x, y = _batch(12)
    n = 12 // world
    for recipe, allowed in (("fp16", 3e-3), ("float32", 1e-5)):
        whole, _ = scalify(_model(), None, recipe)
        part, _ = scalify(_model(), None, recipe)
        nn.functional.cross_entropy(whole(x), y).backward()
        nn.functional.cross_entropy(part(x[rank * n : rank * n + n]), y[rank * n : rank * n + n]).backward()
        reduce_gradients(part.parameters())
        for p, q in zip(part.parameters(), whole.parameters()):
            assert distance(values(p.grad), values(q.grad)) <= allowed
            assert isinstance(p.grad, ScaledTensor)
            assert same_everywhere(p.grad.data_part)


@check()
def ranks_that_train_on_their_shares_stay_equal(rank: int, world: int) -> None:
    model = _model()
    model, optimizer = scalify(model, torch.optim.AdamW(model.parameters(), lr=1e-2), "fp16")
    x, y = _batch(12)
    first = last = 0.0
    for step in range(10):
        loss = nn.functional.cross_entropy(model(x[rank::world]), y[rank::world])
        optimizer.zero_grad()
        loss.backward()
        reduce_gradients(model.parameters(), wire="fp8" if step % 2 else None)
        optimizer.step()
        first, last = first or float(values(loss)), float(values(loss))
    assert last < 0.9 * first
    for p in model.parameters():
        assert same_everywhere(p.data_part)
        assert same_everywhere(p.scale)


@check()
def a_gradient_on_some_ranks_only_counts_as_zero_on_the_others(rank: int, world: int) -> None:
    used, unused = (nn.Parameter(as_scaled(torch.ones(4, dtype=torch.float16))) for _ in range(2))
    plain = nn.Parameter(torch.ones(3))
    plain.grad = torch.full((3,), float(rank))
    if rank == 0:
        used.grad = as_scaled(torch.full((4,), 6e-6), dtype=torch.float16)
    reduce_gradients(p for p in (used, unused, plain))
    assert distance(values(used.grad), torch.full((4,), 6e-6 / world)) <= 1e-3
    assert unused.grad is None
    assert type(plain.grad) is Tensor
    assert distance(plain.grad, torch.full((3,), (world - 1) / 2)) <= 1e-6
    reduce_gradients([])


@check()
def ddp_with_the_hook_gives_the_plain_mean(rank: int, world: int) -> None:
    x = torch.randn(8, 12, generator=torch.Generator().manual_seed(rank))
    for wire, allowed in LOSS.items():
        plain = _model()
        model = DistributedDataParallel(copy.deepcopy(plain), bucket_cap_mb=0.001)
        model.register_comm_hook(None, compress_hook(wire))
        (model(x).square().mean() * 1e-7).backward()
        (plain(x).square().mean() * 1e-7).backward()
        for p, q in zip(model.parameters(), plain.parameters()):
            assert distance(p.grad, gathered(q.grad).mean(0)) <= 2 * allowed, wire  # of few elements
            assert same_everywhere(p.grad)


@check()
def plain_collectives_refuse_scaled_tensors_and_say_what_to_use(rank: int, world: int) -> None:
    x = as_scaled(torch.ones(world, 4))
    held = x.data_part.clone()
    out = torch.empty(world, 4)
    refused(r"knows no scales.*iso\.scalify\.all_reduce", dist.all_reduce, x, kind=RuleError)
    refused(r"iso\.scalify\.all_reduce", dist.broadcast, x, 0, kind=RuleError)
    refused("all_gather", dist.all_gather, [torch.empty(world, 4) for _ in range(world)], x, kind=RuleError)
    refused("reduce_scatter", dist.reduce_scatter_tensor, out[0], x, kind=RuleError)
    refused("all_reduce", dist._functional_collectives.all_reduce, x, "sum", dist.group.WORLD, kind=RuleError)
    assert torch.equal(x.data_part, held)
    scaled, _ = scalify(_model(), None, "fp16")
    refused(r"instead of DistributedDataParallel, iso\.scalify\.reduce_gradients", DistributedDataParallel, scaled, kind=RuleError)


@check(2)
def wrong_arguments_are_named(rank: int, world: int) -> None:
    x = as_scaled(torch.ones(4))
    for function in (all_reduce, reduce_scatter, all_gather):
        refused("as_scaled", function, torch.ones(4))
        refused("fp16", function, x, wire="fp61")
    for function in (all_reduce, reduce_scatter):
        refused("did you mean mean", function, x, op="maen")
    refused("2 ranks do not divide", reduce_scatter, as_scaled(torch.ones(3, 2)))
    refused("2 ranks do not divide", reduce_scatter, as_scaled(torch.ones(())))
    refused("without dimensions", all_gather, as_scaled(torch.ones(())))
    refused("did you mean fp8", compress_hook, "fp88")


@check(3)
def a_group_of_some_ranks(rank: int, world: int) -> None:
    group = dist.new_group([0, 2])
    if rank != 1:
        own = as_scaled(torch.full((2, 5), 1e-7 * (rank + 1)), dtype=torch.float16)
        for out in (all_reduce(own, group=group), reduce_scatter(own, group=group), all_reduce(own, group=group, wire="fp8")):
            assert distance(values(out), torch.full(out.shape, 2e-7)) <= 0.1
        assert all_gather(own, group=group).shape == (4, 5)


@check(2)
def fails_on_one_rank(rank: int, world: int) -> None:
    assert rank == 0


TWO = [name for name in CHECKS if name != "a_group_of_some_ranks"]
THREE = [*ANY_WORLD, "a_group_of_some_ranks"]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_on_ranks(2, tmp_path_factory.mktemp("two"), {name: CHECKS[name] for name in TWO})


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_on_ranks(3, tmp_path_factory.mktemp("three"), {name: CHECKS[name] for name in THREE})


@pytest.mark.parametrize("name", [name for name in TWO if name != "fails_on_one_rank"])
def test_two_ranks(two: dict[str, str], name: str) -> None:
    assert two[name] == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", THREE)
def test_three_ranks(three: dict[str, str], name: str) -> None:
    assert three[name] == ""


def test_control_a_check_that_fails_on_one_rank_is_told(two: dict[str, str]) -> None:
    assert "rank 1" in two["fails_on_one_rank"]
    assert "rank 0" not in two["fails_on_one_rank"]
