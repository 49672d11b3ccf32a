from __future__ import annotations

import pytest

from isoscale._base.errors import ConfigError
from isoscale.formats.recipes import BF16, FP8, PLAIN, RECIPES, LayerFormats, everywhere, recipe_by_name


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


def test_passes_pair_the_operands_of_each_matmul() -> None:
    plain = LayerFormats("e4m3", "e5m2", "bf16")
    assert plain.passes == {"forward": ("e5m2", "e4m3"), "grad_input": ("bf16", "e4m3"), "grad_weight": ("bf16", "e5m2")}
    told = LayerFormats("e4m3", "e5m2", "bf16", backward_weight="fp16", backward_input="int8", weight_grad="e2m1")
    assert told.passes == {"forward": ("e5m2", "e4m3"), "grad_input": ("bf16", "fp16"), "grad_weight": ("e2m1", "int8")}
    assert not PLAIN.casts
    assert LayerFormats(weight_grad="bf16").casts


def test_names_are_kept_in_full_and_overrides_only_where_they_differ() -> None:
    formats = LayerFormats("mxfp4", "MXFP4/floor", "nvfp4", backward_weight="mxfp4/floor")
    assert formats == LayerFormats("mxfp4/floor", "mxfp4/floor", "nvfp4/amax")
    assert formats.to_dict() == {"weight": "mxfp4/floor", "input": "mxfp4/floor", "grad": "nvfp4/amax"}
    assert formats != LayerFormats("mxfp4/rceil", "mxfp4/floor", "nvfp4/amax")
    other = LayerFormats("mxfp4", "mxfp4", "bf16", weight_grad="mxfp4/16x16")
    assert LayerFormats(**other.to_dict()) == other
    assert str(other) == "w mxfp4/floor, x mxfp4/floor, g bf16; backward g for dW mxfp4/floor/16x16"


@pytest.mark.parametrize("operand", ["weight", "input", "grad", "backward_weight", "backward_input", "weight_grad"])
def test_a_wrong_format_is_refused_at_birth(operand: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LayerFormats(**{operand: "mxpf6_e3m2"})
    assert caught.value.key == f"formats.{operand}"
    assert "mxfp6_e3m2" in caught.value.hint
    with pytest.raises(ConfigError):
        LayerFormats(**{operand: "mxfp6_e3m2/flor"})


@pytest.mark.parametrize("name", ["fp8-dynamic", "mxfp8-bare", "mxfp6-forward", "mxfp4-bare", "nvfp4-bare"])
def test_block_recipes_leave_the_heads_in_bf16_and_say_so(name: str) -> None:
    recipe = recipe_by_name(name)
    assert recipe.formats("head") == recipe.formats("model.lm_head") == BF16
    assert "heads in BF16" in recipe.note
    assert recipe.formats("blocks.0.attn.out") == recipe.formats("blocks.7.mlp.gate_up") != BF16
    assert "/" in recipe.formats("blocks.0.attn.out").weight


def test_what_the_block_recipes_cast() -> None:
    assert recipe_by_name("mxfp8-bare").formats("a") == everywhere("mxfp8_e4m3/floor")
    forward = recipe_by_name("mxfp6-forward").formats("a").passes
    assert forward.pop("forward") == ("mxfp6_e3m2/floor",) * 2
    assert set(forward.values()) == {("bf16", "bf16")}
    assert recipe_by_name("fp8-dynamic").formats("a").grad == "fp8_tensor_e5m2/amax"
