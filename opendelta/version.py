"""The version of the library, stated once."""

__version__ = "1.1.0"
