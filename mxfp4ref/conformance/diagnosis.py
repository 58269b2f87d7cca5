"""What is wrong, from the bits alone: where, since which stage, and which named defect predicts exactly this."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mxfp4ref.conformance.bounds import bound
from mxfp4ref.conformance.comparison import FAR, Difference, differing, first_difference, ulp_distance
from mxfp4ref.conformance.kernels import defect_outputs
from mxfp4ref.conformance.patterns import patterns
from mxfp4ref.defects import DEFECTS
from mxfp4ref.formats.mxfp4 import dequantize
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import MoeTrace, select_local, trace
from mxfp4ref.sm90 import fp32

__all__ = ["Diagnosis", "Prediction", "diagnose", "is_heavy", "predict", "reduce_call"]

_TOKENS = 8  # of a call on which defects are ranked
_EXPERT_BYTES = 1 << 25  # beyond which only defects that other cases have named are tried
_MOST_LISTED = 3
_STAGES = ("fc1_output", "activation", "fc2_output")
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
    """
    name = next(n for n in expected if bool(differing(outputs[n], expected[n]).any()))
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
        one = trace(_one_token(inputs, token))
        feeds = _feeds(inputs, one, token, first.index[1])
        found = patterns(inputs, got, want, mask)
        stage = _reconcile(inputs, outputs, want, mask)
        if not predictions and is_heavy(inputs):
            found += ("named defects were not tried on a layer of this size: run the small cases too",)
    elif kind == "layout":
        found = (_layout_pattern(got, want, mask),)
    return Diagnosis(name, first, feeds, found, stage, predictions, _histogram(got, want, mask), mask)


def predict(
    inputs: Any, outputs: Mapping[str, Tensor], expected: Mapping[str, Tensor], name: str
) -> Prediction | None:
    """How well the defect `name` predicts the outputs; None if it cannot be run on these inputs or cannot show."""
    try:
        predicted = defect_outputs(DEFECTS[name], inputs)
    except (ValueError, RuntimeError, IndexError):
        return None  # the defect is not defined on this shape
    if predicted is None:
        return None
    agreeing = concerned = 0
    for key, want in expected.items():
        guess = predicted[key]
        if guess.shape != want.shape or guess.dtype != want.dtype:
            return None
        concern = differing(outputs[key], want) | differing(guess, want)
        concerned += int(concern.sum())
        agreeing += int((concern & ~differing(outputs[key], guess)).sum())
    return Prediction(name, agreeing / max(concerned, 1), agreeing == concerned)


def reduce_call(call: MoeCall, tokens: Tensor, *, neighbours: bool = False) -> MoeCall:
    """The call for some of its tokens, `[T] int64`; without expert parallelism, with the experts they use.

    With `neighbours` the next expert of each is kept too, and the first and the last of all: what a defect may
    take for the right one.
    """
    ids = call.token_selected_experts[tokens]
    experts = call.experts
    if call.ep_size == 1:
        local = select_local(ids, experts.num_experts, 1, 0)
        kept = torch.unique(local[local >= 0])
        if neighbours or len(kept) == 0:
            last = experts.num_experts - 1
            ends = torch.tensor([0, last], device=kept.device)
            kept = torch.unique(torch.cat((kept, (kept + 1).clamp(max=last), ends)))
        position = torch.searchsorted(kept, ids.clamp(min=0).to(torch.int64)).clamp(max=len(kept) - 1)
        inside = (ids >= 0) & (ids < experts.num_experts)
        ids = torch.where(inside, position.to(torch.int32), torch.where(ids < 0, ids, len(kept)))
        experts = experts.select(kept) if len(kept) < experts.num_experts else experts
    return replace(
        call,
        input=call.input[tokens],
        token_selected_experts=ids,
        token_final_scales=call.token_final_scales[tokens],
        experts=experts,
    )


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

    heavy = is_heavy(inputs)
    for candidates in (list(suspects or ()), [] if heavy else names):
        exact = [name for name in candidates if name in names and is_exact(name)]
        if exact:
            return tuple(Prediction(name, 1.0, True) for name in exact)
    if heavy:
        return ()
    return _ranked(p for name in names if (p := on_tokens(_TOKENS, name)) is not None)


def is_heavy(call: MoeCall) -> bool:
    """Whether a call is too large to try all defects on: even one token's experts are."""
    experts = call.experts
    return min(experts.num_experts, call.top_k + 1) * experts.fc1_weights[0].nbytes > _EXPERT_BYTES


def _ranked(predictions: Iterable[Prediction]) -> tuple[Prediction, ...]:
    ranked = sorted(predictions, key=lambda p: (not p.exact, -p.fraction))
    exact = [p for p in ranked if p.exact]
    return tuple(exact or [p for p in ranked if p.fraction > 0][:_MOST_LISTED])


def _one_token(call: MoeCall, token: int) -> MoeCall:
    return reduce_call(call, torch.tensor([token], device=call.input.device))


def _feeds(call: MoeCall, one: MoeTrace, token: int, column: int) -> tuple[str, ...]:
    """What goes into output element [token, column]."""
    x = fp32.widen(call.input[token])
    ids = call.token_selected_experts[token]
    local = select_local(ids[None], call.experts.num_experts, call.ep_size, call.ep_rank)[0]
    lines = [
        f"input[{token}]: {int(torch.isfinite(x).sum()):,} of {x.numel():,} finite, "
        f"largest {float(x.nan_to_num(0, 0, 0).abs().max()):.6g}, starts {_numbers(x[:4])}"
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
            f"{float(one.fc2_output[row, column]):.9g}{words}; activation starts {_numbers(activation[:4])}"
        )
    return tuple(lines)


