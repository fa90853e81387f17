"""0.3.2's path of the common structure."""

from opendelta.addressing.common_structure import CommonStructureMap

__all__ = ["CommonStructureMap"]
