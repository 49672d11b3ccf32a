"""Low-precision recipes as data: which linear layer's weight, input and output gradient are cast to what.

A recipe is an ordered list of (module patterns, formats); the first match wins. Copy one and change a line to make your
own. Patterns are shell-style, on the module's path.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from types import MappingProxyType

from isoscale._base.errors import ConfigError, did_you_mean
from isoscale.formats.block import BlockFormat, Format, by_name


@dataclass(frozen=True)
class LayerFormats:
    """Formats of the operands of one linear layer's three matmuls, by name. `fp32` means: left as it is.

    Blocks always lie along the contraction axis of the matmul, so an operand of two matmuls is cast twice, each time
    from high precision. Names are kept in full: `mxfp4` becomes `mxfp4/floor`.

    Args:
        weight: of W in the forward.
        input: of X in the forward.
        grad: of the output gradient, in the input-gradient matmul.
        backward_weight: of W in the input-gradient matmul; None: as `weight`.
        backward_input: of X in the weight-gradient matmul; None: as `input`.
        weight_grad: of the output gradient in the weight-gradient matmul; None: as `grad`.

    Raises:
        ConfigError: no such format; names the operand and the nearest formats.
    """

    weight: str = "fp32"
    input: str = "fp32"
    grad: str = "fp32"
    backward_weight: str | None = None
    backward_input: str | None = None
    weight_grad: str | None = None

    def __post_init__(self) -> None:
        same = {"backward_weight": "weight", "backward_input": "input", "weight_grad": "grad"}
        for field in fields(self):
            name = getattr(self, field.name)
            if name is None and field.name in same:
                continue
            try:
                found = by_name(name)
            except ConfigError as error:
                raise ConfigError(error.message, key=f"formats.{field.name}", value=name, hint=error.hint) from None
            full = str(found) if isinstance(found, BlockFormat) else found.name
            redundant = field.name in same and full == getattr(self, same[field.name])
            object.__setattr__(self, field.name, None if redundant else full)
        pairs = tuple(tuple(None if n == "fp32" else by_name(n) for n in pair) for pair in self.passes.values())
        object.__setattr__(self, "_pairs", pairs)  # parsed once, so that nothing is parsed in a training step

    @property
    def passes(self) -> dict[str, tuple[str, str]]:
        """The formats of both operands of each matmul, in the order they are multiplied.

        `forward` (input, weight), `grad_input` (grad, weight), `grad_weight` (grad, input).
        """
        return {
            "forward": (self.input, self.weight),
            "grad_input": (self.grad, self.backward_weight or self.weight),
            "grad_weight": (self.weight_grad or self.grad, self.backward_input or self.input),
        }

    @property
    def pairs(self) -> tuple[tuple[Format | None, Format | None], ...]:
        """As `passes`, in that order, as formats; None where the operand is left as it is."""
        found: tuple[tuple[Format | None, Format | None], ...] = self.__dict__["_pairs"]
        return found

    @property
    def casts(self) -> bool:
        """Whether anything is cast at all."""
        return any(name != "fp32" for pair in self.passes.values() for name in pair)

    def to_dict(self) -> dict[str, str]:
        """What was said: overrides that are None are left out."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) is not None}

    def __str__(self) -> str:
        """`w e4m3, x e4m3, g e5m2`, and what differs in the backward pass."""
        text = f"w {self.weight}, x {self.input}, g {self.grad}"
        extra = (("w", self.backward_weight), ("x", self.backward_input), ("g for dW", self.weight_grad))
        told = ", ".join(f"{name} {value}" for name, value in extra if value is not None)
        return f"{text}; backward {told}" if told else text


def everywhere(name: str) -> LayerFormats:
    """One format for every operand."""
    return LayerFormats(name, name, name)


PLAIN = LayerFormats()
BF16 = everywhere("bf16")
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


def _blocks(name: str, formats: LayerFormats, note: str) -> Recipe:
    return Recipe(name, ((HEADS, BF16), (("*",), formats)), f"{note}; heads in BF16")


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