def _reconcile(call: MoeCall, outputs: Mapping[str, Tensor], expected: Tensor, mask: Tensor) -> str:
    """The latest stage up to which the kernel and the trace agree, as far as can be told."""
    exposed = [name for name in _STAGES if name in outputs]
    if exposed:
        return _exposed(call, outputs, exposed)
    if not call.experts.quantized:
        return ""
    inside = bound(call).contains(outputs["output"])
    if bool(inside.all()):
        return (
            "rounding: every element lies within the interval of all correct evaluations, so the kernel sums or "
            "rounds in another way than the SM90 kernel, or is wrong by less than that"
        )
    outside = int((~inside).sum())
    fitted = _fit_finalize(call, outputs["output"], mask)
    if fitted:
        return fitted
    return (
        f"before finalize: {outside:,} elements lie outside the interval of all correct evaluations, and other "
        "weights for the right expert outputs do not explain it" + _fit_gemm2(call, outputs["output"], mask)
    )


def _exposed(call: MoeCall, outputs: Mapping[str, Tensor], names: list[str]) -> str:
    right = trace(call)
    for name in names:
        want = getattr(right, name)
        got = outputs[name]
        if got.shape != want.shape or got.dtype != want.dtype:
            return f"{name}: expected {want.dtype} {list(want.shape)}, got {got.dtype} {list(got.shape)}"
        difference = first_difference(got, want)
        if difference is not None:
            count = int(differing(got, want).sum())
            row = difference.index[0]
            return (
                f"{name} is the first stage that differs, in {count:,} of {want.numel():,} elements; {difference}; "
                f"row {row} is token {int(right.token[row])}, slot {int(right.slot[row])}"
            )
    return f"finalize: {', '.join(names)} agree in all bits"


def _fit_finalize(call: MoeCall, output: Tensor, mask: Tensor) -> str:
    """Whether the output is a sum of the right expert outputs with other weights."""
    for token in mask.any(1).nonzero().flatten().tolist()[:4]:
        one = trace(_one_token(call, token))
        y = fp32.widen(one.fc2_output).to(torch.float64)
        local = select_local(
            call.token_selected_experts[token][None], call.experts.num_experts, call.ep_size, call.ep_rank
        )[0]
        if call.experts.fc2_biases is not None and call.tp_rank == 0:
            y = y + fp32.widen(call.experts.fc2_biases[local[one.slot]]).to(torch.float64)
        target = fp32.widen(output[token]).to(torch.float64)
        if len(y) == 0 or not bool(torch.isfinite(y).all() & torch.isfinite(target).all()):
            continue
        order = one.slot.argsort()
        y, slots = y[order], one.slot[order]
        weights = torch.linalg.lstsq(y.T, target[:, None], driver="gelsd").solution[:, 0]
        rest = float((target - weights @ y).norm() / target.norm().clamp(min=1e-30))
        if rest > 2.0**-8:
            return ""
        asked = call.token_final_scales[token, slots]
        if bool(((weights - asked).abs() <= 2.0**-7 * asked.abs()).all()):
            return ""  # the weights are right, and what is wrong is too little to show here
        return (
            f"finalize: token {token} is the sum of the right expert outputs with weights {_numbers(weights)}, where "
            f"{_numbers(asked)} were asked for: GEMM1, activation and GEMM2 are right"
        )
    return ""


def _fit_gemm2(call: MoeCall, output: Tensor, mask: Tensor) -> str:
    """For a token with one expert: whether the output is GEMM2 of another activation."""
    local = select_local(call.token_selected_experts, call.experts.num_experts, call.ep_size, call.ep_rank)
    single = mask.any(1) & ((local >= 0).sum(1) == 1)
    if call.experts.intermediate_size > call.experts.hidden_size or not bool(single.any()):
        return ""
    token = int(single.nonzero()[0])
    slot = int((local[token] >= 0).nonzero()[0])
    some = call.experts.select(local[token, slot][None])
    assert some.fc2_scales is not None
    weights = dequantize(some.fc2_weights[0], some.fc2_scales[0], convention="sm90", dtype=torch.float32)
    weights = weights.to(torch.float64)
    y = fp32.widen(output[token]).to(torch.float64) / float(call.token_final_scales[token, slot])
    if some.fc2_biases is not None and call.tp_rank == 0:
        y = y - fp32.widen(some.fc2_biases[0]).to(torch.float64)
    if not bool(torch.isfinite(y).all() & torch.isfinite(weights).all()):
        return ""
    solution = torch.linalg.lstsq(weights, y[:, None], driver="gelsd").solution[:, 0]
    rest = float((y - weights @ solution).norm() / y.norm().clamp(min=1e-30))
    # With as many unknowns as equations anything can be fitted.
    if call.experts.intermediate_size * 2 > call.experts.hidden_size or rest > 2.0**-6:
        return f"; GEMM2's weights or scales, or what comes before (token {token})"
    right = fp32.widen(trace(_one_token(call, token)).activation[0]).to(torch.float64)
    wrong = ((solution - right).abs() > 0.05 * right.abs().max()).nonzero().flatten().tolist()
    shown = f"; {len(wrong)} of {len(right)} activation columns are off, first {wrong[:4]}" if wrong else ""
    return f"; it is GEMM2 of another activation (token {token}): GEMM1 or the activation is wrong{shown}"


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


def _numbers(values: Tensor) -> str:
    return "[" + ", ".join(f"{value:.6g}" for value in values.tolist()) + "]"
