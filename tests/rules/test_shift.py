"""The abc symmetry as an exact equivalence: a shifted table trains the same W = A w, step for step, in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from isoscale._base.errors import PlanError
from isoscale.optim import LMD, Madam
from isoscale.rules import Table, by_name, shift, size
from isoscale.rules.monomial import Monomial

FACTORS = ("lmd", "madam")
HPS = {"sigma": 0.1, "lr_rest": 1.0, "lr": 0.03, "weight_decay": 0.3, "eps": 1e-3, "init_std": 0.5, "lr_embedding": 1.0, "alpha_out": 1.0,
       "beta1": 0.9, "beta2": 0.95}  # fmt: skip
MAKE: dict[str, Callable[[list[dict[str, Any]]], torch.optim.Optimizer]] = {
    "adamw": lambda groups: torch.optim.AdamW(groups, betas=(0.9, 0.95)),
    "sgd": torch.optim.SGD,
    "lmd": lambda groups: LMD([{"params": group["params"], "lr": group["lr"], "decay": group["weight_decay"]} for group in groups], sigma=0.1),
    "madam": lambda groups: Madam([{"params": group["params"], "lr": group["lr"]} for group in groups]),
}
FANS = {"hidden": (24, 16), "readout": (16, 3)}


def trajectory(table: Table, optimizer: str = "adamw", steps: int = 25) -> list[torch.Tensor]:
    """Effective weights A w of both layers after every step of a two-layer net on fixed data."""
    draw = torch.Generator().manual_seed(0)
    dtype = torch.float32 if optimizer == "lmd" else torch.float64  # its state is fp32
    x = torch.randn(40, 24, generator=draw, dtype=dtype)
    y = torch.randn(40, 3, generator=draw, dtype=dtype)
    weights, factors, groups = {}, {}, []
    for role, (fan_in, fan_out) in FANS.items():
        rule = table.resolved(role, in_stack=False)
        sizes = {"fan_in": fan_in, "fan_out": fan_out, "fan_in_ratio": 4.0}
        number = {name: getattr(rule, name).evaluate(HPS, sizes).number
                  for name in ("forward", "init", "lr", "eps", "weight_decay")}  # fmt: skip
        noise = torch.randn(fan_out, fan_in, generator=draw, dtype=dtype)
        weights[role] = torch.nn.Parameter(noise * number["init"])
        factors[role] = number["forward"]
        group = {"params": [weights[role]], "lr": number["lr"], "weight_decay": number["weight_decay"]}
        groups.append({**group, "eps": number["eps"]} if optimizer == "adamw" else group)
    made = MAKE[optimizer](groups)
    out = []
    for _ in range(steps):
        hidden = torch.tanh(x @ (factors["hidden"] * weights["hidden"]).t())
        loss = ((hidden @ (factors["readout"] * weights["readout"]).t() - y) ** 2).mean()
        made.zero_grad()
        loss.backward()
        made.step()
        out.append(torch.cat([(factors[role] * weights[role]).detach().flatten() for role in FANS]))
    return out


def apart(left: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    """Largest difference of effective weights over the run."""
    return max(float((a - b).abs().max()) for a, b in zip(left, right))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("role", ["hidden", "readout"])
@pytest.mark.parametrize("name", ["sp", "mup"])
def test_a_shifted_table_follows_the_same_trajectory(name: str, role: str, optimizer: str) -> None:
    table = by_name(name)
    moved = shift(table, role, size("fan_in", 1 / 2) * 3.0, optimizer)
    assert moved.role(role) != table.role(role)
    assert apart(trajectory(table, optimizer), trajectory(moved, optimizer)) < 1e-11


@pytest.mark.parametrize("optimizer", FACTORS)
@pytest.mark.parametrize("role", ["hidden", "readout"])
@pytest.mark.parametrize("name", ["sp", "mup"])
def test_where_steps_are_factors_a_shift_leaves_the_lr_alone(name: str, role: str, optimizer: str) -> None:
    """Noise, b and prior are shares of the initial weights. In fp32 for LMD, so not to the last digit."""
    table = by_name(name, optimizer)
    theta = size("fan_in", 1 / 2) * 3.0
    moved = shift(table, role, theta, optimizer)
    assert (moved.role(role).lr, moved.role(role).weight_decay) == (table.role(role).lr, table.role(role).weight_decay)
    assert apart(trajectory(table, optimizer), trajectory(moved, optimizer)) < 1e-5
    as_adam = moved.with_role(role, lr=table.role(role).lr * theta)
    assert apart(trajectory(table, optimizer), trajectory(as_adam, optimizer)) > 1e-2


@pytest.mark.parametrize("forgotten", ["eps", "weight_decay", "lr", "init"])
def test_control_a_shift_that_forgets_a_column_does_not(forgotten: str) -> None:
    table = by_name("sp")
    moved = shift(table, "hidden", size("fan_in", 1 / 2))
    broken = moved.with_role("hidden", **{forgotten: getattr(table.role("hidden"), forgotten)})
    assert apart(trajectory(table), trajectory(broken)) > 1e-4


def test_independent_decay_shifts_by_itself() -> None:
    table = replace(by_name("sp"), independent_decay=True)
    moved = shift(table, "hidden", Monomial(7.0))
    assert apart(trajectory(table), trajectory(moved)) < 1e-11


def test_mup_shifted_by_sqrt_fan_in_has_umups_columns() -> None:
    """u-muP table 2: B = 1, C = lr fan_in^-1/2, A = fan_in^-1/2 (init_std and base ratios absorbed)."""
    theta = (size("fan_in_ratio", 1 / 2) / Monomial(1.0, {"init_std": 1.0}))
    moved = shift(by_name("mup"), "hidden", theta).role("hidden")
    assert moved.init == Monomial()
    assert moved.lr.sizes == {"fan_in_ratio": -0.5}
    assert moved.forward.sizes == {"fan_in_ratio": -0.5}
    ours = by_name("u-mup").role("hidden")
    assert ours.init == Monomial()
    assert ours.lr.sizes == {"fan_in": -0.5} == ours.forward.sizes


def test_refusals() -> None:
    with pytest.raises(PlanError, match="different forward and backward factors"):
        shift(by_name("u-mup"), "readout", Monomial(2.0))
    with pytest.raises(PlanError, match="unknown optimiser"):
        shift(by_name("sp"), "hidden", Monomial(2.0), "adamm")
    with pytest.raises(PlanError, match="constant 1"):
        shift(by_name("sp"), "gain", Monomial(2.0))
    with pytest.raises(PlanError, match="positive"):
        shift(by_name("sp"), "hidden", Monomial(-2.0))
    with pytest.raises(PlanError, match="no rule for the role"):
        shift(by_name("sp"), "hiden", Monomial(2.0))
