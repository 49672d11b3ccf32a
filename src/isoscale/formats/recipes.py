"""Low-precision recipes as data: which linear layer's weight, input and output gradient are cast to what.

A recipe is an ordered list of (module patterns, formats); the first match wins. Copy one and change a line to make your
own (`dataclasses.replace`). Patterns are shell-style, on the module's path. Two things depend on more than the layer:
`keep` on how many blocks the model has (`Recipe.on`), `finish` on the training step (`Recipe.finish_step`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any

from isoscale._base.errors import ConfigError, did_you_mean
from isoscale.formats.block import BlockFormat
from isoscale.formats.layers import BACKWARD, BF16, FP8, MATMULS, PLAIN, LayerFormats, everywhere

__all__ = [
    "BACKWARD", "BF16", "FP8", "HEADS", "MATMULS", "OUT_PROJECTIONS", "PLAIN", "RECIPES", "Assignment", "LayerFormats",
    "Recipe", "everywhere", "recipe_by_name",
]  # fmt: skip

OUT_PROJECTIONS = ("*attn.out", "*mlp.down", "*o_proj", "*down_proj", "*c_proj")
HEADS = ("head", "*lm_head")
NORMS = ("mxnorm", "mxnorm-fine", "mxnorm-p1", "mxnorm-ride", "mxnorm-rounded")
"""Norms that take their statistic from the casts; what they are stands in `isoscale.numerics.NORMS`."""
_BLOCK = re.compile(r"(?:(.*?)\.)?(\d+)\..")


@dataclass(frozen=True)
class Recipe:
    """A named recipe.

    Args:
        name: as users type it.
        layers: (patterns, formats) in order; the first pattern that fits a module's path decides.
        note: what it is and where it comes from, shown by `isoscale plan`.
        keep: shares of the blocks, at the front and at the back of the stack, that stay in BF16.
        finish: share of the run, at its end, that is trained in BF16.
        norm: `none`, or the norm that takes its statistic from the casts, such as `mxnorm`
            (`isoscale.numerics.NORMS`).

    Raises:
        ConfigError: a share outside [0, 1]; no such norm, or one without blocks to take its statistic from.
    """

    name: str
    layers: tuple[tuple[tuple[str, ...], LayerFormats], ...]
    note: str
    keep: tuple[float, float] = (0.0, 0.0)
    finish: float = 0.0
    norm: str = "none"

    def __post_init__(self) -> None:
        for key, share in (("keep_first", self.keep[0]), ("keep_last", self.keep[1]), ("finish", self.finish)):
            number = isinstance(share, int | float) and not isinstance(share, bool)
            if not number or not 0 <= share <= 1:
                hint = "0.1 is a tenth of the run" if key == "finish" else "0.125 is one block of eight"
                raise ConfigError("a share lies in [0, 1]", key=f"numerics.{key}", value=share, hint=hint)
        layers: Any = self.layers  # as they came
        for patterns, formats in layers:
            if not isinstance(patterns, tuple) or not isinstance(formats, LayerFormats):
                message = "a recipe's layers are pairs of patterns, a tuple, and LayerFormats"
                hint = '((("*",), LayerFormats("mxfp4", "mxfp4", "bf16")),)'
                raise ConfigError(message, key="layers", value=(patterns, formats), hint=hint)
        if self.norm != "none":
            self._check_norm()

    def _check_norm(self) -> None:
        if self.norm not in NORMS:
            hint = f"{did_you_mean(str(self.norm), NORMS)}; 'none' leaves norms as they are"
            raise ConfigError("no such norm", key="norm", value=self.norm, hint=hint)
        inputs = [formats.format_of("input") for _, formats in self.layers]
        if not any(isinstance(fmt, BlockFormat) and fmt.block[0] == 1 and fmt.block[1] for fmt in inputs):
            message = f"{self.norm} needs inputs cast in blocks along the row, and the recipe {self.name!r} has none"
            hint = "a block-scaled recipe: mxfp8, mxfp6, mxfp4, nvfp4"
            raise ConfigError(message, key="norm", value=self.norm, hint=hint)

    def formats(self, module_path: str) -> LayerFormats:
        """The formats of one linear layer by its patterns alone; `on` knows which blocks are kept."""
        for patterns, formats in self.layers:
            if any(fnmatchcase(module_path, pattern) for pattern in patterns):
                return formats
        return PLAIN

    def on(self, module_paths: Iterable[str]) -> Assignment:
        """The recipe on one model.

        Args:
            module_paths: of all modules of the model, normalised; blocks are counted in them.
        """
        counts: dict[str, int] = {}
        for path in module_paths:
            found = _BLOCK.match(path)
            if found:
                stack = found[1] or ""
                counts[stack] = max(counts.get(stack, 0), int(found[2]) + 1)
        return Assignment(self, MappingProxyType(counts))

    def changed(
        self, keep_first: float | None = None, keep_last: float | None = None, finish: float | None = None,
        norm: str | None = None,
    ) -> Recipe:  # fmt: skip
        """The recipe with other shares, or another norm; None leaves one as it is.

        Raises:
            ConfigError: a share outside [0, 1].
        """
        first, last = self.keep
        keep = (first if keep_first is None else keep_first, last if keep_last is None else keep_last)
        finish, norm = self.finish if finish is None else finish, self.norm if norm is None else norm
        return replace(self, keep=keep, finish=finish, norm=norm)

    def finish_step(self, steps: int) -> int:
        """The first step of the BF16 finish in a run of so many steps; `steps` where there is none."""
        return steps - math.floor(self.finish * steps + 0.5)


@dataclass(frozen=True)
class Assignment:
    """A recipe on one model: the one place where a layer's formats are decided, for plans and conversions alike.

    A block is the first number in a module's path, with something behind it: `blocks.3.attn.qkv`,
    `model.layers.3.mlp.up`. What stands before it names the stack; each stack is counted by itself. Of n blocks a share
    keeps floor(share n + 1/2): small models keep few.

    Args:
        recipe: the recipe.
        blocks: stack -> how many blocks it has.
    """

    recipe: Recipe
    blocks: Mapping[str, int]

    def _kept(self, module_path: str) -> str:
        """Why a layer's block stays in BF16; empty where it does not."""
        found = _BLOCK.match(module_path)
        if not found:
            return ""
        index, count = int(found[2]), self.blocks.get(found[1] or "", 0)
        first, last = (math.floor(share * count + 0.5) for share in self.recipe.keep)
        if index < first:
            return f"block {index} of {count} is in the first {self.recipe.keep[0]:.3g} ({first})"
        if index >= count - last:
            return f"block {index} of {count} is in the last {self.recipe.keep[1]:.3g} ({last})"
        return ""

    def formats(self, module_path: str) -> LayerFormats:
        """The formats of one linear layer."""
        formats = self.recipe.formats(module_path)
        return BF16 if formats.casts and self._kept(module_path) else formats

    def reason(self, module_path: str) -> str:
        """The same in words, for a plan's row."""
        formats = self.formats(module_path)
        kept = self._kept(module_path) if formats != self.recipe.formats(module_path) else ""
        return f"{formats} = recipe {self.recipe.name}" + (f", kept: {kept}" if kept else "")


