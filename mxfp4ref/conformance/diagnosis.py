"""What is wrong, from the bits alone: where, since which stage, and which named defect predicts exactly this."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mxfp4ref.conformance.comparison import FAR, Difference, differing, first_difference, ulp_distance
from mxfp4ref.conformance.finding import Finding
from mxfp4ref.conformance.patterns import patterns
from mxfp4ref.conformance.reduction import local_experts, one_token
from mxfp4ref.conformance.stage_fit import numbers, reconcile
from mxfp4ref.conformance.stage_words import finding_of_stage
from mxfp4ref.conformance.suspects import Prediction, Progress, Verdict, closest, predict, try_defects
from mxfp4ref.defects import DEFECTS
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import MoeTrace, trace
from mxfp4ref.sm90 import fp32

__all__ = ["Diagnosis", "Prediction", "diagnose", "predict"]

SECONDS = 90.0
_ULP_BINS = (1, 2, 4, 16, 256, FAR - 1)


@dataclass(frozen=True)
class Diagnosis:
    """Everything that can be said of one output that differs.

    Attributes:
        output: the name of the output.
        first: the first element that differs.
        feeds: the inputs that feed it, in words.
        patterns: what the places that differ have in common, in words.
        stage: the stage up to which the output can be reconciled with the trace, in words.
        predictions: the defects that predict the output exactly, or else up to three that come closest, with more of
            the wrong bits than chance gives (`suspects.NOISE`).
        ulps: elements by distance: (up to this many ulps, how many); the last with NaN.
        mask: where the output differs.
        finding: what is wrong for certain, where that is known.
    """

    output: str
    first: Difference
    feeds: tuple[str, ...]
    patterns: tuple[str, ...]
    stage: str
    predictions: tuple[Prediction, ...]
    ulps: tuple[tuple[int, int], ...]
    mask: Tensor
    finding: Finding | None = None

    @property
    def exact(self) -> tuple[str, ...]:
        """The defects that predict exactly these bits."""
        return tuple(p.name for p in self.predictions if p.exact)


def diagnose(
    kind: str,
    inputs: Any,
    outputs: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    *,
    suspects: Iterable[str] | None = None,
    seconds: float = SECONDS,
    progress: Progress | None = None,
) -> Diagnosis:
    """Say how and why `outputs` differ from `expected`; they have to.

    Args:
        kind: the golden case's kind.
        inputs: a `MoeCall` for kind "moe", else arguments by name.
        outputs: what the kernel gave, and any intermediates under the names of `MoeTrace`.
        expected: what it should have given.
        suspects: the defects to try; by default all. If none of them is exact all are tried.
        seconds: that the search for a named defect may take on a layer of real size, roughly; what was not
            tried by then is said in `patterns`.
        progress: called before each defect that is tried on a call, with its name and how many there are.

    Raises:
        TypeError, ValueError: an output is missing, or of another dtype or shape than expected, or all are equal.
    """
    missing = [n for n in expected if n not in outputs]
    if missing:
        raise ValueError(f"outputs: expected {', '.join(expected)}, got {', '.join(outputs) or 'none'}")
    name = next((n for n in expected if bool(differing(outputs[n], expected[n]).any())), None)
    if name is None:
        raise ValueError(
            "outputs: expected an element that differs from `expected`, got equal bits in all of them"
        )
    got, want = outputs[name], expected[name]
    mask = differing(got, want)
    first = first_difference(got, want)
    assert first is not None
    verdict = Verdict(())
    if not isinstance(inputs, MoeCall):
        names = (n for n, defect in DEFECTS.items() if defect.target == kind)
        found_by = (predict(inputs, outputs, expected, n) for n in names)
        verdict = Verdict(closest(p for p in found_by if p is not None))
    elif inputs.experts.quantized:
        verdict = try_defects(
            inputs, got, want, first=tuple(suspects or ()), seconds=seconds, progress=progress
        )
    feeds: tuple[str, ...] = ()
    found: tuple[str, ...] = ()
    stage = ""
    if isinstance(inputs, MoeCall):
        token = first.index[0]
        one = trace(one_token(inputs, token))
        feeds = _feeds(inputs, one, token, first.index[1])
        found = patterns(inputs, got, want, mask) + verdict.remarks
        stage = reconcile(inputs, outputs, mask)
    elif kind == "layout":
        found = (_layout_pattern(got, want, mask),)
    finding = finding_of_stage(kind, inputs, outputs, expected)
    found += (finding.sentence,) if finding is not None and finding.sentence else ()
    return Diagnosis(
        name, first, feeds, found, stage, verdict.predictions, _histogram(got, want, mask), mask, finding
    )


def _feeds(call: MoeCall, one: MoeTrace, token: int, column: int) -> tuple[str, ...]:
    """What goes into output element [token, column]."""
    x = fp32.widen(call.input[token])
    ids = call.token_selected_experts[token]
    local = local_experts(call)[token]
    lines = [
        f"input[{token}]: {int(torch.isfinite(x).sum()):,} of {x.numel():,} finite, "
        f"largest {float(x.nan_to_num(0, 0, 0).abs().max()):.6g}, starts {numbers(x[:4])}"
    ]
    for slot, (global_id, expert) in enumerate(zip(ids.tolist(), local.tolist(), strict=True)):
        scale = float(call.token_final_scales[token, slot])
        if expert < 0:
            lines.append(f"slot {slot}: id {global_id} is not on this rank or repeated, skipped")
            continue
        row = int((one.slot == slot).nonzero()[0])
        activation = fp32.widen(one.activation[row])
        bias = call.experts.fc2_biases
        words = (
            f", fc2 bias {float(bias[expert, column]):.9g}" if bias is not None and call.tp_rank == 0 else ""
        )
        lines.append(
            f"slot {slot}: expert {global_id}, weight {scale:.9g}, GEMM2 gives "
            f"{float(one.fc2_output[row, column]):.9g}{words}; activation starts {numbers(activation[:4])}"
        )
    return tuple(lines)


def _layout_pattern(got: Tensor, want: Tensor, mask: Tensor) -> str:
    same = torch.equal(got.flatten().sort().values, want.flatten().sort().values)
    kept = "the same bytes in another order" if same else "bytes that are not in the expected tensor"
    return f"{int(mask.sum()):,} of {mask.numel():,} bytes differ: {kept}"


def _histogram(got: Tensor, want: Tensor, mask: Tensor) -> tuple[tuple[int, int], ...]:
    distance = ulp_distance(got, want)[mask]
    bins, below = [], -1
    for top in (*_ULP_BINS, FAR):
        bins.append((top, int(((distance > below) & (distance <= top)).sum())))
        below = top
    return tuple(bins)
