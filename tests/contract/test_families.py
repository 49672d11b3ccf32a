"""Every optimiser family passes this suite: its table is complete, and a few real steps move functions alike at any width.

A newcomer adds one row to `OPTIMIZERS` (how to build it from a plan's groups) and one to the registry of families.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import isoscale as iso
from isoscale._base.errors import PlanError
from isoscale.optim import make_optimizer
from isoscale.rules import FAMILIES, ROLES, by_name, names
from isoscale.rules.table import HP_DEFAULTS

RATIOS = ("fan_in_ratio", "fan_out_ratio", "fan_out_over_in_ratio", "muon_original_ratio", "muon_rms_ratio", "depth_ratio",
          "width_ratio", "batch_ratio", "token_ratio", "tokens_per_parameter_ratio", "head_size_ratio")  # fmt: skip
SIZES = {"fan_in": 64, "fan_out": 128, "fan_out_share": 1.0, "stack_depth": 4, "base_depth": 4, "head_size": 16,
         **dict.fromkeys(RATIOS, 1.0)}  # fmt: skip


class Sign(torch.optim.Optimizer):
    """Lion without memory: the sign of the gradient, decay coupled to the LR."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 1.0, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * p.grad.sign())


OPTIMIZERS: dict[str, tuple[float, Callable[[iso.Plan, nn.Module], torch.optim.Optimizer]]] = {
    "adamw": (2e-2, make_optimizer),
    "sgd": (2.0, make_optimizer),
    "lion": (1e-2, lambda plan, model: Sign(plan.param_groups(model))),
    "muon": (5e-2, make_optimizer),
    "muon-rms": (2e-2, make_optimizer),
    "adafactor": (2e-1, make_optimizer),
    "lmd": (5e-2, make_optimizer),
    "madam": (5e-2, make_optimizer),
}


def test_every_family_is_in_the_suite() -> None:
    assert set(OPTIMIZERS) == set(FAMILIES)


@pytest.mark.parametrize("optimizer", FAMILIES)
@pytest.mark.parametrize("name", names())
def test_tables_are_complete_and_finite(name: str, optimizer: str) -> None:
    if name.startswith("u-") and optimizer not in ("adamw", "lion", "madam", "lmd"):  # only unit-scaled rules may refuse a family
        with pytest.raises(PlanError, match="has no rules for the optimiser"):
            by_name(name, optimizer)
        return
    table = by_name(name, optimizer)
    assert table.optimizer == optimizer
    hps = {**HP_DEFAULTS, "weight_decay": 0.1}
    for role in ROLES:
        owner = table.owner(role, 2)
        for in_stack in (False, True):
            rule = owner.resolved(role, in_stack)
            for quantity in ("lr", "init", "forward", "eps", "weight_decay"):
                value = getattr(rule, quantity).evaluate(hps, SIZES)
                assert math.isfinite(value.number)
                assert value.number >= 0
    assert table.resolved("hidden", True).lr.evaluate(hps, SIZES).number == pytest.approx(
        hps["lr"] * table.resolved("hidden", True).lr.evaluate({**hps, "lr": 1.0}, SIZES).number
    )


class Residual(nn.Module):
    """Blocks of two linears with norms, no attention: quick, and with every kind of weight."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.up = nn.ModuleList(nn.Linear(width, 2 * width, bias=False) for _ in range(depth))
        self.down = nn.ModuleList(nn.Linear(2 * width, width, bias=False) for _ in range(depth))
        self.last, self.head = nn.LayerNorm(width), nn.Linear(width, 32, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for norm, up, down in zip(self.norms, self.up, self.down):
            x = x + down(torch.relu(up(norm(x))))
        return self.head(self.last(x))


def change(optimizer: str, rule: str, width: int, depth: int, steps: int = 4) -> float:
    """How far a few steps move the logits, rms."""
    lr, build = OPTIMIZERS[optimizer]
    out = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = Residual(width, depth)
        base = model if (width, depth) == (32, 2) else Residual(32, 2)
        plan = iso.plan(model, rule, base=base if rule != "sp" else None, hps={"lr": lr, "eps": 1e-12}, optimizer=optimizer)
        plan.apply(model)
        moves = build(plan, model)
        draw = torch.Generator().manual_seed(9)
        ids = torch.randint(32, (64, 8), generator=draw)
        before = model(ids).detach()
        for _ in range(steps):
            loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.roll(1, 1).flatten())
            moves.zero_grad()
            loss.backward()
            moves.step()
        with moves.mean() if isinstance(moves, iso.optim.LMD) else nullcontext():
            out.append(float((model(ids) - before).detach().square().mean().sqrt()))
    return sum(out) / len(out)


def slope(optimizer: str, rule: str, axis: str) -> float:
    sizes = [(32, 2), (512, 2)] if axis == "width" else [(32, 2), (32, 16)]
    small, big = (change(optimizer, rule, *size) for size in sizes)
    return math.log2(big / small) / (4 if axis == "width" else 3)


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["width", "depth"])
@pytest.mark.parametrize("optimizer", FAMILIES)
def test_a_few_steps_move_the_function_alike(optimizer: str, axis: str) -> None:
    assert abs(slope(optimizer, "complete-d", axis)) < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "lion", "sgd", "muon", "muon-rms", "lmd", "madam"])
def test_control_without_rules_it_grows(optimizer: str) -> None:
    """Not so for Adafactor, whose steps are shares of weights that torch's init already shrinks with fan-in."""
    assert abs(slope(optimizer, "sp", "width")) > 0.3


@pytest.mark.slow
def test_control_muon_scaled_twice_vanishes() -> None:
    """Adam's 1 / m_N on top of Muon's own shape factor."""

    def twice(width: int) -> float:
        torch.manual_seed(0)
        model = Residual(width, 2)
        base = model if width == 32 else Residual(32, 2)
        plan = iso.plan(model, "complete-d", base=base, hps={"lr": 5e-2, "lr_rest": 1e-6}, optimizer="muon")
        plan.apply(model)
        moves = make_optimizer(plan, model)
        for group in moves.param_groups:
            group["lr"] *= 32 / width
        ids = torch.randint(32, (64, 8), generator=torch.Generator().manual_seed(9))
        before = model(ids).detach()
        loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.roll(1, 1).flatten())
        loss.backward()
        moves.step()
        return float((model(ids) - before).detach().square().mean().sqrt())

    assert math.log2(twice(512) / twice(32)) / 4 < -0.5
