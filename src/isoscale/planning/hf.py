"""A base of another size for a model that carries a Hugging Face config: the same config with width and depth changed.

Width grows by adding heads of the same size; every size that is in proportion to the width stays so (MLP, groups of
keys and values where they divide, state ranks that the config derives).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from isoscale._base.errors import PlanError
from isoscale.planning.inits import config_of
from isoscale.rules import Scale

_WIDTH = ("hidden_size", "n_embd", "d_model", "dim", "width")
_DEPTH = ("num_hidden_layers", "n_layer", "num_layers", "depth")
_HEADS = ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads")
_ALONG = (
    "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_ff", "word_embed_proj_dim", "embedding_size",
    "moe_intermediate_size", "shared_expert_intermediate_size", "encoder_ffn_dim", "hidden_dim", "mlp_dim",
)  # fmt: skip


def _first(config: Any, names: Iterable[str]) -> tuple[str, int] | None:
    mapping = getattr(config, "attribute_map", {})
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return mapping.get(name, name), value
    return None


def config_scale(model: nn.Module) -> Scale:
    """Width and depth as the model's config says them; empty without one."""
    config = getattr(model, "config", None)
    width, depth = _first(config, _WIDTH), _first(config, _DEPTH)
    return Scale(width=width[1] if width else None, depth=depth[1] if depth else None)


def resized(config: Any, width: int | None, depth: int | None) -> Any:
    """A copy of a config at another width and depth.

    Args:
        config: of transformers.
        width: features; a multiple of the head size. None: as it is.
        depth: layers. None: as it is.

    Raises:
        PlanError: no such size in this config, or a width that no whole number of heads fills.
    """
    new = copy.deepcopy(config)
    if depth is not None:
        found = _first(config, _DEPTH)
        if found is None:
            raise PlanError("this config has no depth to change", key="base.depth", value=depth,
                            hint="give base as a model")  # fmt: skip
        setattr(new, found[0], depth)
        kinds = getattr(config, "layer_types", None)
        if isinstance(kinds, list) and kinds and len(kinds) == found[1]:
            new.layer_types = [kinds[i % len(kinds)] for i in range(depth)]
    if width is None:
        return new
    found, heads = _first(config, _WIDTH), _first(config, _HEADS)
    if found is None:
        raise PlanError("this config has no width to change", key="base.width", value=width,
                        hint="give base as a model")  # fmt: skip
    old = found[1]
    if heads is not None:
        head = getattr(config, "head_dim", None) or old // heads[1]
        if width * heads[1] % old:
            step = old // heads[1]
            raise PlanError(f"width {width} is no whole number of heads of {head}", key="base.width", value=width,
                            hint=f"{max(step, round(width / step) * step)}")  # fmt: skip
        setattr(new, heads[0], width * heads[1] // old)
        groups = getattr(config, "num_key_value_heads", None)
        if isinstance(groups, int):
            few = max(1, groups * width // old)
            while (width * heads[1] // old) % few:
                few -= 1
            new.num_key_value_heads = few
        if getattr(config, "head_dim", None):
            new.head_dim = config.head_dim
    for name in _ALONG:
        value = getattr(config, name, None)
        if isinstance(value, int) and name != found[0]:
            setattr(new, name, max(1, value * width // old))
    setattr(new, found[0], width)
    return new


def base_from_scale(model: nn.Module, base: Scale) -> nn.Module:
    """The model's class at the base's size, on the meta device.

    Raises:
        PlanError: the model has no config to resize, or its class is not built from a config alone.
    """
    config = config_of(model)
    if config is None:
        raise PlanError(
            f"{type(model).__name__} has no config to make a smaller one of: give base as a model", key="base",
            hint="with torch.device('meta'): base = Model(small_width)",
        )  # fmt: skip
    new = resized(config, base.width, base.depth)
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            made: nn.Module = type(model)(new)
    except Exception as error:
        raise PlanError(f"{type(model).__name__} does not build at {base}: {error}", key="base",
                        hint="give base as a model") from error  # fmt: skip
    return made
