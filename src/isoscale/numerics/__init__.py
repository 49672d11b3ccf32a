"""Low-precision recipes on a model: cast the operands of its matmuls, and say which backend runs them."""

from isoscale.nn.cast_linear import CastLinear
from isoscale.nn.hardware import capabilities, swizzle
from isoscale.numerics.backend import pick_backend
from isoscale.numerics.convert import Summary, cast_stats, convert, summary, switch
from isoscale.numerics.linear import Linear, matmul
from isoscale.numerics.norms import NORMS, fold
from isoscale.numerics.pairs import Pair, find_pairs

__all__ = [
    "NORMS", "CastLinear", "Linear", "Pair", "Summary", "capabilities", "cast_stats", "convert", "find_pairs", "fold",
    "matmul", "pick_backend", "summary", "switch", "swizzle",
]  # fmt: skip
