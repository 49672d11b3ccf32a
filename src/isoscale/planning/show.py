"""A plan as text that fits 80 columns: like blocks folded, one line per kind of parameter, reasons on demand."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from isoscale.config.scale import Scale
from isoscale.formats.recipes import RECIPES, LayerFormats
from isoscale.planning.names import pattern
from isoscale.planning.rows import ParamRow, SiteRow
from isoscale.rules import family

if TYPE_CHECKING:
    from isoscale.planning.plan import Plan


WIDTH = 80


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _init(row: ParamRow) -> str:
    """Standard deviation, `=1` for a constant, `own` for values that are left as they are."""
    if row.init_value is not None:
        return f"={row.init_value:.4g}"
    return "own" if row.own_init and row.init_std == 0 else _number(row.init_std)


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
    out = []
    for line in [head, *lines]:
        cells = [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths))]
        out.append("  ".join(cells).rstrip())
    return "\n".join(out)


def _fit(head: Sequence[str], lines: Sequence[list[str]]) -> str:
    """The table with names cut in front until it fits the screen; a column of ones (fwd) goes first."""
    if "fwd" in head and all(line[list(head).index("fwd")] == "1" for line in lines):
        at = list(head).index("fwd")
        head, lines = [*head[:at], *head[at + 1 :]], [[*line[:at], *line[at + 1 :]] for line in lines]
    wide = max(len(line) for line in _table(head, lines).splitlines())
    room = max(len(line[0]) for line in lines) - max(0, wide - WIDTH)
    cut = [[line[0] if len(line[0]) <= room else "~" + line[0][1 - room :], *line[1:]] for line in lines]
    return _table(head, cut)


def _fold(rows: Sequence[Any], same: Sequence[str]) -> list[tuple[str, Any, int]]:
    out: dict[tuple[Any, ...], tuple[str, Any, int]] = {}
    for row in rows:
        key = (pattern(row.name), *(getattr(row, name) for name in same))
        name, first, count = out.get(key, (pattern(row.name), row, 0))
        out[key] = (name, first, count + 1)
    shown = [(name if count > 1 else row.name, row, count) for name, row, count in out.values()]
    return [(name.removesuffix(".weight"), row, count) for name, row, count in shown]


def _casts(rows: Sequence[ParamRow]) -> list[str]:
    """Which layers' operands are cast to what, layers of like formats together."""
    layers: dict[LayerFormats, list[str]] = {}
    for name, row, count in _fold(rows, ("formats",)):
        layers.setdefault(row.formats, []).append(name + (f" ({count})" if count > 1 else ""))
    if not layers:
        return []
    lines = ["cast matmul operands (w weight, x input, g output gradient)"]
    if any(formats.stochastic or formats.hadamard for formats in layers):
        lines.append("(SR rounded stochastically, H Hadamard transform before the cast; of Y, dX, dW)")
    for formats, names in layers.items():
        lines += textwrap.wrap(str(formats), 78, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
        lines += textwrap.wrap(", ".join(names), 78, initial_indent="      ", subsequent_indent="      ")
    return ["\n".join(lines)]


def _scale(scale: Scale) -> str:
    return ", ".join(f"{k} {v}" for k, v in vars(scale).items() if v is not None)


def show_plan(plan: Plan) -> str:
    """See `Plan.__str__`."""
    rows, sites = plan.rows, plan.sites
    trained = "" if plan.optimizer == "adamw" else f", {plan.optimizer}"
    text = [f"{plan.parametrisation}{trained}, recipe {plan.recipe}: {_scale(plan.target)}"]
    if plan.finish and any(row.formats.casts for row in rows):
        text.append(f"finish: the last {plan.finish:.4g} of the run with BF16 operands")
    if plan.norm != "none":
        text.append(f"norm: {plan.norm}, in place of every RMSNorm in front of block-scaled linear layers")
    if plan.base is not None:
        text.append(f"base: {_scale(plan.base)}")
    lines = []
    sigma = any(row.sigma is not None for row in rows)
    by = any(family(row.optimizer).relative for row in rows)  # two optimisers whose LR and decay differ in kind
    head = ["parameter", "role", "shape", "fwd", "init", "lr", "decay", *["sigma"] * sigma, *["by"] * by]
    for name, row, count in _fold(rows, ("shape", "lr", "init_std", "init_value", "weight_decay", "eps")):
        shape = "x".join(str(extent) for extent in row.shape)
        lines.append([name + (f" ({count})" if count > 1 else ""), row.role, shape, _number(row.factors.forward),
                      _init(row), _number(row.lr), _number(row.weight_decay), *[_number(row.sigma)] * sigma,
                      *[row.optimizer] * by])  # fmt: skip
    text.append(_fit(head, lines))
    if sigma:
        text.append(textwrap.fill("lr of lmd is alpha, log units a step; its decay is lambda: log-medians stay within "
                                  "1 / lambda of their centre, reached in 1 / (alpha x lambda) steps", 80))
    casts = _casts([row for row in rows if row.formats.casts])
    text += casts
    if casts and plan.recipe in RECIPES:
        note = f"recipe {plan.recipe}: {RECIPES[plan.recipe].note}"
        text.append(textwrap.fill(note, 80, subsequent_indent="  ", break_on_hyphens=False))
    lines = [
        [name + (f" ({count})" if count > 1 else ""), _number(site.multiplier), _number(site.expected_scale)]
        for name, site, count in _fold(
            [site for site in sites if site.multiplier is not None], ("multiplier", "expected_scale")
        )
        if site.multiplier != 1
    ]
    if lines:
        text.append(_table(["site (multipliers other than 1)", "multiplier", "expected rms"], lines))
    if plan.modules:
        lines = [[name, _number(value)] for name, value in plan.modules.items()]
        text.append(_table(["factors by module type and depth (in the numbers above)", "factor"], lines))
    if plan.clip is not None:
        text.append(f"clip: gradient norm {_number(plan.clip)}")
    text += [textwrap.fill(f"note: {note}", 80, subsequent_indent="      ") for note in plan.notes]
    return "\n\n".join(text)


def explain_row(row: ParamRow | SiteRow) -> str:
    """Every quantity of one row with its reason, one a line."""
    if isinstance(row, SiteRow):
        head = f"{row.name}: {row.kind}"
    else:
        head = f"{row.name}: {row.role}, shape {'x'.join(map(str, row.shape))}, fan_in {row.fan_in}, " \
               f"fan_out {row.fan_out}"  # fmt: skip
    width = max((len(name) for name in row.reasons), default=0)
    lines = [head]
    for name, reason in row.reasons.items():
        line = f"  {name.ljust(width)}  {reason}"
        if name == "formats":  # long names; a product of factors stays on one line
            lines += textwrap.wrap(line, 80, subsequent_indent=" " * (width + 4), break_on_hyphens=False)
        else:
            lines.append(line)
    return "\n".join(lines)
