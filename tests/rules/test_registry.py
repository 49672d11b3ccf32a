from __future__ import annotations

import pytest

from isoscale._base.errors import PlanError
from isoscale.rules import by_name, names
from isoscale.rules.registry import _register


def test_names_and_nearest() -> None:
    assert names() == (
        "sp", "sp-lecun", "mup", "mup-table3", "mup-table9", "spectral", "u-mup", "depth-mup", "completep", "complete-d",
        "u-complete-d",
    )  # fmt: skip
    with pytest.raises(PlanError) as caught:
        by_name("u-mupp")
    assert "u-mup" in caught.value.hint


def test_duplicates_are_refused() -> None:
    with pytest.raises(PlanError, match="two parametrisations"):
        _register(lambda options: by_name("sp"), lambda options: by_name("sp"))
