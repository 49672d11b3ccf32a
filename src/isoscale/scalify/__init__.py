"""Scale carried through a model's forward, backward and optimiser (Scalify, arXiv 2407.17353)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from isoscale.scalify.collectives import all_gather, all_reduce, compress_hook, reduce_gradients, reduce_scatter
from isoscale.scalify.custom import custom_scale
from isoscale.scalify.errors import RuleError
from isoscale.scalify.files import load_state, plain_state, save_state
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
from isoscale.scalify.recipe import RECIPES, ScaleRecipe, as_published
from isoscale.scalify.registry import TABLE, rule
from isoscale.scalify.tensor import ScaledTensor, as_block_scaled, as_plain, as_scaled
from isoscale.scalify.transform import scalify
from isoscale.scalify.watch import Watched, measure, watch

if TYPE_CHECKING:
    from isoscale.scalify.fsdp import ScaledAllGather, ScaledReduceScatter
    from isoscale.scalify.static import StaticBackend, static_backend

__all__ = [
    "RECIPES", "TABLE", "Pair", "Rescale", "RuleError", "ScaleRecipe", "ScaledAdamW", "ScaledAllGather",
    "ScaledOptimizer", "ScaledReduceScatter", "ScaledSGD", "ScaledTensor", "StaticBackend", "Watched", "all_gather",
    "all_reduce", "as_block_scaled", "as_plain", "as_published", "as_scaled", "cast_on_backward", "cast_on_forward",
    "compress_hook", "custom_scale", "lift", "load_state", "measure", "place", "placements", "plain_state",
    "reduce_gradients", "reduce_scatter", "rescale", "rescale_grad", "rescale_l1", "rescale_l1_grad", "rescale_l2",
    "rescale_l2_grad", "rescale_max", "rescale_max_grad", "rule", "save_state", "scalify", "set_scaling",
    "static_backend", "stop_scaling", "take_away", "under", "value", "watch",
]  # fmt: skip

# FSDP and the compiler take a second each to import.
_LATER = {
    "ScaledAllGather": "fsdp", "ScaledReduceScatter": "fsdp", "StaticBackend": "static", "static_backend": "static",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(f"isoscale.scalify.{_LATER[name]}"), name)
    raise AttributeError(f"module 'isoscale.scalify' has no attribute {name!r}")
