from __future__ import annotations

import pytest

from isoscale._base.errors import PlanError
from isoscale.rules import by_name, names
from isoscale.rules.registry import _register


def test_names_and_nearest() -> None:
    assert names() == ("sp", "sp-lecun", "mup", "u-mup")
    with pytest.raises(PlanError) as caught:
        by_name("u-mupp")
    assert "u-mup" in caught.value.hint


def test_duplicates_are_refused() -> None:
    with pytest.raises(PlanError, match="two parametrisations"):
        _register(by_name("sp"), by_name("sp"))
