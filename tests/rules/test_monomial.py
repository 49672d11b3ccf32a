from __future__ import annotations

import pytest

from isoscale._base.errors import PlanError
from isoscale.rules import Monomial, hp, size


def test_evaluates_with_a_reason() -> None:
    value = (hp("lr") * size("fan_in", -1 / 2)).evaluate({"lr": 1.0}, {"fan_in": 64})
    assert value.number == 0.125
    assert value.reason == "0.125 = lr 1 x fan_in^-1/2 (fan_in 64)"


def test_algebra() -> None:
    a, b = hp("lr") * size("fan_in", -1 / 2), size("fan_in", 1 / 2)
    assert (a * b).sizes == {}
    assert (a / a) == Monomial()
    assert (a**2).evaluate({"lr": 3.0}, {"fan_in": 4}).number == pytest.approx(9 / 4)
    assert (a * 2.0).formula() == "2 x lr x fan_in^-1/2"
    assert hash(a) == hash(hp("lr") * size("fan_in", -1 / 2))


def test_unknown_names_and_impossible_powers_are_refused() -> None:
    with pytest.raises(PlanError, match="needs the hyperparameter lr"):
        hp("lr").evaluate({}, {})
    with pytest.raises(PlanError, match="needs the size fan_in"):
        size("fan_in").evaluate({}, {})
    with pytest.raises(PlanError, match="cannot be raised"):
        hp("lr", -1).evaluate({"lr": 0.0}, {})


def test_is_immutable() -> None:
    with pytest.raises(TypeError):
        hp("lr").hps["lr"] = 2.0  # type: ignore[index]
