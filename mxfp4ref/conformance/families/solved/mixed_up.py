"""Whether some slots' rows are others that the same weights and inputs give: another expert's, another token's."""

from __future__ import annotations

import torch
from torch import Tensor

from mxfp4ref._words import shortened
from mxfp4ref.conformance.families.hypothesis import Pipeline, SlotRows
from mxfp4ref.conformance.families.sampled import Sample
from mxfp4ref.conformance.families.solved.row_sources import taken_evidence
from mxfp4ref.conformance.families.solved.solved_weights import in_common, powers_of
from mxfp4ref.conformance.families.solved.whose import whose_evidence
from mxfp4ref.conformance.findings.finding import Evidence
from mxfp4ref.sm90 import fp32

__all__ = ["mixed_up"]

_LOOKED_AT = 8  # tokens
_LOUD, _QUIET = 4.0, 1.6  # times the roundings: before, and when explained
_WEIGHTS = "the right rows are summed with other weights"


def mixed_up(pipeline: Pipeline, got: Tensor, wrong: Tensor, some: list[Sample]) -> Evidence | None:
    """What follows, if rows that are weighted otherwise, or are others, explain the errors up to the roundings."""
    loud = sorted((s for s in some if s.loudness > _LOUD), key=lambda s: -s.loudness / len(s.experts))
    loud = loud[:_LOOKED_AT]
    if not loud or len(loud[0].error) != pipeline.call.experts.hidden_size:
        return None
    if (found := _other_weights(pipeline, loud) or _other_biases(pipeline, loud)) is not None:
        return found
    given = pipeline, SlotRows.of(pipeline), got, wrong
    return whose_evidence(*given) or taken_evidence(*given)


def _other_weights(pipeline: Pipeline, loud: list[Sample]) -> Evidence | None:
    """Whether the rows are the right ones with other weights, and which, as far as the output determines them."""
    fitting = [(s, s.solved(pipeline.call)) for s in loud if s.loudness_of(s.rest) <= _QUIET]
    if 3 * len(fitting) < 2 * len(loud):
        return None
    told = [weights for _, weights in fitting if not weights.undetermined]
    if not told:
        weights = fitting[0][1]
        return Evidence(
            (),
            f"{_WEIGHTS}; those of experts {', '.join(map(str, weights.undetermined))} (token {weights.token}) "
            "cannot be told apart from this output",
            1,
            kind=_WEIGHTS,
        )
    if all(weights.left_out is not None for weights in told) and any(weights.left_out for weights in told):
        slots = [
            f"slot{'s' * (len(lost) > 1)} {', '.join(map(str, lost))} of token {weights.token}"
            for weights in told
            if (lost := weights.left_out)
        ]
        kind = "slots are left out of the sum, or GEMM2 gives zeros for their rows"
        return Evidence.of_kind(
            ("slots", "finalize"), kind, f"{shortened(slots, 4)}; the others are right", 4
        )
    by_expert: dict[int, list[float]] = {}
    for weights in told:
        for expert, asked, found in zip(weights.experts, weights.asked, weights.found, strict=True):
            if abs(asked) > 0.1:
                by_expert.setdefault(expert, []).append(found / asked)
    alike = all(max(r) - min(r) < 0.05 * abs(r[0]) + 0.02 for r in by_expert.values())
    power = powers_of(told)
    stages = ("finalize", "fc2") if alike or power else ("finalize",)
    shown = alike and not power and any(len(r) > 1 for r in by_expert.values())
    where = "; a factor of each expert, on GEMM2's scales or in the sum" if shown else ""
    factor = power or in_common(told)[0]
    details = f"{factor}{'; ' * bool(factor)}{'; '.join(map(str, told[:2]))}{where}"
    return Evidence.of_kind(stages, _WEIGHTS, details, 4)


def _other_biases(pipeline: Pipeline, loud: list[Sample]) -> Evidence | None:
    """Whether the errors are sums of the experts' fc2 biases."""
    call = pipeline.call
    if call.experts.fc2_biases is None or 4 * call.experts.num_experts > call.experts.hidden_size:
        return None
    biases = fp32.widen(call.experts.fc2_biases).double()
    told = []
    for s in loud:
        solution = torch.linalg.lstsq(biases.T, s.error[:, None], driver="gelsd").solution[:, 0]
        if s.loudness_of(s.error - solution @ biases) > _QUIET:
            continue
        asked = torch.zeros(len(biases), dtype=torch.float64).index_add_(0, s.experts, s.weights)
        asked *= call.tp_rank == 0
        told.append(f"token {s.token} has {_sum(solution + asked)}, asked was {_sum(asked)}")
    if 3 * len(told) < 2 * len(loud):
        return None
    kind = "the fc2 biases added are others by weight or expert"
    return Evidence.of_kind(("finalize", "fc2"), kind, "; ".join(told[:2]), 4)


def _sum(weights: Tensor) -> str:
    parts = [f"{w:.3g} x expert {e}'s bias" for e, w in enumerate(weights.tolist()) if abs(w) > 2e-2]
    return " + ".join(parts) or "none"
