"""Low-precision recipes as data: which linear layer's weight, input and output gradient are cast to what.

A recipe is an ordered list of (module patterns, formats); the first match wins. Copy one and change a line to make your
own. Patterns are shell-style, on the module's path.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import MappingProxyType

from isoscale._base.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class LayerFormats:
    """Element formats of one linear layer's operands. `fp32` means: left as it is.

    Args:
        weight: of W, in the forward and in the input-gradient matmul.
        input: of X, in the forward and in the weight-gradient matmul.
        grad: of the output gradient, in both backward matmuls.
    """

    weight: str = "fp32"
    input: str = "fp32"
    grad: str = "fp32"


PLAIN = LayerFormats()
BF16 = LayerFormats("bf16", "bf16", "bf16")
FP8 = LayerFormats("e4m3", "e4m3", "e5m2")
OUT_PROJECTIONS = ("*attn.out", "*mlp.down", "*o_proj", "*down_proj", "*c_proj")
HEADS = ("head", "*lm_head")


@dataclass(frozen=True)
class Recipe:
    """A named recipe.

    Args:
        name: as users type it.
        layers: (patterns, formats) in order; the first pattern that fits a module's path decides.
        note: what it is and where it comes from, shown by `isoscale plan`.
    """

    name: str
    layers: tuple[tuple[tuple[str, ...], LayerFormats], ...]
    note: str

    def formats(self, module_path: str) -> LayerFormats:
        """The formats of one linear layer."""
        for patterns, formats in self.layers:
            if any(fnmatchcase(module_path, pattern) for pattern in patterns):
                return formats
        return PLAIN


_RECIPES = (
    Recipe("none", (), "no casts"),
    Recipe("bf16", ((("*",), BF16),), "BF16 operands in every linear, FP32 accumulation"),
    Recipe(
        "fp8",
        ((OUT_PROJECTIONS + HEADS, BF16), (("*",), FP8)),
        "u-muP's final recipe (arXiv 2407.17465): plain saturating cast, E5M2 gradients, critical matmuls in BF16",
    ),
    Recipe("fp8-all", ((("*",), FP8),), "as fp8, but no layer is left out"),
    Recipe(
        "fp8-small-scale",
        (
            (HEADS, BF16),
            (OUT_PROJECTIONS, LayerFormats("e4m3", "e5m2", "e4m3")),
            (("*",), LayerFormats("e4m3", "e4m3", "e4m3")),
        ),
        "u-muP's earlier recipe: E4M3 gradients, E5M2 inputs of the critical layers; replaced at scale",
    ),
)
RECIPES: Mapping[str, Recipe] = MappingProxyType({recipe.name: recipe for recipe in _RECIPES})


def recipe_by_name(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        ConfigError: unknown; the nearest names are suggested.
    """
    if name not in RECIPES:
        raise ConfigError(
            f"unknown recipe {name!r}", key="numerics.recipe", value=name, hint=did_you_mean(name, RECIPES)
        )
    return RECIPES[name]
