"""Hypotheses that are few, most because the wrong places leave few of them: tried whatever the evidence says."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from torch import Tensor

from mxfp4ref.conformance.families.hypotheses.code_parts import scale_format_hypotheses
from mxfp4ref.conformance.families.hypotheses.memory_readings import route_readings, vector_readings
from mxfp4ref.conformance.families.hypotheses.misread import misread_hypotheses
from mxfp4ref.conformance.families.hypotheses.output_memory import memory_hypotheses
from mxfp4ref.conformance.families.hypotheses.outputs import input_factor_hypotheses
from mxfp4ref.conformance.families.hypotheses.row_offsets import count_hypotheses, offset_hypotheses
from mxfp4ref.conformance.families.hypotheses.tiles import tile_hypotheses
from mxfp4ref.conformance.families.hypothesis import Hypothesis
from mxfp4ref.conformance.findings.reduction import is_heavy
from mxfp4ref.model.call import MoeCall

__all__ = ["hypotheses_by_place"]


def hypotheses_by_place(call: MoeCall, wrong: Tensor) -> Iterator[Hypothesis]:
    """Those that fit what is wrong, `[M, H] bool`; of a call that is heavy, without those of rows among others."""
    yield from chain(
        misread_hypotheses(call),
        vector_readings(call),
        memory_hypotheses(call),
        input_factor_hypotheses(),
        scale_format_hypotheses(call),
    )
    if not is_heavy(call):
        tokens = wrong.any(1)
        yield from chain(
            offset_hypotheses(call, tokens),
            count_hypotheses(call, tokens),
            route_readings(call, tokens),
            tile_hypotheses(call, wrong),
        )
