"""Where pictures and tables go: a terminal, a notebook, a pipe, or a string."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from rich.console import Console, RenderableType

UNBOUNDED = 100_000  # columns; a file or pipe has no right margin to wrap lines at


def plain_text(renderable: RenderableType) -> str:
    """What `renderable` says, without colours and without wrapping."""
    console = Console(width=UNBOUNDED, color_system=None, force_jupyter=False)
    with console.capture() as capture:
        console.print(renderable)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def show(renderable: RenderableType) -> None:
    """Print to standard output: with colours in a terminal or notebook, unless ``NO_COLOR``."""
    console = Console()
    if console.is_jupyter:
        show_in_notebook(renderable)
    elif console.is_terminal:
        console.print(renderable)
    else:
        console.out(plain_text(renderable), highlight=False)


def show_in_notebook(thing: Any, raw: bool = False) -> None:
    """IPython's ``display``, of an object or of `raw` data by MIME type."""
    importlib.import_module("IPython.display").display(thing, raw=raw)


def notebook_cell() -> int | None:
    """Number of the IPython input that runs now, or None outside of IPython."""
    ipython: Any = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return None if shell is None else int(shell.execution_count)
