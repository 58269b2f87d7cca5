"""What is raised of a checkpoint that is not as it should be."""

from __future__ import annotations

from mxfp4ref._files import printable

__all__ = ["CheckpointError"]


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or not what it claims to be; the message names tensor and file."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))  # it may quote the file
