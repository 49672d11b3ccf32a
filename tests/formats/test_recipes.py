from __future__ import annotations

import json

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


@pytest.mark.parametrize(
    ("change", "key", "says"),
    [
        ({"stochastic": ("gradd",)}, "stochastic", "grad"), ({"stochastic": ("input",)}, "stochastic", "diverge"),
        ({"stochastic": "grad"}, "stochastic", "grad"), ({"hadamard": ("dW",)}, "hadamard", "forward, grad_input, grad_weight"),
        ({"hadamard": ("grad_wieght",)}, "hadamard", "grad_weight"), ({"hadamard_size": 24}, "hadamard_size", "16"),
        ({"hadamard_size": 1}, "hadamard_size", "16"), ({"hadamard_size": True}, "hadamard_size", "16"),
        ({"pre_scale": 0.75}, "pre_scale", "stochastic"), ({"pre_scale": 1.5}, "pre_scale", "0.75"),
        ({"pre_scale": 0.75, "stochastic": ("grad",)}, "pre_scale", "mxfp4/rceil"),
        ({"grad": "fp32", "stochastic": ("grad",)}, "stochastic", "grad"),
    ],
)  # fmt: skip
def test_a_treatment_that_cannot_be_is_refused_with_a_hint(change: dict[str, object], key: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LayerFormats(**{"weight": "mxfp4", "input": "mxfp4", "grad": "mxfp4/floor", **change})  # type: ignore[arg-type]
    assert caught.value.key == f"formats.{key}"
    assert says in caught.value.hint


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_formats_survive_json_and_say_what_is_done(recipe: str) -> None:
    formats = recipe_by_name(recipe).formats("blocks.0.mlp.up")
    back = LayerFormats(**json.loads(json.dumps(formats.to_dict())))
    assert back == formats
    assert hash(back) == hash(formats)
    assert ("SR" in str(formats)) == bool(formats.stochastic)
    assert (f"H{formats.hadamard_size} in" in str(formats)) == bool(formats.hadamard)


def test_treatments_in_words() -> None:
    assert str(recipe_by_name("nvfp4").formats("a")) == (
        "w nvfp4/amax/16x16, x nvfp4/amax, g nvfp4/amax; SR g in dX, g in dW; H16 in dW"
    )
    assert str(recipe_by_name("mxfp4").formats("a")) == (
        "w mxfp4/even, x mxfp4/even, g mxfp4/rceil; backward w mxfp4/rceil, x mxfp4/rceil; "
        "SR x3/4 g w in dX, g x in dW; H32 in dX, dW"
    )
    order = LayerFormats("mxfp4", "mxfp4", "mxfp4", stochastic=("weight_grad", "grad"))
    assert order == LayerFormats("mxfp4", "mxfp4", "mxfp4", stochastic=("grad", "weight_grad"))


def test_what_the_training_recipes_are() -> None:
    """The choices of the papers that their notes name."""
    assert recipe_by_name("mxfp8").formats("a") == everywhere("mxfp8_e4m3/rceil")
    assert recipe_by_name("mxfp8-e5m2-grad").formats("a").grad == "mxfp8_e5m2/rceil"
    assert "diverge" in recipe_by_name("mxfp8-e5m2-grad").note
    assert recipe_by_name("mxfp6").formats("a") == everywhere("mxfp6_e3m2/rceil")
    nvfp4 = recipe_by_name("nvfp4")
    assert nvfp4.keep == (2 / 62, 8 / 62)
    assert nvfp4.formats("a").passes["grad_weight"] == ("nvfp4/amax", "nvfp4/amax")
    assert all(recipe.formats("head") == BF16 for name, recipe in RECIPES.items() if name.startswith(("mxfp", "nvfp")))
    assert all(recipe.keep == (0.0, 0.0) and recipe.finish == 0 for name, recipe in RECIPES.items() if name != "nvfp4")
