"""What a diagnosis found out."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["STAGES", "UNKNOWN", "Finding"]

STAGES = (
    *("input", "slots", "fc1", "activation", "fc2", "finalize"),
    *("routing", "quantize", "dequantize", "layout"),
)


@dataclass(frozen=True)
class Finding:
    """What to tell the engineer.

    Attributes:
        stages: of `STAGES`, those in which the change may lie by the evidence: one, at most two, none if unknown.
        sentence: what is wrong, in words; "" if unknown.
        exact: whether every bit that differs is predicted.
    """

    stages: tuple[str, ...] = ()
    sentence: str = ""
    exact: bool = False

    def __str__(self) -> str:
        where = f" [{' or '.join(self.stages)}]" if self.stages else ""
        return f"{self.sentence}{where}" if self.sentence else ""


UNKNOWN = Finding()
