"""The table of a delta: one row for each pattern of modified modules."""

from __future__ import annotations

import html
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from rich.markup import escape as rich_escape
from rich.table import Table
from torch import nn
from torch.nn.parameter import is_lazy

from opendelta.inspection.display import plain_text
from opendelta.inspection.folding import fold_names
from opendelta.inspection.statistics import numel, ratio

Entry = tuple[str, str, nn.Module | nn.Parameter]

_HEADER = ("modified modules", "delta", "count", "shape", "parameters", "trainable", "bytes")


class Counts(NamedTuple):
    """Values in parameters, those of them that train, and the bytes that all take."""

    parameters: int = 0
    trainable: int = 0
    bytes: int = 0

    @classmethod
    def sum(cls, counts: Iterable[Counts]) -> Counts:
        return cls(*map(sum, zip(*counts, strict=True)))


@dataclass(frozen=True)
class Row:
    """The same delta on modules whose names differ in numbers only.

    Attributes:
        pattern: e.g. ``encoder.layer.0-11.attention.self.query``.
        delta: the name under which the delta sits there, e.g. ``lora``.
        count: how many modules the pattern stands for.
        shape: of the delta's parameters on each, e.g. ``lora_A:[8, 64] lora_B:[64, 8]``.
        counts: over all of these modules.
    """

    pattern: str
    delta: str
    count: int
    shape: str
    counts: Counts

    def cells(self) -> tuple[str, ...]:
        numbers = [f"{number:,}" for number in (self.count, *self.counts)]
        return self.pattern, self.delta, numbers[0], self.shape, *numbers[1:]


@dataclass(frozen=True, repr=False)
class Summary:
    """A table that prints itself, in a terminal and in a notebook.

    Attributes:
        rows: one for each pattern, delta name and shape.
        total_parameters: number of values in the backbone with its deltas.
    """

    rows: tuple[Row, ...]
    total_parameters: int

    @property
    def total(self) -> Counts:
        """The sum over all rows."""
        return Counts.sum(row.counts for row in self.rows)

    def _last_line(self) -> str:
        part = self.total.parameters
        share = 100 * ratio(part, self.total_parameters)
        return f"{part:,} of {self.total_parameters:,} parameters = {share:.4g} %"

    def _footer(self) -> tuple[str, ...]:
        return Row("total", "", sum(row.count for row in self.rows), "", self.total).cells()

    def __rich__(self) -> Table:
        table = Table(caption=self._last_line(), caption_justify="left", show_footer=True)
        for title, footer in zip(_HEADER, self._footer(), strict=True):
            right = title in ("count", "parameters", "trainable", "bytes")
            table.add_column(title, footer, justify="right" if right else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*(rich_escape(cell) for cell in row.cells()))
        return table

    def __str__(self) -> str:
        return plain_text(self)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        def line(tag: str, cells: tuple[str, ...]) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

        rows = "".join(line("td", row.cells()) for row in self.rows)
        return (
            f"<table><caption>{html.escape(self._last_line())}</caption>"
            f"<thead>{line('th', _HEADER)}</thead><tbody>{rows}</tbody>"
            f"<tfoot>{line('th', self._footer())}</tfoot></table>"
        )


def summary(entries: Iterable[Entry], total_parameters: int) -> Summary:
    """Tabulate what a delta put on a backbone.

    Args:
        entries: ``(module name, delta name, what was put there)`` for each modified module, the
            last a delta module or a single parameter (BitFit's bias).
        total_parameters: number of values in the backbone with its deltas.

    Returns:
        The table. A parameter that sits on several modules counts where it comes first.
    """
    alike: dict[tuple[str, str], dict[str, list[Counts]]] = {}
    seen: set[int] = set()
    for module_name, delta_name, content in entries:
        named = (
            {"": content} if isinstance(content, nn.Parameter) else dict(content.named_parameters())
        )
        shape = " ".join(f"{name}:{_shape(p)}".lstrip(":") for name, p in named.items())
        here = alike.setdefault((delta_name, shape), {}).setdefault(module_name, [])
        here += [_counts(p) for p in named.values() if id(p) not in seen]
        seen.update(map(id, named.values()))
    rows = [
        Row(pattern, delta, len(names), shape, Counts.sum(c for name in names for c in group[name]))
        for (delta, shape), group in alike.items()
        for pattern, names in fold_names(group).items()
    ]
    return Summary(tuple(rows), total_parameters)


def _shape(p: nn.Parameter) -> str:
    return "[?]" if is_lazy(p) else str(list(p.shape))


def _counts(p: nn.Parameter) -> Counts:
    size = numel(p)
    return Counts(size, size if p.requires_grad else 0, size * p.element_size() if size else 0)
