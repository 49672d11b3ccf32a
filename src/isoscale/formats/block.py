"""Block formats as data: an element format, the shape of a block, and how its shared scale is stored and chosen.

OCP Microscaling Formats 1.0, section 5.2 and 6.3, for the MX formats; arXiv 2509.25149 for NVFP4; FP8 with fp32 scales
per tensor, per row, per 1 x 128 and per 128 x 128 block as in common FP8 training stacks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal, get_args

from isoscale._base.errors import ConfigError, did_you_mean
from isoscale.formats.element import E2M1, E2M3, E3M2, E4M3, E5M2, ELEMENTS, INT8, ElementFormat

Scale = Literal["e8m0", "e4m3", "fp32"]
ScaleRule = Literal["floor", "ceil", "even", "rceil", "amax"]
SCALE_RULES: tuple[str, ...] = get_args(ScaleRule)
_RULES_OF = {"e8m0": ("floor", "ceil", "even", "rceil"), "e4m3": ("amax",), "fp32": SCALE_RULES}
_SCALE_BITS = {"e8m0": 8, "e4m3": 8, "fp32": 32}


@dataclass(frozen=True)
class BlockFormat:
    """Elements that share a scale block by block.

    Attributes:
        name: the short name, lower case, without the rule.
        element: format of the elements.
        block: (across, along): how many values share a scale across and along the axis of the cast; 0 is the whole
            extent. (1, 32) is a row of 32 along the axis, (16, 16) a tile, (1, 0) a row, (0, 0) the tensor.
        scale: how a scale is stored: `e8m0` (a power of two), `e4m3` (with one fp32 scale for the tensor), `fp32`.
        scale_rule: how the scale follows from the largest magnitude of the block, `amax`. Powers of two:
            `floor` 2^(floor(log2 amax) - emax), the OCP rule, which clips the top of some blocks;
            `ceil` 2^(ceil(log2 amax) - emax);
            `even` as floor, with amax first rounded to the mantissa width of the element;
            `rceil` 2^ceil(log2(amax / max)), the smallest power of two that clips nothing.
            Not powers of two: `amax` is amax / max.
    """

    name: str
    element: ElementFormat
    block: tuple[int, int]
    scale: Scale = "e8m0"
    scale_rule: ScaleRule = "floor"

    def __post_init__(self) -> None:
        rules = _RULES_OF.get(self.scale)
        if rules is None:
            hint = did_you_mean(str(self.scale), _RULES_OF)
            raise ConfigError("no such scale", key=f"{self.name}.scale", value=self.scale, hint=hint)
        if self.scale_rule not in SCALE_RULES:
            hint = did_you_mean(str(self.scale_rule), SCALE_RULES)
            raise ConfigError("no such scale rule", key="scale_rule", value=self.scale_rule, place=self.name, hint=hint)
        if self.scale_rule not in rules:
            message = f"{self.name} stores {self.scale} scales, which this rule does not give"
            raise ConfigError(message, key="scale_rule", value=self.scale_rule, hint="one of: " + ", ".join(rules))
        block = self.block if isinstance(self.block, tuple) else ()
        if len(block) != 2 or any(not isinstance(n, int) or isinstance(n, bool) or n < 0 for n in block):
            hint = "(across, along), such as (1, 32) or (16, 16); 0 is the whole extent"
            raise ConfigError("no such block", key=f"{self.name}.block", value=self.block, hint=hint)
        if self.element.layout == "scale" or self.element.bits not in (4, 6, 8):
            raise ConfigError("elements have 4, 6 or 8 bits", key=f"{self.name}.element", value=self.element.name)

    def __str__(self) -> str:
        """The name with its rule, as `by_name` reads it back: `mxfp4/floor`, `mxfp4/rceil/16x16`."""
        own = _BY_NAME.get(self.name)
        tail = f"/{self.block[0]}x{self.block[1]}" if isinstance(own, BlockFormat) and own.block != self.block else ""
        return f"{self.name}/{self.scale_rule}{tail}"

    def with_(self, *, scale_rule: str | None = None, block: tuple[int, int] | None = None) -> BlockFormat:
        """The same format with another rule or block.

        Raises:
            ConfigError: no such rule or block, or a rule that its scales cannot hold.
        """
        changes = {"scale_rule": scale_rule, "block": block}
        return replace(self, **{key: value for key, value in changes.items() if value is not None})  # type: ignore[arg-type]

    def bits_per_value(self) -> float:
        """Bits a value takes with its share of the block's scale, for blocks of fixed size that divide the tensor."""
        count = self.block[0] * self.block[1]
        return self.element.bits + (_SCALE_BITS[self.scale] / count if count else 0.0)


Format = ElementFormat | BlockFormat

BLOCKS: tuple[BlockFormat, ...] = (
    BlockFormat("mxfp8_e4m3", E4M3, (1, 32)),
    BlockFormat("mxfp8_e5m2", E5M2, (1, 32)),
    BlockFormat("mxfp6_e3m2", E3M2, (1, 32)),
    BlockFormat("mxfp6_e2m3", E2M3, (1, 32)),
    BlockFormat("mxfp4", E2M1, (1, 32)),
    BlockFormat("mxint8", INT8, (1, 32)),
    BlockFormat("nvfp4", E2M1, (1, 16), "e4m3", "amax"),
    *(
        BlockFormat(f"fp8_{where}_{element.name}", element, block, "fp32", "amax")
        for where, block in (("tensor", (0, 0)), ("row", (1, 0)), ("1x128", (1, 128)), ("128x128", (128, 128)))
        for element in (E4M3, E5M2)
    ),
)
_BY_NAME: dict[str, Format] = {fmt.name: fmt for fmt in ELEMENTS} | {fmt.name: fmt for fmt in BLOCKS}


def names() -> tuple[str, ...]:
    """The names that `by_name` knows, element formats first."""
    return tuple(_BY_NAME)


def by_name(name: str) -> Format:
    """The format of that name; case does not matter.

    A block format's name may go on with a scale rule, a block, or both: `mxfp4/rceil`, `mxfp4/16x16`,
    `mxfp6_e3m2/even/1x16`.

    Raises:
        ConfigError: there is none; names the nearest. A rule or block that the format cannot have.
    """
    head, *tail = name.lower().split("/") if isinstance(name, str) else (str(name),)
    found = _BY_NAME.get(head)
    if found is None:
        raise ConfigError("no such format", key="format", value=name, hint=did_you_mean(head, _BY_NAME))
    if not tail:
        return found
    if isinstance(found, ElementFormat):
        raise ConfigError("an element format has no scale and no block", key="format", value=name)
    block = re.fullmatch(r"(\d{1,9})x(\d{1,9})", tail[-1])
    if block:
        found, tail = found.with_(block=(int(block[1]), int(block[2]))), tail[:-1]
    if len(tail) > 1:
        raise ConfigError("no such format", key="format", value=name, hint="name/rule/block, as in mxfp4/rceil/16x16")
    return found.with_(scale_rule=tail[0]) if tail else found


def element_by_name(name: str) -> ElementFormat:
    """The element format of that name.

    Raises:
        ConfigError: there is none, or it is a block format.
    """
    found = by_name(name)
    if isinstance(found, BlockFormat):
        raise ConfigError("a block format where an element format is wanted", key="format", value=name)
    return found
