"""Plotly figures: loss curves, loss against a hyperparameter, clipped and flushed shares."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from isoscale._base.optional import need
from isoscale.report.load import Run

COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f")
LOSS = "validation loss, nats per token"


def figure(title: str, x: str, y: str) -> Any:
    """An empty figure in the house's style."""
    go = need("plotly.graph_objects", "report")
    made = go.Figure()
    made.update_layout(
        title=title, xaxis_title=x, yaxis_title=y, template="plotly_white", height=430, showlegend=True,
        margin={"l": 60, "r": 20, "t": 50, "b": 50}, legend={"orientation": "h", "y": -0.2},
    )  # fmt: skip
    return made


def _smooth(values: Sequence[float], span: int) -> list[float]:
    """A running mean; what is no number stays a gap and spoils nothing after it."""
    out, recent, seen = [], 0.0, 0
    for value in values:
        if math.isfinite(value):
            seen += 1
            recent += max(1 / seen, 1 / span) * (value - recent)
        out.append(recent if math.isfinite(value) else math.nan)
    return out


def curves(runs: Mapping[str, Run], title: str = "Training loss (smoothed) and validation loss (points)") -> Any:
    """Loss against step for each labelled run; what rises above the first loss is cut off."""
    made = figure(title, "step", "loss, nats per token")
    seen: list[float] = []
    starts: list[float] = []
    for i, (label, run) in enumerate(runs.items()):
        colour = COLOURS[i % len(COLOURS)]
        losses = _smooth([row["loss"] for row in run.train], 15)
        points = [(row["step"], row["val_loss"]) for row in run.evals]
        seen += [x for x in [*losses, *(loss for _, loss in points)] if math.isfinite(x)]
        starts += losses[:1]
        end = "" if run.finished else " (did not finish)"
        made.add_scatter(x=[row["step"] + 1 for row in run.train], y=losses, name=f"{label}{end}", mode="lines",
                           line={"color": colour, "width": 1.6})  # fmt: skip
        made.add_scatter(x=[step for step, _ in points], y=[loss for _, loss in points], mode="markers",
                           name=f"{label}, validation", marker={"color": colour, "size": 8},
                           showlegend=False)  # fmt: skip
    if seen:
        top = min(max(seen), max([x for x in starts if math.isfinite(x)], default=max(seen)))
        margin = 0.04 * (top - min(seen)) + 0.01
        made.update_yaxes(range=[min(seen) - margin, top + margin])
    return made


def lines(named: Mapping[str, Mapping[float, float]], title: str, x: str) -> Any:
    """Final loss against a hyperparameter, one line per label (usually a width).

    The best point of a line is ringed; diverged runs stand as crosses at the top.
    """
    made = figure(title, x, LOSS)
    worst = max([loss for line in named.values() for loss in line.values() if math.isfinite(loss)], default=1.0)
    ticks = sorted({value for line in named.values() for value in line})
    for i, (label, line) in enumerate(named.items()):
        points = sorted((value, loss) for value, loss in line.items() if math.isfinite(loss))
        lost = sorted(value for value, loss in line.items() if not math.isfinite(loss))
        colour = COLOURS[i % len(COLOURS)]
        made.add_scatter(x=[value for value, _ in points], y=[loss for _, loss in points], name=label,
                           mode="lines+markers", line={"color": colour})  # fmt: skip
        if points:
            value, loss = min(points, key=lambda point: point[1])
            ring = {"symbol": "circle-open", "size": 17, "color": colour, "line": {"width": 3}}
            made.add_scatter(x=[value], y=[loss], mode="markers", showlegend=False, hovertext=f"best of {label}",
                               marker=ring)  # fmt: skip
        if lost:
            made.add_scatter(x=lost, y=[worst * 1.03] * len(lost), mode="markers", name=f"{label}: diverged",
                               marker={"symbol": "x", "size": 10, "color": colour})  # fmt: skip
    made.update_xaxes(type="log", tickvals=ticks, ticktext=[power(value) for value in ticks])
    return made


def power(value: float) -> str:
    """A number as a power of two where it is one (to a tenth), in HTML."""
    exponent = math.log2(value)
    return f"2<sup>{round(exponent, 1):g}</sup>" if abs(exponent - round(exponent, 1)) < 1e-6 else f"{value:.3g}"


def casts(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Clipped and flushed share of every cast below 16 bits at the last evaluation; None where there is none."""
    last = max(row["step"] for row in rows)
    final = [row for row in rows if row["step"] == last and row["format"] != "bf16"]
    if not final:
        return None
    made = figure("Share of values clipped or flushed to zero by the casts, last evaluation", "share", "")
    final.sort(key=lambda row: (row["operand"], row["layer"]), reverse=True)
    labels = [f"{row['layer']} {row['operand']} {row['format']}" for row in final]
    for name, colour in (("clipped", COLOURS[1]), ("flushed", COLOURS[0])):
        made.add_bar(y=labels, x=[row[name] for row in final], name=name, orientation="h", marker={"color": colour})
    made.update_xaxes(tickformat=".2~%", rangemode="tozero")
    made.update_yaxes(automargin=True)
    legend = {"y": 1.0, "yanchor": "bottom", "x": 0.6}
    made.update_layout(barmode="group", height=150 + 26 * len(final), legend=legend)
    return made
