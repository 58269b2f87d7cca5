"""What is wrong, from the bits alone: where, since which stage, and which named defect predicts exactly this."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mxfp4ref.conformance.comparison import FAR, Difference, differing, first_difference, ulp_distance
from mxfp4ref.conformance.patterns import patterns
from mxfp4ref.conformance.reduction import is_heavy, local_experts, one_token, reduce_call
from mxfp4ref.conformance.stage_fit import numbers, reconcile
from mxfp4ref.conformance.stand_ins import defect_outputs
from mxfp4ref.defects import DEFECTS
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import MoeTrace, trace
from mxfp4ref.sm90 import fp32

__all__ = ["Diagnosis", "Prediction", "diagnose", "predict"]

_TOKENS = 8  # of a call on which defects are ranked
_MOST_LISTED = 3
_ULP_BINS = (1, 2, 4, 16, 256, FAR - 1)


@dataclass(frozen=True)
class Prediction:
    """How well a named defect predicts what came.

    Attributes:
        name: of `mxfp4ref.defects`.
        fraction: of the elements in which kernel or defect differ from the expected output, how many agree
            with each other in all bits.
        exact: whether all do.
    """

    name: str
    fraction: float
    exact: bool


@dataclass(frozen=True)
class Diagnosis:
    """Everything that can be said of one output that differs.

    Attributes:
        output: the name of the output.
        first: the first element that differs.
        feeds: the inputs that feed it, in words.
        patterns: what the places that differ have in common, in words.
        stage: the stage up to which the output can be reconciled with the trace, in words.
        predictions: the defects that predict the output exactly, or else the three that come closest.
        ulps: elements by distance: (up to this many ulps, how many); the last with NaN.
        mask: where the output differs.
    """

    output: str
    first: Difference
    feeds: tuple[str, ...]
    patterns: tuple[str, ...]
    stage: str
    predictions: tuple[Prediction, ...]
    ulps: tuple[tuple[int, int], ...]
    mask: Tensor

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
) -> Diagnosis:
    """Say how and why `outputs` differ from `expected`; they have to.

    Args:
        kind: the golden case's kind.
        inputs: a `MoeCall` for kind "moe", else arguments by name.
        outputs: what the kernel gave, and any intermediates under the names of `MoeTrace`.
        expected: what it should have given.
        suspects: the defects to try; by default all. If none of them is exact all are tried, unless the
            experts are too large for that.

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
    predictions = _predictions(kind, inputs, outputs, expected, suspects)
    feeds: tuple[str, ...] = ()
    found: tuple[str, ...] = ()
    stage = ""
    if isinstance(inputs, MoeCall):
        token = first.index[0]
        one = trace(one_token(inputs, token))
        feeds = _feeds(inputs, one, token, first.index[1])
        found = patterns(inputs, got, want, mask)
        stage = reconcile(inputs, outputs, mask)
        if not predictions and is_heavy(inputs):
            found += ("named defects were not tried on a layer of this size: run the small cases too",)
    elif kind == "layout":
        found = (_layout_pattern(got, want, mask),)
    return Diagnosis(name, first, feeds, found, stage, predictions, _histogram(got, want, mask), mask)


def predict(
    inputs: Any, outputs: Mapping[str, Tensor], expected: Mapping[str, Tensor], name: str
) -> Prediction | None:
    """How well the defect `name` predicts the outputs; None if it cannot show on these inputs."""
    predicted = defect_outputs(DEFECTS[name], inputs)
    if predicted is None:
        return None
    agreeing = concerned = 0
    for key, want in expected.items():
        guess = predicted[key]
        if guess.dtype != want.dtype:
            return None  # a case of dequantisation to another dtype than the defects'
        concern = differing(outputs[key], want) | differing(guess, want)
        concerned += int(concern.sum())
        agreeing += int((concern & ~differing(outputs[key], guess)).sum())
    return Prediction(name, agreeing / max(concerned, 1), agreeing == concerned)


def _predictions(
    kind: str,
    inputs: Any,
    outputs: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    suspects: Iterable[str] | None,
) -> tuple[Prediction, ...]:
    """The exact defects; if there are none, those that come closest."""
    names = [n for n, defect in DEFECTS.items() if defect.target == kind]
    if not isinstance(inputs, MoeCall):
        return _ranked(p for name in names if (p := predict(inputs, outputs, expected, name)) is not None)
    heavy = is_heavy(inputs)
    wrong = differing(outputs["output"], expected["output"])
    worst = wrong.sum(1).argsort(descending=True, stable=True)

    def on_tokens(count: int, name: str) -> Prediction | None:
        tokens = worst[:count].sort().values
        got, want = ({"output": tensors["output"][tokens]} for tensors in (outputs, expected))
        return predict(reduce_call(inputs, tokens, neighbours=True), got, want, name)

    def is_exact(name: str) -> bool:
        """On the worst token, and if that is so on all of them."""
        if (one := on_tokens(1, name)) is None or not one.exact:
            return False
        whole = predict(inputs, outputs, expected, name) if not heavy else one
        return whole is not None and whole.exact

    for candidates in (list(suspects or ()), [] if heavy else names):
        exact = [name for name in candidates if name in names and is_exact(name)]
        if exact:
            return tuple(Prediction(name, 1.0, True) for name in exact)
    if heavy:
        return ()
    return _ranked(p for name in names if (p := on_tokens(_TOKENS, name)) is not None)


def _ranked(predictions: Iterable[Prediction]) -> tuple[Prediction, ...]:
    ranked = sorted(predictions, key=lambda p: (not p.exact, -p.fraction))
    exact = [p for p in ranked if p.exact]
    return tuple(exact or [p for p in ranked if p.fraction > 0][:_MOST_LISTED])


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
