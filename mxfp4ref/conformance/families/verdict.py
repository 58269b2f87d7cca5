"""The verdict of a jury."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace

from mxfp4ref.conformance.families.hypothesis import Finding, Hypothesis
from mxfp4ref.conformance.families.search import Match
from mxfp4ref.conformance.families.telling import told
from mxfp4ref.model.call import MoeCall

__all__ = ["Verdict", "narrowed"]


@dataclass(frozen=True)
class Verdict:
    """What all failures say together.

    Attributes:
        finding: of the kernel.
        hypotheses: those that predict every bit of every case, the simplest first.
        by_case: what was found for cases by themselves.
        refuted: whether what predicts every bit of a case makes the others worse.
    """

    finding: Finding
    hypotheses: tuple[Hypothesis, ...]
    by_case: dict[str, Finding]
    refuted: Callable[[str], bool] = lambda case: False


def narrowed(verdict: Verdict, predicted: Collection[Collection[str]], calls: Iterable[MoeCall]) -> Verdict:
    """With the hypotheses that predict other cases too; as it is where none does.

    Args:
        verdict: of some cases.
        predicted: in words, what predicts every bit of each of the others.
        calls: of all of them.
    """
    kept = [h for h in verdict.hypotheses if all(h.words in words for words in predicted)]
    if not kept or len(kept) == len(verdict.hypotheses):
        return verdict
    finding = replace(told([Match(h, True) for h in kept], (), calls), exact=True, hedged=False)
    return replace(verdict, finding=finding, hypotheses=tuple(kept))
