"""The page of `isoscale scalify`: the verdict, the proposals, the pictures and the worst rows, from files alone."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from isoscale._base.errors import CheckpointError
from isoscale.report.scalify_page import along, graph, histogram, scalify_page, write_scalify_page

pytest.importorskip("plotly")


def row(index: int, op: str = "aten.mul.Tensor", **changes: Any) -> dict[str, Any]:
    return {"index": index, "op": op, "kind": "rule", "direction": "forward", "module": "blocks.0", "shape": [4, 8],
            "dtype": "float16", "scale": 0.0, "rms": 0.25, "inputs": [], "line": "/home/me/model.py:12 in forward: x * <y>",
            **changes}  # fmt: skip


ROWS = [
    row(0, "aten.embedding.default", module="embed", rms=-0.5),
    row(1, "aten.view.default", kind="layout", inputs=[0], rms=-0.5),
    row(2, inputs=[1], rms=-7.25, scale=3.0),
    row(3, "aten.new_zeros.default", rms=None, scale=None),
    row(4, "my.odd.default", kind="fallback", inputs=[2, 3], rms="inf", module="head"),
    row(5, "aten._scaled_dot_product_flash_attention_for_cpu_backward.default", direction="backward", inputs=[4], rms=4.5,
        scale=None, line="", shape=[]),
    row(6, direction="backward", module="", inputs=[5], rms=0.0),
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "scalify.json").write_text(json.dumps({
        "model": "a <b> & c", "recipe": "fp16", "steps": 20, "octaves": 3.0,
        "directions": {"forward": {"tensors": 3, "within": 1 / 3}, "backward": {"tensors": 2, "within": 0.5}},
        "proposals": [{"tensor": "mul.Tensor in blocks.0 (forward)", "off": -7.25, "proposal": 'iso.scalify.place(m, "blocks.0")'}],
        "note": "weights and optimiser state take 10.00 bytes a parameter"}))  # fmt: skip
    lines = [{"formulas": {"aten.mul.Tensor": "s = s_a s_b. Assumes independent factors."}}, *ROWS]
    (tmp_path / "tensors.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


def read() -> list[dict[str, Any]]:
    return [{**r, "rms": None if r["rms"] is None else float(r["rms"])} for r in ROWS]


def test_the_page_has_the_verdict_the_proposals_and_the_worst(folder: Path) -> None:
    page = write_scalify_page(folder).read_text()
    assert page.startswith("<!doctype html>")
    assert "Scales of a &lt;b&gt; &amp; c" in page
    assert "<b> & c" not in page.split("<script")[0]
    assert "recipe fp16, after 20 steps; 7 tensors" in page
    for text in ("Verdict", "within 3 octaves of the prediction", "33.3 %", "50.0 %", "10.00 bytes a parameter",
                 "Where a rescale would help", "iso.scalify.place(m, &quot;blocks.0&quot;)", "2^-7.2", "The 5 worst",
                 "The forward graph", "The backward graph", "model.py:12 in forward", "none: fallback"):  # fmt: skip
        assert text in page, text
    assert "/home/me" not in page
    assert page.count("plotly.js v") == 1
    assert not re.findall(r"<(?:script|img|iframe)[^>]*\bsrc\s*=", page)


def test_the_worst_are_sorted_and_views_and_zeros_are_not_among_them(folder: Path) -> None:
    html = scalify_page(folder).html()
    worst = html.partition("The 5 worst")[2].partition("<h2>")[0]
    assert re.findall(r"2\^([-+][\w.]+)<", worst) == ["+inf", "-7.25", "+4.50", "-0.50", "+0.00"]
    assert "view" not in worst
    assert "new_zeros" not in worst
    assert "<td>s = s_a s_b</td>" in worst  # what it assumes stands in the table of operators
    assert "Assumes independent factors" in html.partition("<h2>Operators</h2>")[2]


def test_without_proposals_there_is_no_such_section(folder: Path) -> None:
    data = json.loads((folder / "scalify.json").read_text())
    (folder / "scalify.json").write_text(json.dumps({**data, "proposals": []}))
    assert "Where a rescale would help" not in scalify_page(folder).html()


def test_the_graph_leads_from_operands_through_views() -> None:
    figure = graph(read(), 3.0, "forward")
    (bars,) = figure.data
    assert list(bars.text) == ["embedding", "mul", "odd"]
    assert list(figure.layout.yaxis.ticktext) == ["embed", "blocks.0", "head"]
    (shape,) = figure.layout.shapes
    assert shape.path == "M0,0L0,1 M0,1L0,2"  # embedding -> mul through the view, mul -> odd; zeros have no box
    assert list(bars.marker.color) == [-0.5, -6.0, 6.0]  # held to twice the band
    assert "predicted 2^3, off by 2^-7.25" in bars.hovertext[1]
    (back,) = graph(read(), 3.0, "backward").data
    assert max(map(len, back.text)) <= 9
    assert "scalar" in back.hovertext[0]


def test_a_long_module_takes_several_lines() -> None:
    rows = [row(i, inputs=[i - 1] if i else []) for i in range(40)]
    figure = graph(rows, 3.0, "forward")
    assert list(figure.layout.yaxis.ticktext) == ["blocks.0", "", ""]
    assert figure.layout.height >= 3 * 23
    assert max(figure.data[0].base) < 14


def test_the_two_charts_leave_out_what_is_not_finite() -> None:
    seen = [r for r in read() if r["rms"] is not None and r["kind"] != "layout"]
    points = along(seen, 3.0).data
    assert [len(trace.x) for trace in points] == [2, 2]
    assert all(math.isfinite(y) for trace in points for y in trace.y)
    assert sum(sum(trace.y) for trace in histogram(seen, 3.0).data) == 4


def test_a_pass_without_a_backward(folder: Path) -> None:
    lines = (folder / "tensors.jsonl").read_text().splitlines()
    (folder / "tensors.jsonl").write_text("\n".join(lines[:6]))
    html = scalify_page(folder).html()
    assert "The forward graph" in html
    assert "The backward graph" not in html


def test_a_folder_without_a_scale_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="isoscale scalify --out DIR --report"):
        write_scalify_page(tmp_path)
