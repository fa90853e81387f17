"""0.3.2's path of the visualization."""

from opendelta.inspection import Visualization

__all__ = ["Visualization"]
