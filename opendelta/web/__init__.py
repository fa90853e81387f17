"""Choosing modules by clicking on them in a web page (specification 1.15.3)."""

from __future__ import annotations

from opendelta.web.selector import interactive, select_modules

__all__ = ["interactive", "select_modules"]
