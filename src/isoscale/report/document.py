"""The document: tables, sections, and one page that opens from disk without server or network."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1120px;margin:2rem auto;padding:0 1rem;color:#1f2937}
h1{font-size:1.6rem;margin-bottom:.2rem}h2{font-size:1.2rem;margin-top:2.2rem;border-bottom:1px solid #e5e7eb}
table{border-collapse:collapse;font-size:13px;margin:.6rem 0}
td,th{padding:.22rem .7rem;border-bottom:1px solid #eee;white-space:nowrap}
td.w{white-space:normal;min-width:12rem;overflow-wrap:anywhere}
th{text-align:left;background:#f8fafc}td.n{text-align:right;font-variant-numeric:tabular-nums}
code,.mono{font-family:ui-monospace,monospace;font-size:12.5px}.note{color:#6b7280}.warn{color:#b45309}
th.n{text-align:right}.scroll{overflow-x:auto;max-height:620px;overflow-y:auto}
"""


def _cell(value: Any) -> str:
    if isinstance(value, Loss):
        return f'<td class="n">{value:.4f}</td>' if math.isfinite(value) else '<td class="n">diverged</td>'
    if isinstance(value, float):
        return f'<td class="n">{value:.4g}</td>'
    if isinstance(value, int):
        return f'<td class="n">{value:,}</td>'
    text = str(value)
    return f"<td class='w'>{escape(text)}</td>" if len(text) > 40 else f"<td>{escape(text)}</td>"


class Loss(float):
    """A loss, shown with four decimals; one that is no finite number reads `diverged`."""


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """An HTML table."""
    rows = [list(row) for row in rows]
    body = "".join("<tr>" + "".join(_cell(value) for value in row) + "</tr>" for row in rows)
    right = [bool(rows) and isinstance(rows[0][i], int | float) for i in range(len(head))]
    top = "".join(f"<th{' class=n' if number else ''}>{escape(h)}</th>" for h, number in zip(head, right))
    return f"<div class='scroll'><table><tr>{top}</tr>{body}</table></div>"


class Page:
    """Collects sections; plotly's script goes in once."""

    def __init__(self, title: str, note: str) -> None:
        self.parts = [f"<h1>{escape(title)}</h1><p class='note'>{escape(note)}</p>"]
        self.title, self.scripted = title, False

    def add(self, heading: str, *html: str) -> None:
        """A section."""
        self.parts.append(f"<h2>{escape(heading)}</h2>" + "".join(html))

    def figure(self, figure: Any) -> str:
        """A figure as HTML."""
        config = {"displayModeBar": False, "responsive": True}
        html: str = figure.to_html(full_html=False, include_plotlyjs=not self.scripted, config=config)
        self.scripted = True
        return html

    def html(self) -> str:
        """The document."""
        return (f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{escape(self.title)}</title>"
                f"<meta name='viewport' content='width=device-width'><style>{_STYLE}</style></head>"
                f"<body>{''.join(self.parts)}</body></html>")  # fmt: skip


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {shown(item)}" for key, item in value.items())
    if isinstance(value, list):
        items = value if len(value) <= 4 else [value[0], "...", value[-1]]
        return " x ".join(shown(item) for item in items) if all(isinstance(v, int) for v in value) else \
               ", ".join(shown(item) for item in items)  # fmt: skip
    return str(value)


def _formats(formats: Mapping[str, Any]) -> str:
    """Operands and their formats, and how they are treated; one word where nothing is cast."""
    if all(value == "fp32" for value in formats.values()):
        return "fp32"
    return ", ".join(f"{key} {' '.join(value) if isinstance(value, list) else value}" for key, value in formats.items())


def plan_table(plan: Mapping[str, Any]) -> str:
    """Parameter rows of a plan: role, shape, init, LR, decay, formats, and what the LR is made of."""
    rows = [
        [row["name"], row["role"], "x".join(map(str, row["shape"])), row["factors"]["forward"], row["init_std"],
         row["lr"], row["weight_decay"], _formats(row["formats"]),
         row["reasons"]["lr"].partition(" = ")[2] or row["reasons"]["lr"]]
        for row in plan["rows"]
    ]  # fmt: skip
    return table(["parameter", "role", "shape", "forward", "init std", "LR", "decay", "formats", "this LR is"], rows)
