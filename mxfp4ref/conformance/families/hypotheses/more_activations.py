"""Hypotheses on the activation: roundings inside the sigmoid, a clamp of the result, tables that are misread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mxfp4ref.conformance.families.hypotheses.activation_steps import activation_hypothesis
from mxfp4ref.conformance.families.hypotheses.activations import clamps
from mxfp4ref.conformance.families.hypotheses.formula_parts import formula_part_hypotheses
from mxfp4ref.conformance.families.hypotheses.tensors import mapped
from mxfp4ref.conformance.families.hypothesis import Change, Hypothesis, Pipeline
from mxfp4ref.defects.variants.swiglu import Operands, SwigluVariant
from mxfp4ref.model.call import MoeCall
from mxfp4ref.sm90 import fp32
from mxfp4ref.sm90.activation import SWIGLU, SWIGLU_BIAS

__all__ = ["more_activations"]

_TYPES = ((torch.bfloat16, "bf16"), (torch.float16, "float16"))
_STEPS = (  # that are rounded together: of the argument, e^-x, 1 + e^-x and the reciprocal
    *(("e^-x",), ("1 + e^-x",), ("e^-x", "1 + e^-x"), ("x", "e^-x")),
    *(("1 + e^-x", "1 / (1 + e^-x)"), ("e^-x", "1 + e^-x", "1 / (1 + e^-x)")),
)
_MOST = {  # numbers that an activation may be clamped to
    448.0: ", the largest of FP8 E4M3",
    57344.0: ", the largest of FP8 E5M2",
    240.0: ", the largest of FP8 E4M3 FNUZ",
    65504.0: ", the largest of float16",
    6.0: ", the largest of FP4 E2M1",
    7.0: "",
    127.0: ", the largest of int8",
    128.0: "",
    256.0: "",
    32768.0: "",
}
_TABLES = ("swiglu_alpha", "swiglu_beta", "swiglu_limit", "fc1_biases", "fc2_biases")
_BEYOND: tuple[tuple[str, Callable[[Tensor, int], Tensor]], ...] = (
    ("zero", lambda t, n: torch.zeros_like(t[n:])),
    ("Inf", lambda t, n: torch.full_like(t[n:], torch.inf)),
    ("one", lambda t, n: torch.ones_like(t[n:])),
    ("those of the last one before", lambda t, n: t[n - 1 : n].expand_as(t[n:])),
)


def more_activations(call: MoeCall) -> Iterator[Hypothesis]:
    """Those that can show on a call, of which another one's numbers are."""
    yield from _saturated()
    yield from _short_tables(call)
    yield from formula_part_hypotheses(call)
    if call.activation.id not in (SWIGLU, SWIGLU_BIAS):
        return
    yield from _of_bias_and_clamp(call)
    for steps in _STEPS:
        for dtype, name in _TYPES:
            for divided in (True, False):
                sigmoid = _Sigmoid(steps, dtype, divided)
                how = "gate / (1 + e^-x)" if divided else "gate times 1 / (1 + e^-x)"
                words = (
                    f"{' and '.join(steps)} {'is' if len(steps) == 1 else 'are'} rounded to {name} in the sigmoid, "
                    f"computed as {how}"
                )
                yield activation_hypothesis(words, SwigluVariant(product=sigmoid), 1.1 + 0.1 * len(steps))


def _of_bias_and_clamp(call: MoeCall) -> Iterator[Hypothesis]:
    """Another fc1 bias and another clamp at once."""
    if call.experts.fc1_biases is None or call.experts.swiglu_limit is None:
        return
    biases: tuple[tuple[str, Callable[[Tensor], Tensor]], ...] = (
        (
            "fc1's bias of gate is added to up and the other way round (its halves are not exchanged)",
            lambda t: t.roll(t.shape[1] // 2, 1),
        ),
        ("fc1's bias is left out", torch.zeros_like),
        ("fc1's bias is doubled", lambda t: t * 2),
    )
    for words, change in biases:
        biased = mapped(("fc1_biases",), lambda _, t, c=change: c(t))
        for how, clamp, cost in clamps():

            def on(pipeline: Pipeline, biased: Change = biased, clamp: Any = clamp) -> Pipeline:
                return biased(pipeline).staging(activate=SwigluVariant(clamp=clamp))

            how = how.replace("neither is clamped", "up and gate are not clamped to the limit")
            yield Hypothesis(
                "activation", ("activation", "fc1"), f"two things: {words}; and {how}", on, cost + 3
            )


@dataclass(frozen=True)
class _Sigmoid:
    """silu(gate) (up + beta) with these steps of the sigmoid rounded; what is not finite is left out."""

    steps: tuple[str, ...]
    dtype: torch.dtype
    divided: bool

    def __call__(self, x: Operands) -> Tensor:
        power = self._step("e^-x", torch.exp(-self._step("x", x.scaled)))
        total = self._step("1 + e^-x", 1 + power)
        if self.divided and "1 / (1 + e^-x)" not in self.steps:
            silu = x.gate / total
        else:
            silu = fp32.mul(x.gate, self._step("1 / (1 + e^-x)", 1 / total))
        right = fp32.mul(fp32.mul(x.gate, x.sigmoid), x.shifted)
        return torch.where(x.scaled.isfinite() & x.up.isfinite(), fp32.mul(silu, x.shifted), right)

    def _step(self, name: str, value: Tensor) -> Tensor:
        return value.to(self.dtype).to(torch.float32) if name in self.steps else value


def _saturated() -> Iterator[Hypothesis]:
    for most, what in _MOST.items():
        for low, words in ((-most, f"[-{most:g}, {most:g}]"), (-torch.inf, f"at most {most:g}")):
            yield Hypothesis(
                "activation",
                ("activation",),
                f"the activation, GEMM2's input, is clamped to {words}{what}",
                lambda p, lo=low, hi=most: p.before("round_activation", lambda t: t.clamp(lo, hi)),
                1.1 + 0.3 * (low != -most),
            )


def _short_tables(call: MoeCall) -> Iterator[Hypothesis]:
    """Parameters and biases given for the first experts only."""
    for name in _TABLES:
        if getattr(call.experts, name) is None:
            continue
        what = f"the SwiGLU {name[7:]}" if name.startswith("swiglu") else f"{name[:3]}'s bias"
        stage = {"fc1_biases": ("fc1", "activation"), "fc2_biases": ("finalize", "fc2")}.get(
            name, ("activation",)
        )
        for count in (1, 2, 4, 8, 16, 32, 64):
            if count >= call.experts.num_experts:
                break
            given = "the first expert only" if count == 1 else f"the first {count} experts only"
            for words, beyond in _BEYOND:
                if words == "Inf" and name != "swiglu_limit":
                    continue
                yield Hypothesis(
                    "values",
                    stage,
                    f"{what} is given for {given}; for all others, beyond it, it is {words}, as of a tensor "
                    "that is too short",
                    mapped((name,), lambda _, t, n=count, b=beyond: torch.cat((t[:n], b(t, n)))),
                    1.2 + 0.1 * (count > 1),
                )
