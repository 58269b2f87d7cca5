"""What a diagnosis found out for certain."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Finding"]


@dataclass(frozen=True)
class Finding:
    """Where a wrong output went wrong, and how.

    Attributes:
        stages: the stages that may be at fault, such as ("fc2_gemm",) or ("routing",).
        sentence: what is wrong, in words; "" where nothing explains every element that differs.
        exact: whether the sentence predicts the output in all its bits.
    """

    stages: tuple[str, ...]
    sentence: str
    exact: bool
