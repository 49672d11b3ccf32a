"""What `scalify` makes of a model: dtypes, casts in linears, rescales, optimiser state; the rows of the paper by name.

    name          weights and activations   linears        state   paper
    float32       float32                   float32        fp32    baseline: the oracle, equal to the plain model
    fp16-master   fp16, fp32 masters        fp16           fp32    FP16 #1
    fp16          fp16                      fp16           fp32    FP16 #2
    fp8           fp16                      E4M3 and E5M2  fp32    FP8 #3
    fp8-fp16      fp16                      E4M3 and E5M2  fp16    FP8 #4
    fp16-fp16     fp16                      fp16           fp16    -
    fp16-fp8      fp16                      fp16           fp8     -: four bytes a parameter in all
    bf16-bf16     bf16                      bf16           bf16    -

All but float32 rescale the gradients at norm inputs, as the paper does from #2 on, parameter gradients before the
optimiser, as it does in #4, and, which is ours, outputs of linear layers and gradients of their inputs.
`as_published(name)` gives a row with the paper's rescales alone.

Source: Scalify, arXiv 2407.17353, section 4.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from isoscale._base.errors import ConfigError, did_you_mean
from isoscale.scalify.ops import STATISTICS
from isoscale.scalify.storage import KINDS

DTYPES = ("fp32", "fp16", "bf16")


@dataclass(frozen=True)
class ScaleRecipe:
    """Settings of `scalify`.

    Args:
        name: as users type it.
        dtype: of weights and activations: `fp32`, `fp16`, `bf16`.
        linear: a recipe of `isoscale.numerics` for the operands of linear layers (`fp8`, `mxfp8`, ...); None: not cast.
        state: of the optimiser: `fp32`, `bf16`, `fp16`, `fp8`.
        master: keep float32 weights in the optimiser.
        norm_rescale: statistic of the rescale of gradients at norm inputs: `l2`, `l1`, `max` or None.
        linear_rescale: the same for outputs of linear layers and gradients of their inputs. Ours: a trained model's
            activations and weights align, each matmul then comes out up to 2^4 above its prediction, and where nothing
            measures in between fp16 overflows (docs/results/scalify_predict.md). None is the paper's placement.
        period: of those rescales, in calls.
        rescale_grads: rescale each parameter's gradient before the optimiser.
        state_period: steps between rescales of weights and state.
        stochastic: round weights and state stochastically.
        fallback: operators without a rule that may run on plain values.

    Raises:
        ConfigError: an unknown dtype, state or statistic.
    """

    name: str
    dtype: str = "fp16"
    linear: str | None = None
    state: str = "fp32"
    master: bool = False
    norm_rescale: str | None = "l2"
    linear_rescale: str | None = "l2"
    period: int = 1
    rescale_grads: bool = True
    state_period: int = 16
    stochastic: bool = True
    fallback: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for key, value, choices in (
            ("dtype", self.dtype, DTYPES), ("state", self.state, tuple(KINDS)),
            ("norm_rescale", self.norm_rescale or "l2", STATISTICS),
            ("linear_rescale", self.linear_rescale or "l2", STATISTICS),
        ):  # fmt: skip
            if value not in choices:
                raise ConfigError(f"no such {key}", key=key, value=value, hint=did_you_mean(str(value), choices))
        for key, number in (("period", self.period), ("state_period", self.state_period)):
            if number < 1:
                raise ConfigError("a period is at least 1", key=key, value=number)

    def changed(self, **settings: Any) -> ScaleRecipe:
        """The recipe with other settings.

        Raises:
            ConfigError: an unknown setting, or a bad value.
        """
        for key in settings:
            if key not in self.__dataclass_fields__:
                raise ConfigError("no such setting", key=key, hint=did_you_mean(key, self.__dataclass_fields__))
        return replace(self, **settings)


RECIPES = MappingProxyType({
    recipe.name: recipe for recipe in (
        ScaleRecipe("float32", dtype="fp32", norm_rescale=None, linear_rescale=None, rescale_grads=False,
                    stochastic=False),
        ScaleRecipe("fp16-master", master=True),
        ScaleRecipe("fp16"),
        ScaleRecipe("fp8", linear="fp8"),
        ScaleRecipe("fp8-fp16", linear="fp8", state="fp16"),
        ScaleRecipe("fp16-fp16", state="fp16"),
        ScaleRecipe("fp16-fp8", state="fp8"),
        ScaleRecipe("bf16-bf16", dtype="bf16", state="bf16"),
    )
})  # fmt: skip


def as_published(name: str) -> ScaleRecipe:
    """A recipe with the rescales of the paper's row, and rounding to nearest left as it is here (stochastic).

    Raises:
        ConfigError: no such recipe.
    """
    recipe = recipe_of(name)
    return recipe.changed(linear_rescale=None, norm_rescale=None if name == "fp16-master" else recipe.norm_rescale)


def recipe_of(recipe: str | ScaleRecipe) -> ScaleRecipe:
    """A recipe by name, or itself.

    Raises:
        ConfigError: no such recipe.
    """
    if isinstance(recipe, ScaleRecipe):
        return recipe
    if recipe not in RECIPES:
        raise ConfigError("no such recipe", key="recipe", value=recipe, hint=did_you_mean(str(recipe), RECIPES))
    return RECIPES[recipe]
