"""A picture of results: accuracy over the number of trainable parameters, as SVG."""

from __future__ import annotations

import math
from typing import NamedTuple
from xml.sax.saxutils import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 400, 60, 130, 20, 50


class Point(NamedTuple):
    name: str
    parameters: int
    accuracy: float


def scatter(points: list[Point]) -> str:
    """One dot for each point; the parameters are on a logarithmic scale."""
    low = min(math.floor(math.log10(p.parameters)) for p in points)
    high = max(math.floor(math.log10(p.parameters)) + 1 for p in points)
    bottom = math.floor(20 * min(p.accuracy for p in points)) / 20
    top = max(math.ceil(20 * max(p.accuracy for p in points)) / 20, bottom + 0.05)

    def x(parameters: float) -> float:
        return LEFT + (math.log10(parameters) - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(accuracy: float) -> float:
        return HEIGHT - BOTTOM - (accuracy - bottom) / (top - bottom) * (HEIGHT - TOP - BOTTOM)

    def text(words: str, x: float, y: float, anchor: str) -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'

    marks = [text("trainable parameters", (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, "middle")]
    for power in range(low, high + 1):
        at = x(10**power)
        marks.append(f'<path d="M{at:.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        marks.append(text(f"{10**power:,}", at, HEIGHT - BOTTOM + 18, "middle"))
    for step in range(round(20 * bottom), round(20 * top) + 1):
        at = y(step / 20)
        marks.append(f'<path d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
        marks.append(text(f"{step / 20:.2f}", LEFT - 8, at + 4, "end"))
    for p in points:
        marks.append(f'<circle cx="{x(p.parameters):.1f}" cy="{y(p.accuracy):.1f}" r="4"/>')
        marks.append(text(p.name, x(p.parameters) + 8, y(p.accuracy) + 4, "start"))
    style = "text{font:12px sans-serif;fill:#333}path{stroke:#ddd}circle{fill:#7b2d8e}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}">'
        f'<style>{style}</style><rect width="100%" height="100%" fill="white"/>'
        + "".join(marks)
        + "</svg>\n"
    )
