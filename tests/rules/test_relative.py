"""LMD's and Madam's rules: alpha is Adam's LR over the size of the init, lambda keeps its time, the rest is AdamW's."""

from __future__ import annotations

import pytest

from isoscale.rules import Options, by_name, names
from isoscale.rules.relative import ROLES
from isoscale.rules.table import HP_DEFAULTS

HPS = {**HP_DEFAULTS, "lr": 0.02, "weight_decay": 0.1}
AT = {"fan_in": 64.0, "fan_out": 64.0, "fan_out_share": 1.0, "stack_depth": 4.0, "base_depth": 4.0,
      **dict.fromkeys(("fan_in_ratio", "fan_out_ratio", "width_ratio", "depth_ratio", "batch_ratio", "token_ratio",
                       "tokens_per_parameter_ratio", "fan_out_over_in_ratio", "muon_original_ratio"), 1.0)}  # fmt: skip
WIDE = {**AT, "fan_in": 256.0, "fan_out": 256.0, "fan_in_ratio": 4.0, "fan_out_ratio": 4.0, "width_ratio": 4.0}
LAST = {**WIDE, "fan_out": 64.0, "fan_out_share": 0.25, "fan_out_ratio": 1.0, "fan_out_over_in_ratio": 0.25}
MUPS = ("mup", "mup-table3", "mup-table9", "spectral", "depth-mup", "completep", "complete-d", "u-mup", "u-complete-d")


def number(name: str, role: str, quantity: str, sizes: dict[str, float], **options: object) -> float:
    table = by_name(name, "lmd", Options(**options))  # type: ignore[arg-type]
    value: float = getattr(table.resolved(role, role == "hidden"), quantity).evaluate(HPS, sizes).number
    return value


@pytest.mark.parametrize("name", MUPS)
def test_alpha_over_width_is_one_law_in_every_form_of_mup(name: str) -> None:
    """Three abc-equivalent tables, CompleteP's, and the unit-scaled ones: one alpha, as alpha does not see the shift."""
    grown = {role: number(name, role, "lr", WIDE if role == "hidden" else LAST) / number(name, role, "lr", AT)
             for role in ("hidden", "readout")}  # fmt: skip
    assert grown == pytest.approx({"hidden": 0.5, "readout": 1.0})


@pytest.mark.parametrize("name", MUPS)
def test_the_decay_keeps_its_time(name: str) -> None:
    """alpha x lambda, a share per step, moves as Adam's lr x decay does: with width not at all."""
    for role in ("hidden", "readout"):
        sizes = WIDE if role == "hidden" else LAST
        rates = [number(name, role, "lr", at) * number(name, role, "weight_decay", at) for at in (AT, sizes)]
        assert rates[1] == pytest.approx(rates[0])


@pytest.mark.parametrize("name", [*MUPS, "sp", "sp-lecun"])
def test_constant_weight_decay_keeps_the_bound(name: str) -> None:
    bounds = {number(name, role, "weight_decay", at, constant=("weight_decay",)) for role, at in
              (("hidden", AT), ("hidden", WIDE), ("readout", LAST))}  # fmt: skip
    assert bounds == {0.1}


def test_batch_and_length_enter_as_adams() -> None:
    for axis, sizes in (("batch_ratio", {**AT, "batch_ratio": 4.0}), ("token_ratio", {**AT, "token_ratio": 4.0})):
        power = 0.5 if axis == "batch_ratio" else -0.5
        assert number("complete-d", "hidden", "lr", sizes) == pytest.approx(0.02 * 4**power)
        assert number("complete-d", "hidden", "weight_decay", sizes) == pytest.approx(0.1 * 4**power)


@pytest.mark.parametrize("name", ["sp", "sp-lecun"])
def test_standard_practice_has_one_alpha_for_all(name: str) -> None:
    assert {number(name, role, "lr", at) for role in ROLES for at in (AT, WIDE)} == {0.02}


@pytest.mark.parametrize("optimizer", ["lmd", "madam"])
@pytest.mark.parametrize("name", names())
def test_who_trains_what(name: str, optimizer: str) -> None:
    table = by_name(name, optimizer)
    assert {role for role in ROLES if table.owner(role, 2) is table} == set(ROLES)
    assert table.owner("hidden", 4) is table  # a convolution
    for role, dims in (("hidden", 1), ("embedding", 2), ("gain", 1), ("bias", 1), ("vector", 2), ("final_norm", 1)):
        owner = table.owner(role, dims)
        assert owner.optimizer == "adamw"
        assert "lr_rest" in owner.role(role).lr.hps
    muon = by_name("complete-d", "muon")
    assert [muon.owner("hidden", dims).optimizer for dims in (1, 2, 3)] == ["adamw", "muon", "adamw"]
    assert muon.owner("readout", 2).optimizer == "adamw"


@pytest.mark.parametrize("name", ["u-mup", "u-complete-d"])
def test_under_unit_scaling_every_tensor_decays_by_lr_x_weight_decay(name: str) -> None:
    """AdamW's part too; the control is Adam's own table, where it is weight_decay alone."""
    table = by_name(name, "lmd")
    for role in ("hidden", "readout", "embedding"):
        for in_stack in (False, True):
            for at in (AT, WIDE):
                rule = table.owner(role, 2).resolved(role, in_stack)
                rate = rule.lr.evaluate(HPS, at).number * rule.weight_decay.evaluate(HPS, at).number
                assert rate == pytest.approx(0.02 * 0.1)
    plain = by_name(name).resolved("hidden", True)
    assert plain.lr.evaluate(HPS, AT).number * plain.weight_decay.evaluate(HPS, AT).number == pytest.approx(0.1)
