from __future__ import annotations

import pytest

from isoscale._base.errors import ConfigError
from isoscale.formats.recipes import BF16, FP8, PLAIN, RECIPES, recipe_by_name


@pytest.mark.parametrize(
    ("path", "formats"),
    [
        ("blocks.3.attn.qkv", FP8), ("blocks.0.mlp.gate_up", FP8), ("blocks.3.attn.out", BF16),
        ("blocks.11.mlp.down", BF16), ("head", BF16), ("model.layers.0.self_attn.o_proj", BF16),
        ("model.layers.0.mlp.down_proj", BF16), ("model.layers.0.self_attn.q_proj", FP8), ("lm_head", BF16),
    ],
)  # fmt: skip
def test_fp8_keeps_the_critical_layers_in_bf16(path: str, formats: object) -> None:
    """arXiv 2407.17465: attention out-projection, FFN down-projection and head."""
    assert recipe_by_name("fp8").formats(path) == formats


def test_the_earlier_recipe_has_no_e5m2_gradients() -> None:
    early = recipe_by_name("fp8-small-scale")
    assert early.formats("blocks.0.attn.qkv").grad == "e4m3"
    assert early.formats("blocks.0.attn.out").input == "e5m2"


def test_none_casts_nothing() -> None:
    assert recipe_by_name("none").formats("anything") == PLAIN


def test_unknown_recipe_suggests() -> None:
    with pytest.raises(ConfigError) as caught:
        recipe_by_name("fp8al")
    assert "fp8-all" in caught.value.hint
    assert all(recipe.note for recipe in RECIPES.values())
