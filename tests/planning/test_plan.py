"""The plan as a thing: JSON, diff, explain, print; and that nothing done to the model can lose it."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import isoscale as iso
from isoscale._base.errors import PlanError
from isoscale.formats.recipes import RECIPES
from isoscale.models import Decoder, DecoderConfig

Make = Callable[..., Decoder]


def settings(plan: iso.Plan, model: torch.nn.Module) -> dict[str, tuple[float, float, float]]:
    """Name -> (lr, weight decay, eps) as the optimiser would see it."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        names[id(p)].replace("_orig_mod.", "").removeprefix("module."): (g["lr"], g["weight_decay"], g["eps"])
        for g in plan.param_groups(model) for p in g["params"]
    }  # fmt: skip


@pytest.fixture
def model(make: Make) -> Decoder:
    return make()


@pytest.fixture
def plan(model: Decoder) -> iso.Plan:
    return iso.plan(model, "u-mup", hps={"lr": 2.0, "weight_decay": 0.01})


def test_survives_to_empty(make: Make, plan: iso.Plan, model: Decoder) -> None:
    with torch.device("meta"):
        other = make()
    before = settings(plan, model)
    other.to_empty(device="cpu")
    plan.apply(other, seed=5)
    plan.apply(model, seed=5)
    assert settings(plan, other) == before
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))


def test_survives_load_state_dict_assign(make: Make, plan: iso.Plan, model: Decoder) -> None:
    before = settings(plan, model)
    model.load_state_dict(make().state_dict(), assign=True)
    assert settings(plan, model) == before


def test_survives_deepcopy(plan: iso.Plan, model: Decoder) -> None:
    plan.apply(model)
    twin = copy.deepcopy(model)
    assert settings(plan, twin) == settings(plan, model)
    assert twin.blocks[1].attn_tau == model.blocks[1].attn_tau


def test_survives_compile(plan: iso.Plan, model: Decoder) -> None:
    before = settings(plan, model)
    wrapped = torch.compile(model, backend="eager")
    assert any("_orig_mod" in name for name, _ in wrapped.named_parameters())
    assert settings(plan, wrapped) == before
    plan.apply(wrapped, seed=1)
    plan.apply(twin := copy.deepcopy(model), seed=1)
    assert torch.equal(model.embed.weight, twin.embed.weight)


@pytest.fixture
def one_process() -> None:
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_survives_fully_shard(make: Make, plan: iso.Plan, model: Decoder) -> None:
    before = settings(plan, model)
    plan.apply(model, seed=2)
    sharded = make()
    for block in sharded.blocks:
        fully_shard(block)
    fully_shard(sharded)
    plan.apply(sharded, seed=2)
    assert settings(plan, sharded) == before
    for (name, a), b in zip(sharded.named_parameters(), model.parameters()):
        assert torch.equal(a.full_tensor(), b), name  # type: ignore[attr-defined]
    ids = torch.arange(40).view(2, 20) % 64
    optimizer = torch.optim.AdamW(plan.param_groups(sharded))
    sharded(ids, ids).backward()
    optimizer.step()


@pytest.mark.usefixtures("one_process")
def test_survives_ddp(plan: iso.Plan, model: Decoder) -> None:
    before = settings(plan, model)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    assert settings(plan, wrapped) == before
    plan.apply(wrapped, seed=2)


def test_twelve_blocks_have_few_groups_and_fused_adamw_takes_them(make: Make) -> None:
    model = make(depth=12, norm="trainable")
    plan = iso.plan(model, "u-mup", hps={"lr": 1.0, "weight_decay": 0.01})
    groups = plan.param_groups(model)
    assert len(groups) <= 10
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    optimizer = torch.optim.AdamW(groups, fused=True)
    ids = torch.arange(32).view(2, 16)
    before = model.head.weight.detach().clone()
    model(ids, ids).backward()
    optimizer.step()
    assert not torch.equal(before, model.head.weight)


def test_frozen_parameters_are_left_out(plan: iso.Plan, model: Decoder) -> None:
    model.embed.weight.requires_grad_(False)
    assert "embed.weight" not in settings(plan, model)


def test_json_round_trip(plan: iso.Plan) -> None:
    assert iso.Plan.from_json(plan.to_json()) == plan
    for broken in ("{}", "no", '{"version": 99}'):
        with pytest.raises(PlanError):
            iso.Plan.from_json(broken)


def test_rows_are_immutable(plan: iso.Plan) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.rows[0].lr = 1.0  # type: ignore[misc]
    with pytest.raises(TypeError):
        plan.rows[0].reasons["lr"] = ""  # type: ignore[index]


def test_diff_of_proxy_and_target_folds_blocks(make: Make) -> None:
    proxy, target = iso.plan(make()), iso.plan(make(width=64, depth=4), recipe="fp8")
    changes = {(c.name, c.quantity): c for c in proxy.diff(target)}
    qkv = changes["blocks.*.attn.qkv.weight", "lr"]
    assert qkv.right == pytest.approx(qkv.left / 2)
    assert "fan_in 64" in qkv.reason
    assert changes["blocks.*.attn.qkv.weight", "formats"].right.grad == "e5m2"
    assert len(changes["blocks.*.attn_residual", "multiplier"].right) == 4
    assert not proxy.diff(proxy)


def test_explain_and_print(plan: iso.Plan) -> None:
    text = plan.explain("blocks.0.attn.qkv.weight")
    assert "lr" in text
    assert "fan_in^-1/2 x stack_depth^-1/2 (fan_in 32, stack_depth 2)" in text
    assert "tau of branch 1 of 4" in plan.explain("blocks.0.mlp_residual")
    with pytest.raises(PlanError) as caught:
        plan.explain("blocks.0.attn.qkw.weight")
    assert "blocks.0.attn.qkv.weight" in caught.value.hint
    shown = str(iso.plan(Decoder(DecoderConfig(width=1024, depth=3)), "u-mup", recipe="fp8"))
    assert "blocks.*.attn.qkv (3)" in shown
    assert max(len(line) for line in shown.splitlines()) <= 80


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_every_recipe_shows_in_80_columns_and_survives_json(recipe: str) -> None:
    made = iso.plan(Decoder(DecoderConfig(width=1024, depth=3)), "u-mup", recipe=recipe)
    assert max(len(line) for line in str(made).splitlines()) <= 80
    assert iso.Plan.from_json(made.to_json()) == made
    for row in made.rows:
        if row.formats.casts:
            assert str(row.formats) in " ".join(made.explain(row.name).split())
            block = [line for line in made.explain(row.name).splitlines() if "/floor" in line or "/amax" in line]
            assert max(map(len, block), default=0) <= 80
    assert ("cast matmul operands" in str(made)) == (recipe != "none")


def test_another_model_is_refused(make: Make, plan: iso.Plan) -> None:
    with pytest.raises(PlanError, match="not the one the plan was made for") as caught:
        plan.param_groups(make(depth=3))
    assert "blocks.2" in str(caught.value.value)
    with pytest.raises(PlanError, match="another shape"):
        plan.apply(make(vocab=65))
    with torch.device("meta"):
        meta = make()
    with pytest.raises(PlanError, match="meta device"):
        plan.apply(meta)


def test_init_depends_on_seed_and_name_only(make: Make, plan: iso.Plan) -> None:
    a, b = make(), make()
    plan.apply(a, seed=1)
    plan.apply(b, seed=2)
    assert not torch.equal(a.embed.weight, b.embed.weight)
    assert not torch.equal(a.blocks[0].attn.out.weight, a.blocks[1].attn.out.weight)
    assert a.embed.weight.std().item() == pytest.approx(1.0, abs=0.05)
