"""Steps of the activation in another order, rounded, or computed otherwise: by kernels that are on no list."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mxfp4ref import Experts, MoeCall, quantize
from mxfp4ref.conformance import differing
from mxfp4ref.conformance.families.engine import prepared
from mxfp4ref.conformance.families.hypotheses.activation_steps import step_hypotheses
from mxfp4ref.sm90 import fp32
from mxfp4ref.sm90.activation import sigmoid
from tests.held_out_kernels.by_hand import layer
from tests.helpers.usual import first

Maybe = Tensor | None


def call(*, parameters: bool, size: float = 1.0) -> MoeCall:
    random = torch.Generator().manual_seed(41)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    experts = Experts(*quantize(normal(2, 256, 128) * 0.2 * size), *quantize(normal(2, 128, 128) * 0.2))
    if parameters:
        experts = replace(
            experts,
            fc1_biases=normal(2, 256).bfloat16(),
            swiglu_alpha=torch.tensor([1.37, 0.81]),
            swiglu_beta=torch.tensor([0.29, -0.63]),
            swiglu_limit=torch.tensor([1.9, 2.3]),
        )
    ids = torch.tensor([[0, 1], [1, 0]] * 4, dtype=torch.int32)
    return MoeCall(normal(8, 128).bfloat16(), ids, torch.softmax(normal(8, 2), 1), experts)


def parts(fc1: Tensor, bias: Maybe, limit: Tensor) -> tuple[Tensor, Tensor]:
    up, gate = (fc1.float() + bias.float() if bias is not None else fc1.float()).chunk(2, -1)
    return up.clamp(min=-limit, max=limit), gate.clamp(max=limit)


def shifted_first(fc1: Tensor, bias: Maybe, alpha: Tensor, beta: Tensor, limit: Tensor) -> Tensor:
    up, gate = (fc1.float() + bias.float() if bias is not None else fc1.float()).chunk(2, -1)
    up, gate = (up + beta).clamp(min=-limit, max=limit), gate.clamp(max=limit)
    return gate * sigmoid(gate * alpha) * up


def silu_clamped(fc1: Tensor, bias: Maybe, alpha: Tensor, beta: Tensor, limit: Tensor) -> Tensor:
    up, _ = parts(fc1, bias, limit)
    gate = (fc1.float() + bias.float() if bias is not None else fc1.float()).chunk(2, -1)[1]
    return (gate * sigmoid(gate * alpha)).clamp(max=limit) * (up + beta)


def two_in_float16(fc1: Tensor, bias: Maybe, alpha: Tensor, beta: Tensor, limit: Tensor) -> Tensor:
    up, gate = parts(fc1, bias, limit)
    return gate * sigmoid((gate * alpha).half().float()) * (up + beta).half().float()


def bias_in_bf16(fc1: Tensor, bias: Tensor, alpha: Tensor, beta: Tensor, limit: Tensor) -> Tensor:
    up, gate = parts((fc1.float() + bias.float()).bfloat16(), None, limit)
    return gate * sigmoid(gate * alpha) * (up + beta)


@pytest.mark.parametrize(
    ("swiglu", "words"),
    first(
        1,
        [
            (shifted_first, "beta is added to up before the clamp to the limit, not after it"),
            (silu_clamped, "silu(gate) is clamped to the limit instead of gate"),
            (two_in_float16, "alpha gate and up + beta are rounded to float16"),
            (bias_in_bf16, "GEMM1's output plus bias is rounded to bf16"),
        ],
    ),
)
def test_steps_with_parameters(swiglu: Callable[..., Tensor], words: str) -> None:
    assert told(call(parameters=True), swiglu) == [f"in the activation {words}"]


def silu_in_bf16(fc1: Tensor, *_: Maybe) -> Tensor:
    up, gate = fc1.float().chunk(2, -1)
    return (gate * sigmoid(gate)).bfloat16().float() * up


def exponential_in_float16(fc1: Tensor, *_: Maybe) -> Tensor:
    up, gate = fc1.float().chunk(2, -1)
    return gate * (1 / (1 + (-gate).exp().half().float())) * up


def of_gpt_oss(fc1: Tensor, *_: Maybe) -> Tensor:
    up, gate = fc1.float().chunk(2, -1)
    return fp32.mul(fp32.mul(gate, sigmoid(gate * torch.tensor(1.702))), up + 1)


@pytest.mark.parametrize(
    ("swiglu", "words"),
    first(
        1,
        [
            (silu_in_bf16, "silu(gate) is rounded to bf16"),
            (exponential_in_float16, "e^-x is rounded to float16 in the sigmoid"),
            (of_gpt_oss, "alpha is 1.702, beta is 1 as of gpt-oss, where none are given"),
        ],
    ),
)
def test_steps_without_parameters(swiglu: Callable[..., Tensor], words: str) -> None:
    assert told(call(parameters=False), swiglu) == [f"in the activation {words}"]


def test_a_large_gate_is_nan() -> None:
    def run(fc1: Tensor, *_: Maybe) -> Tensor:
        up, gate = fc1.float().chunk(2, -1)
        return (gate * sigmoid(gate)).masked_fill(gate > 11.0898664, torch.nan) * up

    (words,) = told(call(parameters=False, size=1.4), run)
    assert "NaN of a large argument, above 11.09, of which e^x overflows float16" in words


def test_a_sigmoid_whose_argument_is_clamped() -> None:
    def run(fc1: Tensor, *_: Maybe) -> Tensor:
        up, gate = fc1.float().chunk(2, -1)
        return gate / (1 + torch.exp2((gate * -1.4426950408889634).clamp(-8, 8))) * up

    words = told(call(parameters=False, size=1.4), run)
    assert words == [
        "in the activation the argument of the sigmoid's exponential, as 2^-x, is kept within -8 and 8"
    ]


def told(one: MoeCall, swiglu: Callable[..., Tensor]) -> list[str]:
    """The hypotheses that predict what the kernel gives."""
    pipeline, got = prepared(one), layer(one, swiglu=swiglu)
    outputs = [(h.words, h.run(pipeline)) for h in step_hypotheses(one)]
    assert all(output is not None for _, output in outputs)
    assert differing(got, pipeline.run()).any()
    return [words for words, output in outputs if output is not None and not differing(output, got).any()]
