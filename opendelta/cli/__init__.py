"""The command ``opendelta``: look at deltas, share them, convert them, and choose modules."""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from opendelta.cli.parser import parser as _parser
from opendelta.cli.shared import one_line
from opendelta.exceptions import OpenDeltaError

FINE, FAILED, INTERRUPTED = 0, 1, 130  # 2, for a line that cannot be understood, is argparse's


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: those of the command line; None for the program's own.

    Returns:
        The exit code: 0, or 1 after an error, which is told in one line on standard error.

    Raises:
        SystemExit: with code 2 if the line cannot be understood, with 0 after ``--help``.
    """
    asked = _parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a card may hold what a terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            asked.run(asked)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (OpenDeltaError, OSError) as error:
        print("opendelta: error:", one_line(error), file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    return FINE


def _warn(message: Warning | str, *where: Any, **more: Any) -> None:
    """In the place of `warnings.showwarning`: without a line of code that is not the user's."""
    print("opendelta: warning:", one_line(message), file=sys.stderr)
