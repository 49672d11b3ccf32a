"""Matmuls with cast operands, on scaled tensors: the casts act on the data.

The layers are those of `isoscale.numerics.convert`; only who rounds an operand is another. Data stand near unit RMS,
so an element format needs no statistic and no scale of its own; a block format measures its own on top.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from isoscale.formats import BlockFormat
from isoscale.nn.cast_linear import CastLinear
from isoscale.nn.engine import Engine
from isoscale.scalify.tensor import ScaledTensor


class ScaledEngine(Engine):
    """An `Engine` whose casts go through `isoscale::cast_data`."""

    def fake_cast(self, x: Tensor, fmt: Any, axis: int, rounding: Any) -> Tensor:
        """As the engine's, on the data of a scaled tensor."""
        if not isinstance(x, ScaledTensor):
            return super().fake_cast(x, fmt, axis, rounding)
        name = str(fmt) if isinstance(fmt, BlockFormat) else fmt.name
        seed = rounding["rounding"].seed if rounding else None
        result: Tensor = torch.ops.isoscale.cast_data(x, name, axis, seed)
        return result


def use_scaled_engines(model: nn.Module) -> int:
    """Give every cast layer of a converted model a scaled engine; how many there were."""
    layers = [module for module in model.modules() if isinstance(module, CastLinear)]
    for layer in layers:
        layer.engine = ScaledEngine(layer.formats, layer.backend)
    return len(layers)
