"""What a diagnosis found out."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ALTERNATIVES", "NEARLY", "NOTE", "OTHERS", "ROUNDINGS", "STAGES", "UNKNOWN", "Finding", "counted"]

STAGES = (
    *("input", "slots", "fc1", "activation", "fc2", "finalize"),
    *("routing", "quantize", "dequantize", "layout"),
)

# Between a hypothesis and those that predict the same bits.
ALTERNATIVES = ". This output does not tell it from: "
# Before what is known of a number in a sentence.
NOTE = ". Note: "
# After a hypothesis that predicts most, before how much.
NEARLY, ROUNDINGS = ", or nearly so (", ", up to roundings ("
# Between what predicts every bit of some cases, and what is known of the others.
OTHERS = "; in the others "


def counted(count: int, noun: str) -> str:
    """ "1 token", "2 tokens"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


@dataclass(frozen=True)
class Finding:
    """What to tell the engineer.

    Attributes:
        stages: of `STAGES`, those in which the change may lie by the evidence: one, at most two, none if unknown.
        sentence: what is wrong, in words; "" if unknown.
        exact: whether every bit that differs is predicted.
        cases: where the sentence predicts every bit of some failing cases only, of how many, and of how many in all.
            With `exact`, the others are predicted by other sentences.
        common: what most failing cases share where no sentence is known: a stage, or the places that differ.
    """

    stages: tuple[str, ...] = ()
    sentence: str = ""
    exact: bool = False
    cases: tuple[int, int] | None = None
    common: str = ""

    @property
    def hedged(self) -> bool:
        """Whether the sentence is a prediction of most bits only, so that its stages are no more than possible."""
        return not self.exact and any(words in self.sentence for words in (NEARLY, ROUNDINGS))

    @property
    def where(self) -> str:
        """ "it lies in fc1 or activation", or that it may; "" if unknown."""
        lies = "it may lie in" if self.hedged else "it lies in"
        return f"{lies} {' or '.join(self.stages)}" if self.stages else ""

    def __str__(self) -> str:
        where = f" [{'perhaps ' * self.hedged}{' or '.join(self.stages)}]" if self.stages else ""
        return f"{self.sentence}{where}" if self.sentence else ""


UNKNOWN = Finding()
