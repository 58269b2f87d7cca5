"""Stored cases: reading and verifying them, what they ask for, and writing them from nothing."""

from mxfp4ref.goldens.store import Case, GoldenError, Goldens, open_goldens

__all__ = ["Case", "GoldenError", "Goldens", "open_goldens"]
