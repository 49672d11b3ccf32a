"""Bad decoder settings are refused at birth, with key, value and a hint."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from isoscale._base.errors import ConfigError
from isoscale.models import DecoderConfig


@pytest.mark.parametrize(
    ("settings", "hint"),
    [
        ({"width": 100}, "96 fits head_size 16"),
        ({"kv_heads": 3}, r"one of \[1, 2, 4\]"),
        ({"head_size": 15, "width": 60}, "even head size"),
        ({"depth": 0}, "at least 1"),
        ({"vocab": 1}, "at least 2"),
        ({"width": 64.0}, "whole number"),
        ({"depth": True}, "whole number"),
        ({"dropout": 1.0}, r"\[0, 1\)"),
        ({"ffn_ratio": 0.0}, "> 0"),
        ({"alpha_attn": float("nan")}, "finite"),
        ({"alpha_res": -1.0}, "residual_mult"),
        ({"norm": "plian"}, "did you mean plain"),
        ({"scaling": "units"}, "did you mean unit"),
    ],
)
def test_refusals(settings: dict[str, Any], hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        DecoderConfig(**settings)


def test_derived_sizes() -> None:
    config = DecoderConfig(width=96, head_size=32, ffn_ratio=8 / 3)
    assert (config.heads, config.groups, config.hidden) == (3, 3, 256)
    with pytest.raises(FrozenInstanceError):
        config.width = 4  # type: ignore[misc]
