"""A plot of the table of `bench.py`, as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

LEFT, WIDTH, LINE = 250, 430, 34


def plot(rows: Sequence[Any]) -> str:
    """Two bars for each row, OpenDelta's and PEFT's; the line is 1, that which they relate to."""
    most = max(2.0, *(min(value, 3.0) for row in rows for value in (row.ours, row.peft or 0)))
    scale = WIDTH / most
    parts = []
    for number, row in enumerate(rows):
        top = 40 + LINE * number
        place = f'x="{LEFT - 8}" y="{top + 15}" text-anchor="end"'
        parts.append(f"<text {place}>{escape(row.item)}</text>")
        for value, shift, colour in ((row.ours, 0, "#8250df"), (row.peft, 12, "#9aa0a6")):
            if value is not None:
                width = min(value, most) * scale
                parts.append(
                    f'<rect x="{LEFT}" y="{top + shift}" width="{width:.1f}" height="10" '
                    f'fill="{colour}"/><text x="{LEFT + width + 4:.1f}" y="{top + shift + 9}" '
                    f'font-size="10">{value:.2f}</text>'
                )
    height = 50 + LINE * len(rows)
    line = LEFT + scale
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 60}" height="{height}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
        f'<text x="{LEFT}" y="20"><tspan fill="#8250df">OpenDelta</tspan> and '
        '<tspan fill="#9aa0a6">PEFT</tspan>; less is better</text>'
        f'<line x1="{line:.1f}" y1="30" x2="{line:.1f}" y2="{height - 10}" stroke="black" '
        f'stroke-dasharray="3"/>{"".join(parts)}</svg>\n'
    )
