"""Scale carried through a model's forward, backward and optimiser (Scalify, arXiv 2407.17353)."""

from isoscale.scalify.custom import custom_scale
from isoscale.scalify.errors import RuleError
from isoscale.scalify.ops import (
    Rescale,
    cast_on_backward,
    cast_on_forward,
    rescale,
    rescale_grad,
    rescale_l1,
    rescale_l1_grad,
    rescale_l2,
    rescale_l2_grad,
    rescale_max,
    rescale_max_grad,
    set_scaling,
    stop_scaling,
)
from isoscale.scalify.optimizers import ScaledAdamW, ScaledOptimizer, ScaledSGD
from isoscale.scalify.pair import Pair, lift, under, value
from isoscale.scalify.placement import place, placements, take_away
from isoscale.scalify.recipe import RECIPES, ScaleRecipe
from isoscale.scalify.registry import TABLE, rule
from isoscale.scalify.tensor import ScaledTensor, as_plain, as_scaled
from isoscale.scalify.transform import scalify
from isoscale.scalify.watch import Watched, measure, watch

__all__ = [
    "RECIPES", "TABLE", "Pair", "Rescale", "RuleError", "ScaleRecipe", "ScaledAdamW", "ScaledOptimizer", "ScaledSGD",
    "ScaledTensor", "Watched", "as_plain", "as_scaled", "cast_on_backward", "cast_on_forward", "custom_scale", "lift",
    "measure", "place", "placements", "rescale", "rescale_grad", "rescale_l1", "rescale_l1_grad", "rescale_l2",
    "rescale_l2_grad", "rescale_max", "rescale_max_grad", "rule", "scalify", "set_scaling", "stop_scaling",
    "take_away", "under", "value", "watch",
]  # fmt: skip
