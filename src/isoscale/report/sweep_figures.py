"""Plotly figures of a sweep: best so far, what matters, interactions, parallel coordinates, optimum against size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from isoscale._base.optional import need
from isoscale.report.analysis import transfer_error
from isoscale.report.figures import COLOURS, LOSS, figure, power

MOST = 9  # axes of parallel coordinates that one can still read


def best_so_far(named: Mapping[str, tuple[list[float], list[float]]]) -> Any:
    """Lowest loss against what was spent, a step line for each search."""
    out = figure("", "training FLOPs spent by the search", f"best {LOSS} so far")
    for i, (label, (cost, low)) in enumerate(named.items()):
        shown = [(x, y) for x, y in zip(cost, low) if math.isfinite(y)]
        out.add_scatter(x=[x for x, _ in shown], y=[y for _, y in shown], name=label, mode="lines",
                        line={"shape": "hv", "color": COLOURS[i % len(COLOURS)]})  # fmt: skip
    return out


def bars(values: Mapping[str, float], x: str) -> Any:
    """Horizontal bars, the longest on top."""
    ordered = sorted(values.items(), key=lambda item: item[1])[-24:]
    out = figure("", x, "")
    out.add_bar(y=[name for name, _ in ordered], x=[value for _, value in ordered], orientation="h",
                marker={"color": COLOURS[0]}, showlegend=False)  # fmt: skip
    out.update_yaxes(automargin=True)
    out.update_layout(height=130 + 22 * len(ordered))
    return out


def heat(a: str, b: str, rows: Sequence[float], columns: Sequence[float], loss: Any) -> Any:
    """Loss over two hyperparameters, and the transfer error of the pair in both directions."""
    go = need("plotly.graph_objects", "report")
    errors = transfer_error(loss), transfer_error(loss.T)
    out = figure(f"transfer error {errors[0]:.4f} ({a} wrong), {errors[1]:.4f} ({b} wrong), nats", b, a)
    text = [[f"{x:.3f}" if math.isfinite(x) else "diverged" for x in row] for row in loss]
    out.add_trace(go.Heatmap(
        z=[[x if math.isfinite(x) else None for x in row] for row in loss], x=[power(c) for c in columns],
        y=[power(r) for r in rows], text=text, texttemplate="%{text}", colorscale="Viridis_r",
        colorbar={"title": "loss"},
    ))  # fmt: skip
    out.update_layout(height=120 + 60 * len(rows), showlegend=False)
    return out


def parallel(points: Mapping[tuple[tuple[str, float], ...], float], names: Sequence[str],
             starts: Mapping[str, float]) -> Any:  # fmt: skip
    """One line per point through its values (log2), coloured by loss; the worst quarter is cut off."""
    go = need("plotly.graph_objects", "report")
    finite = sorted((loss, point) for point, loss in points.items() if math.isfinite(loss))
    kept = finite[: max(2, 3 * len(finite) // 4)]
    axes = [{"label": name, "values": [math.log2(dict(p).get(name, starts.get(name, 1.0))) for _, p in kept]}
            for name in names[:MOST]]  # fmt: skip
    axes.append({"label": "loss", "values": [loss for loss, _ in kept]})
    line = {"color": [loss for loss, _ in kept], "colorscale": "Viridis", "reversescale": True, "showscale": True}
    out = go.Figure(go.Parcoords(dimensions=axes, line=line, labelangle=-12))
    out.update_layout(template="plotly_white", height=430, margin={"l": 60, "r": 60, "t": 90, "b": 30})
    return out


def optimum_against_size(best: Mapping[int, float], what: str) -> Any:
    """The best value of a hyperparameter at each width."""
    out = figure("", "width", f"best {what} (base units)")
    sizes = sorted(best)
    out.add_scatter(x=sizes, y=[best[size] for size in sizes], mode="lines+markers", showlegend=False,
                    line={"color": COLOURS[0]})  # fmt: skip
    ticks = sorted(set(best.values()))
    out.update_xaxes(type="log", tickvals=sizes)
    out.update_yaxes(type="log", tickvals=ticks, ticktext=[power(value) for value in ticks])
    return out
