"""Writes measured figures into the pages: ``python docs/tables.py``.

``docs/NAME.json`` holds a list of rows, or a dict with such a list under ``rows``; without it there
is an error. The table takes the place of whatever stands between ``<!-- table: NAME -->`` and
``<!-- end -->`` on a page.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

HEADINGS = {"base": "ratio to", "ours": "OpenDelta", "peft": "PEFT", "spread": "quartiles"}
PLACE = re.compile(r"<!-- table: (\w+) -->\n.*?<!-- end -->", re.DOTALL)


def cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|")


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table; the first row's keys are its columns."""
    columns = list(rows[0])
    heads = [HEADINGS.get(column, column.replace("_", " ")) for column in columns]
    cells = [heads, ["---"] * len(columns), *([cell(row[c]) for c in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def fill(page: Path) -> None:
    """Put the tables of a page in their places."""

    def filled(place: re.Match[str]) -> str:
        found = json.loads((page.parent / f"{place[1]}.json").read_text())
        rows = found["rows"] if isinstance(found, dict) else found
        return f"<!-- table: {place[1]} -->\n\n{table(rows)}\n\n<!-- end -->"

    text = page.read_text()
    if (new := PLACE.sub(filled, text)) != text:
        page.write_text(new)


if __name__ == "__main__":
    for path in Path(__file__).parent.glob("*.md"):
        fill(path)