def _blocks(name: str, formats: LayerFormats, note: str, keep: tuple[float, float] = (0.0, 0.0)) -> Recipe:
    return Recipe(name, ((HEADS, BF16), (("*",), formats)), f"{note}; heads in BF16", keep)


_SR, _DW = ("grad", "weight_grad"), ("grad_weight",)
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
    _blocks(
        "fp8-dynamic",
        LayerFormats("fp8_tensor_e4m3/amax", "fp8_tensor_e4m3/amax", "fp8_tensor_e5m2/amax"),
        "FP8 with one fp32 scale per tensor from its own amax, E5M2 gradients",
    ),
    _blocks(
        "mxfp8",
        everywhere("mxfp8_e4m3/rceil"),
        "MXFP8 E4M3 for weights, activations and gradients, scales rounded up (arXiv 2506.08027)",
    ),
    _blocks(
        "mxfp8-e5m2-grad",
        LayerFormats("mxfp8_e4m3/rceil", "mxfp8_e4m3/rceil", "mxfp8_e5m2/rceil"),
        "as mxfp8 with E5M2 gradients: reported to diverge in a production recipe",
    ),
    _blocks(
        "mxfp6",
        everywhere("mxfp6_e3m2/rceil"),
        "MXFP6 in all three matmuls, rounded to nearest, as arXiv 2310.10537 trains; assumed here: E3M2 for all "
        "operands (its range serves gradients) and scales that clip nothing",
    ),
    _blocks(
        "mxfp4",
        LayerFormats(
            "mxfp4/even",
            "mxfp4/even",
            "mxfp4/rceil",
            backward_weight="mxfp4/rceil",
            backward_input="mxfp4/rceil",
            stochastic=BACKWARD,
            hadamard=("grad_input", "grad_weight"),
            hadamard_size=32,
            pre_scale=0.75,
        ),
        "MXFP4; backward pass of arXiv 2502.20586: stochastic rounding of 3/4 of each operand and a random Hadamard "
        "transform per block; the forward, BF16 or FP8 there, is MXFP4 to nearest here",
    ),
    _blocks(
        "nvfp4",
        LayerFormats("nvfp4/amax/16x16", "nvfp4/amax", "nvfp4/amax", stochastic=_SR, hadamard=_DW),
        "NVFP4 as in arXiv 2509.25149: tiles of 16 x 16 for weights, stochastic gradients, Hadamard transform in dW, "
        "first and last blocks in BF16 (shares of its 62-block model)",
        keep=(2 / 62, 8 / 62),
    ),
    _blocks("mxfp8-bare", everywhere("mxfp8_e4m3/floor"), "MXFP8 E4M3 of OCP MX 1.0 in all three matmuls, plain casts"),
    _blocks(
        "mxfp6-forward",
        LayerFormats("mxfp6_e3m2/floor", "mxfp6_e3m2/floor", "bf16", backward_weight="bf16", backward_input="bf16"),
        "MXFP6 E3M2 in the forward, BF16 operands in the backward pass",
    ),
    _blocks("mxfp4-bare", everywhere("mxfp4/floor"), "MXFP4 in all three matmuls, plain casts: a baseline, not advice"),
    _blocks("nvfp4-bare", everywhere("nvfp4/amax"), "NVFP4 in all three matmuls, plain casts: a baseline, not advice"),
)
RECIPES: Mapping[str, Recipe] = MappingProxyType({recipe.name: recipe for recipe in _RECIPES})


def recipe_by_name(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        ConfigError: unknown; the nearest names are suggested.
    """
    if not isinstance(name, str) or name not in RECIPES:
        raise ConfigError(
            f"unknown recipe {name!r}", key="numerics.recipe", value=name, hint=did_you_mean(str(name), RECIPES)
        )
    return RECIPES[name]
