"""Low-precision recipes on a model: cast the operands of its matmuls, and say which backend runs them."""

from isoscale.nn.cast_linear import CastLinear
from isoscale.nn.hardware import capabilities, swizzle
from isoscale.numerics.backend import pick_backend
from isoscale.numerics.convert import Summary, cast_stats, convert, summary, switch
from isoscale.numerics.linear import Linear, matmul

__all__ = [
    "CastLinear", "Linear", "Summary", "capabilities", "cast_stats", "convert", "matmul", "pick_backend", "summary",
    "switch", "swizzle",
]  # fmt: skip
