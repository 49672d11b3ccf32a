"""Low-precision recipes on a model: swap its linear layers by plan rows, and say which backend runs them."""

from isoscale.numerics.backend import pick_backend
from isoscale.numerics.cast_linear import CastLinear
from isoscale.numerics.convert import Summary, cast_stats, convert, summary

__all__ = ["CastLinear", "Summary", "cast_stats", "convert", "pick_backend", "summary"]
