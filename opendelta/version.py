"""The version of the library, stated once."""

__version__ = "1.0.0"
