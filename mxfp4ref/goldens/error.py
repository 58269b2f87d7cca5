"""What is raised of goldens that are not as they should be."""

from __future__ import annotations

from typing import Any

from mxfp4ref._files import printable

__all__ = ["GoldenError"]


class GoldenError(ValueError):
    """The goldens are missing, damaged or not what they claim to be; the message names the file.

    Attributes:
        report: of `conformance.run`: on the cases that had been run before, if any had.
    """

    report: Any = None

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))  # it may quote the file
