"""Settings of Sphinx, which makes the site out of these pages: ``make docs``."""

from __future__ import annotations

from opendelta import __version__

project = "OpenDelta"
author = "The OpenDelta contributors"
release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"OpenDelta {release}"
html_show_copyright = False

myst_heading_anchors = 3  # so that [text](page.md#a-heading) leads there

default_role = "code"  # docstrings write `name`, as these pages do
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
napoleon_custom_sections = [("Class attributes", "params_style")]
