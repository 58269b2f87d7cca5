"""The intermediates that a kernel returned: the first that differs from the right one shows the stage by itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from mxfp4ref.conformance.comparison import differing, first_difference
from mxfp4ref.conformance.families.places import named_columns, residue_in_words
from mxfp4ref.conformance.findings.finding import STAGES, Finding, counted
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import trace

__all__ = ["Exposed", "exposed", "with_exposed"]

_STAGE_OF = {"fc1_output": "fc1", "activation": "activation", "fc2_output": "fc2"}


@dataclass(frozen=True)
class Exposed:
    """What intermediates show of one call.

    Attributes:
        stage: the first whose result differs; the one after those that are right.
        name: of that result, as in `MoeTrace`; "" where all that were returned are right.
        columns: which of its columns differ, in words; "" without any.
        words: all of it, as a sentence.
    """

    stage: str
    name: str
    columns: str
    words: str


def exposed(call: MoeCall, outputs: Mapping[str, Tensor]) -> Exposed | None:
    """What the intermediates among these outputs show; None where there are none, or all of some stages are right."""
    names = [name for name in _STAGE_OF if name in outputs]
    if not names:
        return None
    right = trace(call)
    for name in names:
        got, want = outputs[name], getattr(right, name)
        if got.shape != want.shape or got.dtype != want.dtype:
            words = f"{name}: expected {want.dtype} {list(want.shape)}, got {got.dtype} {list(got.shape)}"
            return Exposed(_STAGE_OF[name], name, "", words)
        difference = first_difference(got, want)
        if difference is None:
            continue
        wrong = differing(got, want)
        columns, row = _columns(wrong.any(0)), difference.index[0]
        words = (
            f"{name} is the first stage that differs, in {int(wrong.sum()):,} of {want.numel():,} elements{columns}; "
            f"{difference}; row {row} is token {int(right.token[row])}, slot {int(right.slot[row])}"
        )
        return Exposed(_STAGE_OF[name], name, columns, words)
    return Exposed("finalize", "", "", f"finalize: {', '.join(names)} agree in all bits")


def _columns(wrong: Tensor) -> str:
    named = named_columns(wrong)
    words = residue_in_words(wrong) or (named[0] if named else "")
    return f", {words} only" if words and not bool(wrong.all()) else ""


def with_exposed(finding: Finding, cases: Iterable[tuple[MoeCall, Mapping[str, Tensor]]]) -> Finding:
    """The finding; where it predicts no bits, what the intermediates of these cases show, if they were returned."""
    if finding.exact or finding.cases:
        return finding
    shown = [one for call, outputs in cases if (one := exposed(call, outputs)) is not None]
    if not shown:
        return finding
    first = min(shown, key=lambda one: STAGES.index(one.stage))
    same = [one for one in shown if (one.stage, one.name) == (first.stage, first.name)]
    columns, often = Counter(one.columns for one in same).most_common(1)[0]
    told = columns if 2 * often > len(same) else ""
    of = f" in {len(same)} of {counted(len(shown), 'case')}" if len(shown) > 1 else ""
    sentence = f"{first.name} is the first stage that differs{of}{told}" if first.name else first.words
    sentence = first.words if len(shown) == 1 else sentence
    return replace(finding, stages=(first.stage,), sentence=sentence, kind="", common="", hedged=False)
