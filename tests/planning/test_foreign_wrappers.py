"""Whatever wraps, shards, compiles or reloads a foreign model, every tensor keeps the numbers of its plan."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from foreign_models import llama, nanogpt
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import isoscale as iso
from isoscale._base.errors import PlanError
from isoscale.planning.names import normalise

Make = Callable[..., nn.Module]
Numbers = dict[str, list[float]]
HPS = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-7}
MAKERS: dict[str, Make] = {"llama": llama, "nanogpt": nanogpt}
BOTH = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
IDS = torch.randint(256, (4, 12), generator=torch.Generator().manual_seed(5))


def build(make: Make, width: int = 128, depth: int = 4, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return make(width, depth).eval()


def planned(make: Make, model: nn.Module, **said: Any) -> iso.Plan:
    """Tuned at width 64 and depth 2, with another batch and another length."""
    run = {"base_run": iso.Scale(batch_tokens=1024, tokens=2**20), "target": iso.Scale(batch_tokens=2048, tokens=2**22)}
    return iso.plan(model, "complete-d", base=build(make, 64, 2, 1), hps=HPS, **run, **said)


def optimizer(plan: iso.Plan, model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(plan.param_groups(model))


def numbers(made: torch.optim.Optimizer, model: nn.Module) -> Numbers:
    """lr, eps, decay and betas of every tensor as the optimiser holds them, by the name of the bare model."""
    groups = {id(parameter): group for group in made.param_groups for parameter in group["params"]}
    out = {}
    for raw, parameter in model.named_parameters():
        group = groups[id(parameter)]
        name = normalise(raw, ddp=True)
        out[name] = [group["lr"], group["eps"], group["weight_decay"], *group["betas"]]
    return out


def rows(plan: iso.Plan) -> Numbers:
    return {row.name: [row.lr, row.eps, row.weight_decay, *row.betas] for row in plan.rows}


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    out = model(ids)
    return out if isinstance(out, Tensor) else out.logits


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    now = logits(model, ids)
    return nn.functional.cross_entropy(now[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {
        normalise(name, ddp=True): (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def shard(model: nn.Module, mesh: Any) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for block in module:
                fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def emptied(model: nn.Module) -> nn.Module:
    """From the meta device to memory; torch unties shared weights on the way."""
    tied = not hasattr(model, "config")
    model.to_empty(device="cpu")
    if tied:
        model.lm_head.weight = model.wte.weight
    return model


@pytest.fixture
def mesh() -> Iterator[Any]:
    """One process that is a mesh."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


@BOTH
def test_the_groups_say_what_the_rows_say(make: Make) -> None:
    model = build(make)
    plan = planned(make, model)
    found = numbers(optimizer(plan, model), model)
    assert found == rows(plan)
    assert len({tuple(value) for value in found.values()}) >= 5  # the numbers do differ between tensors


