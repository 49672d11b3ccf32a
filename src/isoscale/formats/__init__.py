"""Element formats as data, and exact saturating casts to them."""

from isoscale.formats.cast import cast_stats, fake_cast, saturating_cast
from isoscale.formats.element import BF16, E4M3, E5M2, FP16, FP32, ElementFormat, by_name, names

__all__ = [
    "BF16",
    "E4M3",
    "E5M2",
    "FP16",
    "FP32",
    "ElementFormat",
    "by_name",
    "cast_stats",
    "fake_cast",
    "names",
    "saturating_cast",
]
