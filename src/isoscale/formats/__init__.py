"""Element and block formats as data, and exact casts to them: values, codes, and what is lost."""

from isoscale.formats.block import BLOCKS, SCALE_RULES, BlockFormat, Format, by_name, element_by_name, names
from isoscale.formats.cast import cast_stats, fake_cast, saturating_cast
from isoscale.formats.element import (
    BF16,
    E2M1,
    E2M3,
    E3M2,
    E3M4,
    E4M3,
    E4M3_FNUZ,
    E4M3_IEEE,
    E5M2,
    E5M2_FNUZ,
    E8M0,
    ELEMENTS,
    FP16,
    FP32,
    INT4,
    INT8,
    ElementFormat,
)
from isoscale.formats.error import CastError, error
from isoscale.formats.files import load_tensors, save_tensors
from isoscale.formats.rounding import ROUNDINGS, Stochastic
from isoscale.formats.tensor import BlockTensor, encode, encode_both

__all__ = [
    "BF16",
    "BLOCKS",
    "E2M1",
    "E2M3",
    "E3M2",
    "E3M4",
    "E4M3",
    "E4M3_FNUZ",
    "E4M3_IEEE",
    "E5M2",
    "E5M2_FNUZ",
    "E8M0",
    "ELEMENTS",
    "FP16",
    "FP32",
    "INT4",
    "INT8",
    "ROUNDINGS",
    "SCALE_RULES",
    "BlockFormat",
    "BlockTensor",
    "CastError",
    "ElementFormat",
    "Format",
    "Stochastic",
    "by_name",
    "cast_stats",
    "element_by_name",
    "encode",
    "encode_both",
    "error",
    "fake_cast",
    "load_tensors",
    "names",
    "saturating_cast",
    "save_tensors",
]
