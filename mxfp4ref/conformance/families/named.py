"""The named defects as hypotheses: points of families that have a name, a story and a thread."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from mxfp4ref.conformance.families.hypothesis import Hypothesis, Pipeline, fields_set
from mxfp4ref.conformance.families.named_stages import stages_of
from mxfp4ref.defects import DEFECTS, Defect, gemm
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import KERNEL

__all__ = ["NUMBER_OF_NAMES", "named_hypotheses"]

NUMBER_OF_NAMES = sum(defect.target == "moe" for defect in DEFECTS.values())


def named_hypotheses(call: MoeCall) -> Iterator[Hypothesis]:
    """All that can show on the call, the quick ones first."""
    found = [d for d in DEFECTS.values() if d.target == "moe"]
    for defect in sorted(found, key=lambda d: _slow(d)):
        yield Hypothesis(
            "named",
            stages_of(defect.name),
            f"{defect.name}: {defect.summary}",
            lambda p, d=defect: _running(p, d),
            0.5,
            name=defect.name,
            slow=_slow(defect),
        )


def _slow(defect: Defect) -> bool:
    return defect.name in vars(gemm) or defect.name in ("act_kept_fp32", "minus_zero_kept")


def _running(pipeline: Pipeline, defect: Defect) -> Pipeline:
    if not defect.applies(pipeline.call):
        return pipeline
    pipeline.check_open()
    assert defect.change is not None
    call, stages = defect.change(pipeline.call)
    return replace(pipeline, call=call).staging(**fields_set(KERNEL, stages))
