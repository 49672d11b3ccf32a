"""The page of `isoscale check`: how every tensor moves with size, which ones break, and the learning-rate curves."""

from __future__ import annotations

import math
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

_OK, _BAD, _UNSURE = figures.COLOURS[0], figures.COLOURS[1], figures.COLOURS[3]
_COLUMNS = 4


def _colour(ok: bool | None) -> str:
    return _UNSURE if ok is None else _OK if ok else _BAD


def _said(ok: bool | None) -> str:
    return "undecided" if ok is None else "as expected" if ok else "broken"


def _ticks(sizes: Sequence[float]) -> dict[str, Any]:
    return {"tickvals": [math.log2(size) for size in sizes], "ticktext": [f"{size:g}" for size in sizes]}


def curves(tensors: Sequence[Mapping[str, Any]], axis: str, quantity: str) -> Any:
    """Small pictures, one for each kind of tensor: rms against size, both in octaves, relative to the smallest size."""
    subplots = need("plotly.subplots", "report")
    rows = [one for one in tensors if one["axis"] == axis and one["quantity"] == quantity
            and one["verdict"] != "constant"]  # fmt: skip
    kinds = list(dict.fromkeys(one["kind"] for one in rows))
    lines = -(-len(kinds) // _COLUMNS)
    figure = subplots.make_subplots(rows=max(lines, 1), cols=_COLUMNS, subplot_titles=kinds, shared_yaxes="all",
                                    vertical_spacing=0.38 / max(lines, 1), horizontal_spacing=0.02)  # fmt: skip
    sizes = sorted({float(size) for one in rows for size in one["rms"]})
    shown: set[str] = set()
    tallest = 1.0
    for one in sorted(rows, key=lambda one: _said(one["ok"]), reverse=False):
        found = sorted((float(size), float(rms)) for size, rms in one["rms"].items())
        if any(not math.isfinite(rms) or rms <= 0 for _, rms in found):
            continue
        place = kinds.index(one["kind"])
        said = _said(one["ok"])
        heights = [math.log2(rms / found[0][1]) for _, rms in found]
        tallest = max(tallest, *(abs(height) for height in heights))
        figure.add_scatter(
            row=place // _COLUMNS + 1, col=place % _COLUMNS + 1, x=[math.log2(size) for size, _ in found], y=heights,
            mode="lines+markers", name=said, legendgroup=said, showlegend=said not in shown,
            line={"color": _colour(one["ok"]), "width": 1.6}, marker={"size": 5},
            hovertext=f"{one['name']}: slope {float(one['slope']):+.2f}", hoverinfo="text",
        )  # fmt: skip
        shown.add(said)
    for place in range(len(kinds)):
        figure.update_xaxes(row=place // _COLUMNS + 1, col=place % _COLUMNS + 1, title_text=axis, **_ticks(sizes))
    figure.update_yaxes(range=[-1.1 * tallest, 1.1 * tallest], zeroline=True, zerolinecolor="#9ca3af")
    for line in range(lines):
        figure.update_yaxes(row=line + 1, col=1, title_text="octaves")
    figure.update_layout(template="plotly_white", height=110 + 250 * max(lines, 1),
                         margin={"l": 60, "r": 20, "t": 60, "b": 50},
                         legend={"orientation": "h", "y": 1.0, "yref": "container", "yanchor": "top"})  # fmt: skip
    return figure


def lr_curves(found: Mapping[str, Any]) -> Any:
    """Loss against LR at both sizes, with the fitted optima and their intervals."""
    named: dict[str, dict[float, float]] = {}
    for size, curve in found["curves"].items():
        named[f"{found['axis']} {size}"] = {2.0 ** float(lr): _mean(by) for lr, by in curve.items()}
    figure = figures.lines(named, "", "learning rate (base units)")
    figure.update_yaxes(title_text="training loss, last fifth")
    for i, name in enumerate(("best_small", "best_large")):
        best = found[name]
        at, low, high = (float(best[key]) for key in ("at", "low", "high"))
        figure.add_scatter(
            x=[2.0**at], y=[float(best["loss"])], mode="markers", showlegend=False,
            marker={"symbol": "diamond", "size": 11, "color": figures.COLOURS[i]},
            error_x={"type": "data", "symmetric": False, "array": [2.0**high - 2.0**at],
                     "arrayminus": [2.0**at - 2.0**low], "color": figures.COLOURS[i]},
            hovertext=f"fitted optimum 2^{at:.2f} [{low:.2f}, {high:.2f}]", hoverinfo="text",
        )  # fmt: skip
    return figure


def _mean(by: Mapping[str, Any]) -> float:
    losses = [float(loss) for loss in by.values()]
    return sum(losses) / len(losses)


def _number(value: Any) -> str:
    return f"{float(value):+.2f}" if math.isfinite(float(value)) else "-"


def _paragraphs(data: Mapping[str, Any]) -> list[str]:
    out = []
    for one in data["suspects"]:
        text = f"{one['name']} ({one['quantity']} slope {_number(one['slope'])} over {one['axis']}): {one['why']}"
        out.append(f"<p class='warn'>suspect: {escape(text)}</p>")
    drowned = list(dict.fromkeys(one["name"] for one in data["parameters"] if one["eps_dominates"]))
    if drowned:
        out.append(f"<p>gradients below 10 x eps: {escape(', '.join(drowned))}</p>")
    return [*out, *(f"<p class='note'>{escape(note)}</p>" for note in data["notes"])]


def check_page(folder: Path) -> Page:
    """The page of a check's folder.

    Raises:
        CheckpointError: there is no finished check in it.
    """
    file = folder / "check.json"
    if not file.is_file():
        raise CheckpointError("no finished check in this folder", key="DIR", value=str(folder),
                              hint="isoscale check TARGET --out DIR")  # fmt: skip
    data: Any = read_json(file)
    settings, base = data["settings"], data["base"]
    page = Page(f"Check: {data['target']}", f"{data['verdict']}; rule {settings['rule']}, base width {base['width']}, "
                f"depth {base['depth']}; {settings['optimizer']} lr {float(settings['lr']):g}, {settings['steps']} "
                f"steps, {settings['seeds']} seeds")  # fmt: skip
    tensors = data["tensors"]
    rows = []
    for axis in dict.fromkeys(one["axis"] for one in tensors):
        here = [one for one in tensors if one["axis"] == axis]
        counts = [sum(one["ok"] is state for one in here) for state in (True, None, False)]
        rows.append([axis, len(here), *counts])
    page.add("Verdict", table(["axis", "slopes", "as expected", "undecided", "broken"], rows), *_paragraphs(data))
    for found in data["transfer"]:
        octaves, cost = ([float(value) for value in found[key]] for key in ("octaves", "cost"))
        said = (f"{found['verdict']}: the best LR moves {octaves[0]:+.2f} octaves "
                f"[{octaves[1]:+.2f}, {octaves[2]:+.2f}]; keeping it costs {cost[0]:.3f} nats "
                f"[{cost[1]:.3f}, {cost[2]:.3f}]")  # fmt: skip
        edge = "<p class='warn'>An optimum lies at the edge of the LRs tried.</p>" if found["edge"] else ""
        if not found["learned"]:
            edge += "<p class='warn'>The runs did not learn more than pairs of bytes.</p>"
        page.add(f"Transfer, {found['axis']} {found['small']} to {found['large']}", f"<p>{escape(said)}</p>", edge,
                 page.figure(lr_curves(found)))  # fmt: skip
    for axis in dict.fromkeys(one["axis"] for one in tensors):
        for quantity, what in (("change", "change since the first step"), ("value", "size")):
            text = "<p class='note'>rms at the last step, relative to the smallest model; flat is good.</p>"
            page.add(f"Over {axis}: {what}", text, page.figure(curves(tensors, axis, quantity)))
    page.add("Slopes", table(
        ["tensor", "kind", "axis", "quantity", "slope", "stderr", "at init", "expected", "verdict", ""],
        [[one["name"], one["kind"], one["axis"], one["quantity"], *(_number(one[key]) for key in
          ("slope", "stderr", "init_slope")), one["expected"], one["verdict"], _said(one["ok"])] for one in tensors],
    ))  # fmt: skip
    page.add("Parameters", "<p class='note'>Slopes of rms; not judged.</p>", table(
        ["parameter", "axis", "gradient", "update", "weight change", "smallest gradient rms", "eps"],
        [[one["name"], one["axis"], *(_number(one[key]["slope"]) for key in ("gradient", "update", "change")),
          float(one["grad_rms"]), float(one["eps"])] for one in data["parameters"]],
    ))  # fmt: skip
    return page


def write_check_page(folder: Path | str, out: Path | None = None) -> Path:
    """Write the page of a check.

    Args:
        folder: with `check.json`.
        out: where to; by default `report.html` inside the folder.

    Raises:
        CheckpointError: there is no finished check in the folder.
        MissingDependencyError: plotly is not installed.
        StorageError: the page cannot be written.
    """
    folder = Path(folder)
    path = out or folder / "report.html"
    atomic_write(path, check_page(folder).html())
    return path