class Prefixed(nn.Module):
    """What data parallel wrappers look like from outside."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any) -> Any:
        return self.module(*args)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compile": lambda model: torch.compile(model, backend="eager"),  # type: ignore[dict-item]
    "data parallel": Prefixed,
    "compile around data parallel": lambda model: torch.compile(Prefixed(model), backend="eager"),  # type: ignore
    "data parallel around compile": lambda model: Prefixed(torch.compile(model, backend="eager")),  # type: ignore
    "deepcopy": copy.deepcopy,
}


@BOTH
@pytest.mark.parametrize("absorb", [True, False], ids=["absorbed", "hooks"])
@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_keep_numbers_values_and_logits(make: Make, name: str, absorb: bool) -> None:
    model, bare = build(make), build(make)
    plan = planned(make, model, absorb=absorb)
    wrapped = WRAPPERS[name](model)
    plan.apply(wrapped)
    plan.apply(bare)
    assert numbers(optimizer(plan, wrapped), wrapped) == rows(plan)
    assert same(whole(wrapped), whole(bare))
    torch.testing.assert_close(logits(wrapped), logits(bare), rtol=0, atol=1e-6)
    assert (logits(bare) - logits(build(make))).abs().max() > 1e-3  # applying did something


@BOTH
def test_sharded_by_fsdp2(make: Make, mesh: Any) -> None:
    model, bare = build(make), build(make)
    plan = planned(make, bare)
    shard(model, mesh)
    plan.apply(model)
    plan.apply(bare)
    assert numbers(optimizer(plan, model), model) == rows(plan)
    assert same(whole(model), whole(bare))
    plan.apply(model, draw=True)
    plan.apply(bare, draw=True)
    assert same(whole(model), whole(bare))
    torch.testing.assert_close(logits(model), logits(bare), rtol=0, atol=1e-6)


@BOTH
def test_hooks_go_on_before_sharding(make: Make, mesh: Any) -> None:
    model, bare = build(make), build(make)
    plan = planned(make, bare, absorb=False)
    plan.apply(bare)
    sharded = shard(plan.apply(model), mesh)
    torch.testing.assert_close(logits(sharded), logits(bare), rtol=0, atol=1e-6)
    assert numbers(optimizer(plan, sharded), sharded) == rows(plan)
    with pytest.raises(PlanError, match="sharded") as caught:
        plan.apply(shard(build(make), mesh))
    assert "fully_shard" in caught.value.hint


@BOTH
def test_built_on_meta_then_started_by_its_own_code(make: Make) -> None:
    with torch.device("meta"):
        model = make(128, 4).eval()
    plan, real = planned(make, model), planned(make, build(make))
    assert rows(plan) == rows(real)
    emptied(model)
    torch.manual_seed(0)
    if hasattr(model, "init_weights"):
        model.init_weights()
    else:
        model.apply(lambda module: module.reset_parameters() if hasattr(module, "reset_parameters") else None)
        model.apply(model._init)
    plan.apply(model)
    assert numbers(optimizer(plan, model), model) == rows(real)
    for row in real.rows:
        parameter = dict(model.named_parameters())[row.name]
        if row.init_value is not None:
            assert (parameter == row.init_value).all(), row.name
        else:
            assert float(parameter.detach().std()) == pytest.approx(row.init_std, rel=0.05), row.name
    assert logits(model).isfinite().all()


@BOTH
def test_built_on_meta_then_drawn_is_the_same_on_any_machine(make: Make, mesh: Any) -> None:
    with torch.device("meta"):
        model, other = make(128, 4).eval(), make(128, 4).eval()
    plan = planned(make, model)
    shard(other, mesh)
    for one in (model, other):
        plan.apply(emptied(one), draw=True, seed=7)
    assert same(whole(model), whole(other))
    assert numbers(optimizer(plan, other), other) == rows(plan)
    before = whole(model)
    assert not same(before, whole(plan.apply(model, draw=True, seed=8)))


@BOTH
def test_accumulated_gradients_make_the_same_step_as_one_batch(make: Make) -> None:
    one, many = build(make).double(), build(make).double()
    plan = planned(make, one)
    steps = []
    for model, parts in ((one, 1), (many, 4)):
        made = optimizer(plan, plan.apply(model))
        for _ in range(3):
            made.zero_grad()
            for part in IDS.chunk(parts):
                (loss_of(model, part) / parts).backward()
            made.step()
        steps.append(whole(model))
    for name, value in steps[0].items():
        torch.testing.assert_close(value, steps[1][name], rtol=0, atol=1e-12)
    assert not same(steps[0], whole(plan.apply(build(make).double())))


@BOTH
@pytest.mark.parametrize("absorb", [True, False], ids=["absorbed", "hooks"])
def test_state_round_trip(make: Make, absorb: bool, tmp_path: Path) -> None:
    model = build(make)
    plan = planned(make, model, absorb=absorb)
    made = optimizer(plan, plan.apply(model))
    loss_of(model, IDS).backward()
    made.step()
    torch.save({"model": model.state_dict(), "optimizer": made.state_dict(), "plan": plan.to_json()}, tmp_path / "state")
    state = torch.load(tmp_path / "state", weights_only=True)
    again, fresh = iso.Plan.from_json(state["plan"]), build(make, seed=9)
    again.apply(fresh, init=False)
    fresh.load_state_dict(state["model"], assign=True)
    if make is nanogpt:  # assigning unties, in plain torch too
        with pytest.raises(PlanError, match="not the one the plan was made for") as caught:
            again.param_groups(fresh)
        assert "tie them again" in caught.value.hint
        fresh.lm_head.weight = fresh.wte.weight
    resumed = optimizer(again, fresh)
    resumed.load_state_dict(state["optimizer"])
    assert numbers(resumed, fresh) == rows(plan)
    for one, opt in ((model, made), (fresh, resumed)):
        opt.zero_grad()
        loss_of(one, IDS).backward()
        opt.step()
    assert same(whole(model), whole(fresh))


def _rank(rank: int, folder: str) -> None:
    """One of two processes: FSDP2 and DDP around both models; what it finds goes into a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = dist.init_device_mesh("cpu", (2,))
    out: dict[str, bool] = {}
    for name, make in MAKERS.items():
        bare, sharded = build(make), shard(build(make), mesh)
        plan = planned(make, bare)
        plan.apply(sharded)
        plan.apply(bare)
        made = optimizer(plan, sharded)
        out[f"{name}: numbers"] = numbers(made, sharded) == rows(plan)
        out[f"{name}: really in two"] = all(
            isinstance(p, DTensor) and p.to_local().numel() < p.numel() for p in sharded.parameters()
        )
        out[f"{name}: values"] = same(whole(sharded), whole(bare))
        out[f"{name}: logits"] = torch.allclose(logits(sharded), logits(bare), rtol=0, atol=1e-6)
        loss_of(sharded, IDS).backward()
        made.step()
        plain = optimizer(plan, bare)
        loss_of(bare, IDS).backward()
        plain.step()
        after = whole(bare)
        out[f"{name}: step"] = all(torch.allclose(v, after[k], rtol=0, atol=1e-4) for k, v in whole(sharded).items())
        hooked, hooked_bare = build(make), build(make)
        hooks = planned(make, hooked_bare, absorb=False)
        hooks.apply(hooked_bare)
        shard(hooks.apply(hooked), mesh)
        out[f"{name}: hooks"] = torch.allclose(logits(hooked), logits(hooked_bare), rtol=0, atol=1e-6)
        wide = DistributedDataParallel(build(make))
        out[f"{name}: ddp"] = numbers(optimizer(plan, wide), wide) == rows(plan)
    Path(folder, f"{rank}.json").write_text(json.dumps(out))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    mp.spawn(_rank, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert len(found) == 14
        assert all(found.values()), found


@pytest.mark.slow
@BOTH
def test_hooks_survive_inductor(make: Make) -> None:
    model = build(make)
    planned(make, model, absorb=False).apply(model)
    want = logits(model)
    torch.testing.assert_close(logits(torch.compile(model)), want, rtol=0, atol=1e-5)  # type: ignore[arg-type]
