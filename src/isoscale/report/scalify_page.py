"""The page of `isoscale scalify --report`: what scales predict and what was measured, tensor by tensor."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from isoscale._base.errors import CheckpointError
from isoscale._base.files import atomic_write
from isoscale._base.optional import need
from isoscale.report import figures
from isoscale.report.load import read_json
from isoscale.report.page import Page, table

_WORST, _BINS = 40, 0.5
_FORWARD, _BACKWARD = figures.COLOURS[0], figures.COLOURS[1]


def _measured(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["rms"] is not None and row["kind"] != "layout"]


def _off(row: Mapping[str, Any]) -> float:
    return float(row["rms"])


def _label(row: Mapping[str, Any]) -> str:
    shape = "x".join(map(str, row["shape"])) or "scalar"
    scale = "any" if row["scale"] is None else f"2^{row['scale']:g}"
    return f"{row['op']} [{shape}] in {row['module'] or 'the loss'}: predicted {scale}, off by 2^{_off(row):+.2f}"


def along(rows: Sequence[Mapping[str, Any]], octaves: float) -> Any:
    """Prediction error of every tensor in the order of execution, both directions, with the band."""
    graph = need("plotly.graph_objects", "report")
    figure = graph.Figure()
    for direction, colour in (("forward", _FORWARD), ("backward", _BACKWARD)):
        found = [row for row in rows if row["direction"] == direction and math.isfinite(_off(row))]
        figure.add_scatter(
            x=[row["index"] for row in found], y=[_off(row) for row in found], mode="markers", name=direction,
            marker={"size": 5, "color": colour}, hovertext=[_label(row) for row in found], hoverinfo="text",
        )  # fmt: skip
    figure.add_hrect(y0=-octaves, y1=octaves, fillcolor="#10b981", opacity=0.08, line_width=0)
    figure.add_hline(y=0, line={"color": "#9ca3af", "width": 1})
    figure.update_layout(
        template="plotly_white", height=420, margin={"l": 60, "r": 20, "t": 30, "b": 50},
        xaxis_title="tensor, in the order of execution", yaxis_title="log2 of the data's RMS (0: as predicted)",
        legend={"orientation": "h", "y": 1.08},
    )  # fmt: skip
    return figure


def histogram(rows: Sequence[Mapping[str, Any]], octaves: float) -> Any:
    """How many tensors are off by how much."""
    graph = need("plotly.graph_objects", "report")
    figure = graph.Figure()
    for direction, colour in (("forward", _FORWARD), ("backward", _BACKWARD)):
        found = Counter(round(_off(row) / _BINS) * _BINS for row in rows
                        if row["direction"] == direction and math.isfinite(_off(row)))  # fmt: skip
        figure.add_bar(x=list(found), y=list(found.values()), width=_BINS * 0.9, name=direction,
                       marker={"color": colour, "opacity": 0.75})  # fmt: skip
    for edge in (-octaves, octaves):
        figure.add_vline(x=edge, line={"color": "#6b7280", "dash": "dot"})
    figure.update_layout(template="plotly_white", height=300, barmode="stack", yaxis_title="tensors",
                         xaxis_title="log2 of the data's RMS", margin={"l": 60, "r": 20, "t": 20, "b": 50},
                         legend={"orientation": "h", "y": 1.1})  # fmt: skip
    return figure


def graph(rows: Sequence[Mapping[str, Any]], octaves: float) -> Any:
    """The data flow: modules from top to bottom, one box per tensor, coloured by its error, an edge per operand."""
    objects = need("plotly.graph_objects", "report")
    figure = objects.Figure()
    modules = list(dict.fromkeys(row["module"] or "(loss)" for row in rows))
    place = {name: i for i, name in enumerate(modules)}
    counts: dict[tuple[str, str], int] = {}
    at: dict[int, tuple[float, float]] = {}
    for row in rows:
        name = row["module"] or "(loss)"
        key = (row["direction"], name)
        counts[key] = counts.get(key, 0) + 1
        side = 1.0 if row["direction"] == "forward" else -1.0
        at[row["index"]] = (side * (0.5 + counts[key]), float(place[name]))
    edges_x: list[float | None] = []
    edges_y: list[float | None] = []
    for row in rows:
        for source in row["inputs"]:
            if source in at:
                edges_x += [at[source][0], at[row["index"]][0], None]
                edges_y += [at[source][1], at[row["index"]][1], None]
    figure.add_scatter(x=edges_x, y=edges_y, mode="lines", hoverinfo="skip", showlegend=False,
                       line={"color": "rgba(107,114,128,0.18)", "width": 1})  # fmt: skip
    shown = [row for row in rows if row["rms"] is not None and math.isfinite(_off(row))]
    colours = [max(-2 * octaves, min(2 * octaves, _off(row))) for row in shown]
    figure.add_scatter(
        x=[at[row["index"]][0] for row in shown], y=[at[row["index"]][1] for row in shown], mode="markers",
        marker={"size": 7, "symbol": "square", "color": colours,
                "colorscale": "RdBu", "cmin": -2 * octaves, "cmax": 2 * octaves,
                "colorbar": {"title": "log2 off", "thickness": 12}, "line": {"width": 0.5, "color": "#9ca3af"}},
        hovertext=[_label(row) for row in shown], hoverinfo="text", showlegend=False,
    )  # fmt: skip
    figure.update_yaxes(tickvals=list(range(len(modules))), ticktext=[m[-34:] for m in modules], autorange="reversed")
    figure.update_xaxes(title_text="backward  <  operators of the module  >  forward", zeroline=True)
    figure.update_layout(template="plotly_white", height=160 + 24 * len(modules),
                         margin={"l": 230, "r": 20, "t": 20, "b": 50})  # fmt: skip
    return figure


def scalify_page(folder: Path) -> Page:
    """The page of a folder that `isoscale scalify` wrote.

    Raises:
        CheckpointError: nothing of the kind is there.
    """
    if not (folder / "scalify.json").is_file():
        raise CheckpointError("no scale report in this folder", key="DIR", value=str(folder),
                              hint="isoscale scalify --out DIR --report")  # fmt: skip
    data: Any = read_json(folder / "scalify.json")
    lines = [json.loads(line) for line in (folder / "tensors.jsonl").read_text().splitlines()]
    formulas, rows = lines[0]["formulas"], lines[1:]
    for row in rows:
        row["rms"] = None if row["rms"] is None else float(row["rms"])
    octaves = float(data["octaves"])
    seen = _measured(rows)
    page = Page(f"Scales of {data['model']}", f"recipe {data['recipe']}, after {data['steps']} steps; {len(rows):,} "
                f"tensors, {len(seen):,} of them made by operators with a rule")  # fmt: skip
    page.add("Verdict", table(["direction", "tensors", f"within 2^+-{octaves:g} of the prediction"], [
        [name, part["tensors"], f"{100 * float(part['within']):.1f} %"] for name, part in data["directions"].items()
    ]))  # fmt: skip
    proposals = data["proposals"]
    if proposals:
        said = ("<p class='note'>Tensors where a prediction goes wrong first: everything that they were made from is "
                "within the band.</p>")  # fmt: skip
        page.add("Where a rescale would help", said, table(
            ["tensor", "off by", "proposal"],
            [[p["tensor"], f"2^{float(p['off']):+.1f}", p["proposal"]] for p in proposals],
        ))  # fmt: skip
    page.add("Along the pass", page.figure(along(seen, octaves)))
    page.add("How far off", page.figure(histogram(seen, octaves)))
    note = ("<p class='note'>A box per tensor: red has less than it predicts, blue more. "
            "Lines are operands.</p>")
    page.add("The graph", note,
             page.figure(graph(rows, octaves)))  # fmt: skip
    worst = sorted(seen, key=lambda row: -abs(_off(row)))[:_WORST]
    page.add(f"The {len(worst)} worst", table(
        ["module", "operator", "direction", "shape", "predicted", "off by", "rule", "line"],
        [[row["module"] or "(loss)", row["op"], row["direction"], "x".join(map(str, row["shape"])) or "scalar",
          "any" if row["scale"] is None else f"2^{row['scale']:g}", f"2^{_off(row):+.2f}",
          formulas.get(row["op"], "none: fallback"), row["line"]] for row in worst],
    ))  # fmt: skip
    by: dict[str, list[float]] = {}
    for row in seen:
        by.setdefault(row["op"], []).append(abs(_off(row)))
    page.add("Operators", table(
        ["operator", "tensors", "median |log2 off|", "worst", "rule"],
        [[op, len(found), sorted(found)[len(found) // 2], max(found), formulas.get(op, "none: fallback")]
         for op, found in sorted(by.items(), key=lambda item: -max(item[1]))],
    ), f"<p class='note'>{escape(data['note'])}</p>")  # fmt: skip
    return page


def write_scalify_page(folder: Path | str, out: Path | None = None) -> Path:
    """Write the page of a scale report.

    Args:
        folder: that `isoscale scalify` wrote.
        out: where to; by default `report.html` inside the folder.

    Raises:
        CheckpointError: no scale report in the folder.
        MissingDependencyError: plotly is not installed.
    """
    folder = Path(folder)
    path = out or folder / "report.html"
    atomic_write(path, scalify_page(folder).html())
    return path
