"""``python -m opendelta`` is the command ``opendelta``."""

from __future__ import annotations

import sys

from opendelta.cli import main

if __name__ == "__main__":
    sys.exit(main())
