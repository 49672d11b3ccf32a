"""The plan in other people's trainers: diffs of at most ten lines, and the LRs that really reach each parameter."""

from __future__ import annotations

import difflib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import isoscale as iso

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"
NAMES = ("loop", "trainer", "lightning")


def run(name: str) -> dict[str, Any]:
    space: dict[str, Any] = {"__name__": "example"}
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile((EXAMPLES / f"{name}.py").read_text(), name, "exec"), space)
    return space


def added(name: str) -> list[str]:
    before, after = ((EXAMPLES / f"{name}_{side}.py").read_text().splitlines() for side in ("before", "after"))
    lines = list(difflib.unified_diff(before, after, n=0, lineterm=""))[2:]
    return [line for line in lines if line[0] in "+-"]


@pytest.mark.parametrize("name", NAMES)
def test_the_diff_is_short(name: str) -> None:
    assert 0 < len(added(name)) <= 10, added(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_gets_the_plans_rate(name: str) -> None:
    space = run(f"{name}_after")
    module = space.get("module")
    model, plan = (module.model, module.plan) if module is not None else (space["model"], space["plan"])
    trainer = space.get("trainer")
    if name == "lightning":
        optimizer = trainer.optimizers[0]  # type: ignore[union-attr]
    else:
        optimizer = trainer.optimizer if trainer is not None else space["optimizer"]
    rates = {id(p): group.get("initial_lr", group["lr"]) for group in optimizer.param_groups for p in group["params"]}
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    wanted = {row.name: row for row in plan.rows}
    for raw, parameter in model.named_parameters():
        row = wanted[raw]
        assert rates[id(parameter)] == pytest.approx(row.lr), raw
        assert decays[id(parameter)] == pytest.approx(row.weight_decay), raw
    assert len(set(rates.values())) > 2
    assert isinstance(plan, iso.Plan)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_examples_without_a_plan_run_too(name: str) -> None:
    assert "plan" not in run(f"{name}_before")
