"""The hypotheses of what is wrong with a call's output: which are tried, and for how long."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mxfp4ref._default_device import on_cpu
from mxfp4ref.conformance.families.engine import prepared
from mxfp4ref.conformance.families.hypothesis import Finding, Hypothesis
from mxfp4ref.conformance.families.named import named_hypotheses
from mxfp4ref.conformance.families.nan_bits import investigated
from mxfp4ref.conformance.families.probe import probed
from mxfp4ref.conformance.findings.finding import Evidence
from mxfp4ref.conformance.findings.guarded import listening
from mxfp4ref.conformance.findings.reduction import clock_of, is_heavy
from mxfp4ref.conformance.findings.suspects import Prediction, Progress, named_finding, try_defects
from mxfp4ref.model.call import MoeCall

__all__ = ["REAL_SECONDS", "SECONDS", "HowToLook", "Known", "is_large", "look"]

# Of the processor: for hypotheses, and on a layer of real size for the named defects and hypotheses together.
SECONDS = {"quick": 0.7, "full": 40.0}
REAL_SECONDS = {"quick": 4.0, "full": 60.0}
_QUICK_ELEMENTS = 1 << 18  # of an output: solving for what is in a larger one takes minutes
Known = tuple[tuple[Prediction, ...], Finding, tuple[str, ...]]  # named defects, finding, remarks


def is_large(inputs: Any, got: Tensor) -> bool:
    """Whether solving for what is in an output takes longer than a quick diagnosis may."""
    return got.numel() > _QUICK_ELEMENTS or (isinstance(inputs, MoeCall) and is_heavy(inputs))


@dataclass(frozen=True)
class HowToLook:
    """How to look for what is wrong, as in `diagnose`.

    With a `limit` of 0 no named defects are tried on a layer of real size but those that are suspected.

    `known` is the stage of an intermediate that differs, `outside` where the output leaves its bounds, in mode
    bounded.
    """

    suspects: tuple[str | Hypothesis, ...]
    diagnosis: str
    seconds: float
    limit: float
    progress: Progress | None
    known: Evidence | None
    found: list[Hypothesis]
    outside: Tensor | None = None


def look(call: MoeCall, got: Tensor, want: Tensor, how: HowToLook) -> Known:
    """The named defects that predict it, the finding, and remarks."""
    part = probed(call, got, want)
    if part is None:
        return (), Finding(), ("no token gives its expected row alone, so that no hypothesis can be tried",)
    seconds, clock = how.seconds, clock_of(call)
    first_names = tuple(s for s in how.suspects if isinstance(s, str))
    # Each is confirmed on more tokens than the families are; of zeros nothing is, unless it is known already.
    if is_heavy(call) and (first_names or (how.limit > 0 and bool(got.any()))):
        limit, start = how.limit, clock()
        verdict = try_defects(call, got, want, first=first_names, seconds=limit, progress=how.progress)
        seconds = min(seconds, limit - (clock() - start))
        found = {p.name for p in verdict.predictions if p.exact}
        if found and (bool(got.any()) or found & set(first_names)):
            return verdict.predictions, named_finding(verdict.predictions), verdict.remarks
    if how.diagnosis == "quick" and is_large(call, got):
        return (), Finding(), ("too large for a quick diagnosis",)
    small, rows_got, rows_want, note = part
    first = [h for h in named_hypotheses(small) if h.name in first_names]
    failed: dict[str, None] = {}
    with on_cpu(), listening(failed):
        result = investigated(
            prepared(small),
            rows_got,
            rows_want,
            seconds=seconds,
            first=[*first, *(s for s in how.suspects if isinstance(s, Hypothesis))],
            thorough=how.diagnosis == "full",
            known=how.known,
            progress=how.progress,
            outside=how.outside if small is call else None,
        )
    # What places say is no more than a hint where every bit is predicted, and may say something else.
    hints = () if result.finding.exact else result.evidence
    remarks = [e.sentence for e in hints if e.sentence != result.finding.sentence]
    if not result.complete and how.diagnosis == "full":
        remarks.append(f"hypotheses were tried as long as there was time, {result.tried:,} of them")
    how.found.extend(m.hypothesis for m in result.matches if m.exact)
    exact = (h.name for h in how.found if h.name)
    predictions = tuple(Prediction(name, 1.0, True) for name in dict.fromkeys(exact))
    return predictions, result.finding, (*remarks, *note, *failed)
