"""Draws docs/formats.svg: the positive values of the element formats, on a log axis and relative to the largest.

    python benchmarks/grids.py
"""

from __future__ import annotations

import math
from pathlib import Path

from isoscale import formats as F

LOG = (F.E4M3, F.E5M2, F.E3M2, F.E2M3, F.E2M1, F.INT8, F.INT4, F.E4M3_FNUZ, F.E5M2_FNUZ)
LINEAR = (F.E4M3, F.E5M2, F.E3M2, F.E2M3, F.E2M1, F.INT8)
LEFT, WIDTH, ROW = 120, 840, 26
LOW, HIGH = -18, 17
NORMAL, SUBNORMAL, INK, FAINT = "#1f5fa8", "#d9822b", "#222222", "#dddddd"


def _text(x: float, y: float, words: str, *, anchor: str = "start", size: int = 12, weight: str = "normal") -> str:
    return (f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" font-weight="{weight}" '
            f'fill="{INK}">{words}</text>')  # fmt: skip


def _tick(x: float, y: float, colour: str, height: int = 14) -> str:
    return f'<line x1="{x:.2f}" y1="{y - height:.1f}" x2="{x:.2f}" y2="{y:.1f}" stroke="{colour}" stroke-width="1"/>'


def picture() -> str:
    """The drawing as SVG."""
    parts = []
    y = 30.0
    parts.append(_text(10, y, "Positive values, log scale: powers of two from 2^-18 to 2^17", size=14, weight="bold"))
    y += 12
    top = y
    for fmt in LOG:
        y += ROW
        parts.append(_text(10, y - 2, fmt.name))
        for value in fmt.values():
            if value > 0:
                x = LEFT + (math.log2(value) - LOW) / (HIGH - LOW) * WIDTH
                parts.append(_tick(x, y, SUBNORMAL if value < fmt.min_normal else NORMAL))
    y += 6
    for power in range(LOW, HIGH + 1, 5):
        x = LEFT + (power - LOW) / (HIGH - LOW) * WIDTH
        parts.insert(0, f'<line x1="{x:.1f}" y1="{top:.1f}" x2="{x:.1f}" y2="{y:.1f}" stroke="{FAINT}"/>')
        parts.append(_text(x, y + 14, f"2^{power}", anchor="middle", size=11))
    y += 52
    parts.append(_text(10, y, "The same inside a block, relative to the largest value: where the codes lie", size=14, weight="bold"))
    y += 12
    top = y
    for fmt in LINEAR:
        y += ROW
        parts.append(_text(10, y - 2, fmt.name))
        for value in fmt.values():
            if value >= 0:
                x = LEFT + value / fmt.max * WIDTH
                parts.append(_tick(x, y, SUBNORMAL if value < fmt.min_normal else NORMAL))
    y += 6
    for tenth in range(0, 11, 2):
        x = LEFT + tenth / 10 * WIDTH
        parts.insert(0, f'<line x1="{x:.1f}" y1="{top:.1f}" x2="{x:.1f}" y2="{y:.1f}" stroke="{FAINT}"/>')
        parts.append(_text(x, y + 14, f"{tenth / 10:g}", anchor="middle", size=11))
    y += 36
    parts.append(_tick(LEFT, y, NORMAL) + _text(LEFT + 8, y - 2, "normal"))
    parts.append(_tick(LEFT + 90, y, SUBNORMAL) + _text(LEFT + 98, y - 2, "subnormal (evenly spaced down to zero)"))
    height = y + 16
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 30} {height:.0f}" font-family="sans-serif">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>", ""])


if __name__ == "__main__":
    path = Path(__file__).parent.parent / "docs" / "formats.svg"
    path.write_text(picture())
    print(path)
