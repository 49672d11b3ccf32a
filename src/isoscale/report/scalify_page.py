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
from isoscale.report.document import Page, table
from isoscale.report.load import read_json

_WORST, _BINS = 40, 0.5
_COLUMNS, _LETTERS, _NAME = 14, 9, 34  # boxes in a line of the graph, letters in a box, of a module's name
_FORWARD, _BACKWARD = figures.COLOURS[0], figures.COLOURS[1]


def _measured(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["rms"] is not None and row["kind"] != "layout" and "empty" not in row["op"]]


def _off(row: Mapping[str, Any]) -> float:
    return float(row["rms"])


def _label(row: Mapping[str, Any]) -> str:
    shape = "x".join(map(str, row["shape"])) or "scalar"
    scale = "any" if row["scale"] is None else f"2^{row['scale']:g}"
    return f"{_op(row['op'])} [{shape}] in {row['module'] or 'the loss'}: predicted {scale}, off by 2^{_off(row):+.2f}"


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
        xaxis_title="tensor, in the order of execution", yaxis_title="octaves off (0: as predicted)",
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
                         xaxis_title="octaves off", margin={"l": 60, "r": 20, "t": 20, "b": 50},
                         legend={"orientation": "h", "y": 1.1})  # fmt: skip
    return figure


def _flow(rows: Sequence[Mapping[str, Any]]) -> dict[int, list[int]]:
    """Index -> what it was made from, views and copies left out: an operand that is one counts as what it shows."""
    shown: dict[int, list[int]] = {}
    out = {}
    for row in rows:
        sources = list(dict.fromkeys(i for source in row["inputs"] for i in shown.get(source, [])))
        shown[row["index"]] = sources if row["kind"] == "layout" else [row["index"]]
        if row["kind"] != "layout":
            out[row["index"]] = sources
    return out


def graph(rows: Sequence[Mapping[str, Any]], octaves: float, direction: str) -> Any:
    """The data flow of one direction: a line of boxes per module, one per tensor, coloured by its error; a line from
    each operand. Views, copies and zeros are left out."""
    objects = need("plotly.graph_objects", "report")
    made = [row for row in _measured(rows) if row["direction"] == direction]
    by: dict[str, list[Mapping[str, Any]]] = {}
    for row in made:
        by.setdefault(row["module"] or "(loss)", []).append(row)
    names: list[str] = []
    at: dict[int, tuple[int, int]] = {}
    for module, found in by.items():
        for i, row in enumerate(found):
            if i % _COLUMNS == 0:
                names.append("" if i else module[-_NAME:])
            at[row["index"]] = (i % _COLUMNS, len(names) - 1)
    flow = _flow(rows)
    edges = [(at[i], at[row["index"]]) for row in made for i in flow[row["index"]] if i in at]
    figure = objects.Figure()
    ends = 2 * octaves
    figure.add_bar(
        orientation="h", x=[0.84] * len(made), base=[at[row["index"]][0] - 0.42 for row in made], width=0.68,
        y=[at[row["index"]][1] for row in made], text=[_short(row["op"]) for row in made], textangle=0,
        textposition="inside", insidetextanchor="middle", textfont={"size": 9}, hoverinfo="text",
        hovertext=[_label(row) for row in made], showlegend=False,
        marker={"color": [max(-ends, min(ends, _off(row))) for row in made],
                "colorscale": "RdBu", "cmin": -ends, "cmax": ends, "line": {"width": 0.6, "color": "#9ca3af"},
                "colorbar": {"title": {"text": "octaves<br>off", "font": {"size": 11}}, "thickness": 12,
                             "lenmode": "pixels", "len": 220, "y": 1, "yanchor": "top"}},
    )  # fmt: skip
    path = " ".join(f"M{x0},{y0}L{x1},{y1}" for (x0, y0), (x1, y1) in edges)
    if path:
        figure.add_shape(type="path", path=path, layer="below", line={"color": "rgba(107,114,128,0.45)", "width": 1})
    figure.update_yaxes(tickvals=list(range(len(names))), ticktext=names, range=[len(names) - 0.4, -0.6],
                        showgrid=False, zeroline=False, tickfont={"size": 11})  # fmt: skip
    figure.update_xaxes(visible=False, range=[-0.6, _COLUMNS - 0.4])
    figure.update_layout(template="plotly_white", height=max(300, 60 + 23 * len(names)), barmode="overlay",
                         margin={"l": 30 + 6 * max(map(len, names)), "r": 20, "t": 20, "b": 20})  # fmt: skip
    return figure


def _op(name: str) -> str:
    """An operator as one says it: aten and the default overload go without saying."""
    return name.removeprefix("aten.").removesuffix(".default")


def _short(name: str) -> str:
    short = name.split(".")[1].strip("_")
    return short if len(short) <= _LETTERS else short[: _LETTERS - 1] + "\u2026"


def _rule(formula: str | None) -> str:
    """The formula of a rule, without what it assumes."""
    return "none: fallback" if formula is None else formula.partition(". Assumes")[0]


def _line(line: str) -> str:
    """`/path/file.py:12 in forward: code` as `file.py:12 in forward`."""
    place = line.partition(": ")[0]
    return Path(place).name if place else ""


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
    page.add("Verdict", table(["direction", "tensors", f"within {octaves:g} octaves of the prediction"], [
        [name, part["tensors"], f"{100 * float(part['within']):.1f} %"] for name, part in data["directions"].items()
    ]), f"<p class='note'>{escape(data['note'])}</p>")  # fmt: skip
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
    note = ("<p class='note'>A box per tensor, in the order of execution: red has less than it predicts, blue more. "
            "Lines lead from operands; views, copies and zeros are left out.</p>")  # fmt: skip
    for direction in ("forward", "backward"):
        if any(row["direction"] == direction for row in seen):
            page.add(f"The {direction} graph", note, page.figure(graph(rows, octaves, direction)))
    worst = sorted(seen, key=lambda row: -abs(_off(row)))[:_WORST]
    page.add(f"The {len(worst)} worst", table(
        ["module", "operator", "direction", "shape", "predicted", "off by", "rule", "line"],
        [[row["module"] or "(loss)", _op(row["op"]), row["direction"], "x".join(map(str, row["shape"])) or "scalar",
          "any" if row["scale"] is None else f"2^{row['scale']:g}", f"2^{_off(row):+.2f}",
          _rule(formulas.get(row["op"])), _line(row["line"])] for row in worst],
    ))  # fmt: skip
    by: dict[str, list[float]] = {}
    for row in seen:
        by.setdefault(row["op"], []).append(abs(_off(row)))
    page.add("Operators", table(
        ["operator", "tensors", "median octaves off", "worst", "rule"],
        [[_op(op), len(found), sorted(found)[len(found) // 2], max(found), formulas.get(op, "none: fallback")]
         for op, found in sorted(by.items(), key=lambda item: -max(item[1]))],
    ))  # fmt: skip
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
