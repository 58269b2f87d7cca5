"""Tables of other experts' tensors that were solved for each case, where no rule gives those of all."""

from __future__ import annotations

from collections.abc import Sequence

from mxfp4ref.conformance.comparison import differing
from mxfp4ref.conformance.families.batches import one_thread
from mxfp4ref.conformance.families.hearing import Failure, Heard
from mxfp4ref.conformance.families.hypothesis import Finding
from mxfp4ref.conformance.families.solved.whose import whose_table
from mxfp4ref.conformance.findings.reduction import thread_clock

__all__ = ["tables_by_case"]

_READ = 12  # cases that are solved
_TOLD = 2  # that are named


def tables_by_case(failures: Sequence[Failure], heard: Sequence[Heard], until: float) -> Finding | None:
    """What to tell of all; None where no table was solved, or too few cases have one.

    Args:
        failures: the cases that fail.
        heard: the hypotheses that predict every bit of some, those of most cases first.
        until: `thread_clock()` from which no more cases are solved.
    """
    if (table := next((one.match.hypothesis for one in heard if one.match.hypothesis.table), None)) is None:
        return None
    by_rule = max((one.cases for one in heard if one.match.hypothesis.kind == table.kind), key=len)
    told = []
    with one_thread():
        for one in [f for f in failures if f.case not in by_rule][:_READ]:
            wrong, early = differing(one.got, one.want), thread_clock() < until
            if early and (words := whose_table(one.pipeline, one.got, wrong, table.kind)):
                told.append(f"in {one.case} {words}")
    count, total = len(by_rule) + len(told), len(failures)
    if not told or 2 * count < total:
        return None
    sentence = f"{table.kind}: {'; '.join(told[:_TOLD])}; ... ({count} of {total} failing cases)"
    cases = None if count == total else (count, total)
    return Finding(table.stages, sentence, count == total, cases, kind=table.kind)
