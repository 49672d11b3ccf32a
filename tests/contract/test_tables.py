"""Every parametrisation passes this suite; a newcomer adds one line to the registry."""

from __future__ import annotations

import math

import pytest

from isoscale.rules import ROLES, by_name, names
from isoscale.rules.table import HP_DEFAULTS, SITE_KINDS

RATIOS = ("fan_in_ratio", "fan_out_ratio", "fan_out_over_in_ratio", "muon_original_ratio", "muon_rms_ratio", "depth_ratio",
          "width_ratio", "batch_ratio", "token_ratio", "tokens_per_parameter_ratio", "head_size_ratio")  # fmt: skip
SIZES = {"fan_in": 64, "fan_out": 128, "fan_out_share": 1.0, "stack_depth": 4, "base_depth": 4, "head_size": 16,
         **dict.fromkeys(RATIOS, 1.0)}  # fmt: skip
BIG = {**SIZES, "fan_in": 256, "fan_out": 512, "fan_in_ratio": 4.0, "fan_out_ratio": 4.0, "width_ratio": 4.0}


@pytest.mark.parametrize("name", names())
def test_is_complete_and_finite(name: str) -> None:
    table = by_name(name)
    assert {"embedding", "input", "hidden", "readout", "gain", "bias"} <= set(table.roles) <= set(ROLES)
    assert set(table.sites) == set(SITE_KINDS)
    hps = {**HP_DEFAULTS, "weight_decay": 0.1}
    for role in ROLES:
        for in_stack in (False, True):
            rule = table.resolved(role, in_stack)
            for quantity in ("lr", "init", "forward", "eps", "weight_decay"):
                value = getattr(rule, quantity).evaluate(hps, SIZES)
                assert math.isfinite(value.number)
                assert value.reason.startswith(f"{value.number:.6g} = ")
                assert value.number >= 0


@pytest.mark.parametrize("name", ["sp", "sp-lecun", "mup", "u-mup"])
def test_gains_and_biases_are_not_decayed(name: str) -> None:
    for role in ("gain", "bias"):
        assert by_name(name).resolved(role, True).weight_decay.evaluate({**HP_DEFAULTS, "weight_decay": 1.0}, SIZES).number == 0


def number(name: str, role: str, quantity: str, sizes: dict[str, float]) -> float:
    """One number of a table."""
    return getattr(by_name(name).resolved(role, False), quantity).evaluate(HP_DEFAULTS, sizes).number  # type: ignore[no-any-return]


def test_scaling_with_width_as_printed() -> None:
    """Ratios at 4x width: muP (TP-V table 8), u-muP (2407.17465 table 2), SP (none)."""

    def ratio(name: str, role: str, quantity: str) -> float:
        return number(name, role, quantity, BIG) / number(name, role, quantity, SIZES)

    assert [ratio("sp", "hidden", q) for q in ("lr", "init", "forward")] == [1, 1, 1]
    assert [ratio("sp-lecun", "hidden", q) for q in ("lr", "init", "forward")] == [1, 0.5, 1]
    assert [ratio("mup", "hidden", q) for q in ("lr", "init", "forward")] == [0.25, 0.5, 1]
    assert [ratio("mup", "readout", q) for q in ("lr", "init", "forward")] == [1, 1, 0.25]
    assert [ratio("mup", "embedding", q) for q in ("lr", "init", "forward")] == [1, 1, 1]
    assert [ratio("u-mup", "hidden", q) for q in ("lr", "init", "forward")] == [0.5, 1, 0.5]
    assert [ratio("u-mup", "readout", q) for q in ("lr", "init", "forward")] == [1, 1, 0.25]
    assert [ratio("u-mup", "embedding", q) for q in ("lr", "init", "forward")] == [0.5, 1, 1]


def test_independent_decay_is_independent_of_the_lr() -> None:
    table = by_name("u-mup")
    for lr in (0.5, 4.0):
        hps = {**HP_DEFAULTS, "lr": lr, "weight_decay": 0.01}
        rule = table.resolved("hidden", True)
        assert rule.lr.evaluate(hps, BIG).number * rule.weight_decay.evaluate(hps, BIG).number == pytest.approx(0.01)
