"""Which tensor of a shallow model to compare with which of a deep one.

Tensors in the growing stack are compared at the same relative depth. To pool all blocks would compare mixtures: the
first block, which differs from the others, is half of two and an eighth of eight. A tensor has a phase in its block: 0
up to the end of attention (it sees the block's input), 1/2 after that (it sees the input and one branch), 1 for the
block's output. Block i of `few` then stands where block (i + phase) * many / few - phase of `many` does; between two
blocks, both are taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

Rows = Mapping[tuple[int, int], Mapping[str, Any]]
"""(size, seed) -> a row of `measure.coordinates`."""


def _split(name: str, container: str) -> tuple[int, str] | None:
    """Number of the block and the rest of the name; None for a name outside the container."""
    index, _, rest = name.removeprefix(f"{container}.").partition(".")
    return (int(index), rest) if name.startswith(f"{container}.") and index.isdigit() else None


def phases(acts: Mapping[str, Mapping[str, Any]], container: str) -> dict[str, float]:
    """Name within a block -> phase, read from the forward order of the first block."""
    inside = {found[1]: acts[name]["kind"] for name in acts if (found := _split(name, container)) and found[0] == 0}
    kinds = list(inside.values())
    attended = max((i for i, kind in enumerate(kinds) if kind == "attention"), default=len(kinds))
    out = {rest: 0.5 if i > attended else 0.0 for i, rest in enumerate(inside)}
    if kinds and kinds[-1] == "residual stream":
        out[next(reversed(out))] = 1.0
    return out


def twins(few: int, many: int, phase: float) -> set[int]:
    """The blocks among `many` that stand where the `few` of the shallowest model do."""
    spots = [min(max((i + phase) * many / few - phase, 0), many - 1) for i in range(few)]
    return {near for spot in spots for near in (math.floor(spot), math.ceil(spot))}


def group(rows: Rows, axis: str, part: str) -> dict[tuple[int, int], dict[str, list[Any]]]:
    """(size, seed) -> name -> what was measured there.

    Args:
        rows: of one axis.
        axis: over `width` every name stands for itself; over `depth` the number of a matched block is `*`.
        part: `acts`, or `params`, of which all blocks are taken.
    """
    counts = [row["stacks"] for row in rows.values()]
    least = {name: min(count[name] for count in counts) for name in counts[0]
             if all(name in count for count in counts) and len({count[name] for count in counts}) > 1}  # fmt: skip
    out: dict[tuple[int, int], dict[str, list[Any]]] = {}
    for cell, row in rows.items():
        groups = out.setdefault(cell, {})
        phase = {container: phases(row["acts"], container) for container in least}
        for name, found in row[part].items():
            key = name
            for container, few in least.items() if axis == "depth" else ():
                if (place := _split(name, container)) is None:
                    continue
                index, rest = place
                if part == "acts" and index not in twins(few, row["stacks"][container], phase[container].get(rest, 0)):
                    key = ""
                    break
                key = f"{container}.*" + (f".{rest}" if rest else "")
            if key:
                groups.setdefault(key, []).append(found)
    return out
