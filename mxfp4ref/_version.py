"""The version, here and nowhere else; a build reads it from this file."""

__version__ = "0.2.0"
