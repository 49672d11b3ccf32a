"""Attention temperature of a foreign model: 1 / d for logits where the head size grows, set through its own attribute.

The product q.k grows with the head size d once queries and keys align, so the factor on it has to fall as d^-1 and
not d^-1/2 (Tensor Programs V, section 4). Where heads keep their size nothing is to be done. The attribute is found by
its value and believed only if a second trace shows that it moves the logits; a scale written into code is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import nn

from isoscale._base.errors import PlanError
from isoscale.planning.names import normalise
from isoscale.planning.rows import SiteRow
from isoscale.planning.trace import Attention, Trace, trace
from isoscale.rules.monomial import show_number

PORT = "logits"


def _candidates(module: nn.Module, scale: float) -> list[str]:
    named = vars(module).items()
    floats = [name for name, value in named if isinstance(value, float) and not name.startswith("_")]
    return [name for name in floats if any(math.isclose(getattr(module, name), scale**power, rel_tol=1e-6)
                                           for power in (1, 0.5, -1, -0.5))]  # fmt: skip


def _moves(model: nn.Module, module: nn.Module, name: str, index: int, was: float, example: object) -> float | None:
    """By which power of the attribute the logits' scale moves; None where it does not."""
    old = getattr(module, name)
    try:
        setattr(module, name, old * 4)
        now = trace(model, example).attention[index].scale
    finally:
        setattr(module, name, old)
    power = math.log(now / was) / math.log(4)
    return round(power, 6) if abs(power) > 0.1 else None


def temperature_sites(
    model: nn.Module, seen: Trace, base: Trace, alpha_attn: float, example: object, ratios: bool
) -> tuple[SiteRow, ...]:
    """One row per attention whose scale has to change; none where every head keeps its size and alpha_attn is 1.

    Args:
        model: the target.
        seen: trace of the target.
        base: trace of the base.
        alpha_attn: the hyperparameter, 1 for none.
        example: for tracing again.
        ratios: whether the width rule is on; else only alpha_attn counts.

    Raises:
        PlanError: a scale that has to change and is written into the code.
    """
    if not seen.attention or not base.attention:
        return ()
    modules: Mapping[str, nn.Module] = {normalise(path): module for path, module in model.named_modules()}
    first = base.attention[0]
    out = []
    known: dict[tuple[str, str], float | None] = {}
    for index, one in enumerate(seen.attention):
        growth = one.head_size / first.head_size if ratios else 1.0
        wanted = alpha_attn * (first.scale / growth if ratios and growth != 1 else one.scale)
        factor = wanted / one.scale
        if math.isclose(factor, 1.0, rel_tol=1e-9):
            continue
        out.append(_site(model, modules, one, index, wanted, factor, known, example))
    return tuple(out)


def _site(
    model: nn.Module, modules: Mapping[str, nn.Module], one: Attention, index: int, wanted: float, factor: float,
    known: dict[tuple[str, str], float | None], example: object,
) -> SiteRow:  # fmt: skip
    path = one.path
    while True:
        module = modules[path]
        for name in _candidates(module, one.scale):
            kind = (type(module).__qualname__, name)
            if kind not in known:
                known[kind] = _moves(model, module, name, index, one.scale, example)
            power = known[kind]
            if power is not None:
                value = getattr(module, name) * factor ** (1 / power)
                why = f"{show_number(value)} = the model's {name} {show_number(getattr(module, name))} x " \
                      f"{show_number(factor ** (1 / power))} (head size {one.head_size}: logits as 1/d)"  # fmt: skip
                return SiteRow(
                    path=path, port=PORT, kind="attn_logits", multiplier=value, attr=name, expected_scale=None,
                    format="fp32", cast_scale=None, reasons={"multiplier": why}, own=getattr(module, name),
                )  # fmt: skip
        if not path:
            break
        path = path.rpartition(".")[0]
    raise PlanError(
        f"the attention scale {one.scale:g} of {one.path or type(model).__name__} is written into its code, and has to "
        f"become {wanted:g}", key=one.path, value=one.scale,
        hint="read it from an attribute (self.scale), or grow the width by adding heads of the same size",
    )  # fmt: skip
