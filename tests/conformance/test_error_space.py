"""Where errors come from, though no hypothesis fits: by the tokens' errors alone, and never of noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mxfp4ref.conformance.comparison import differing
from mxfp4ref.conformance.families.engine import prepared
from mxfp4ref.conformance.families.evidence import gather, look_closer
from mxfp4ref.goldens import open_goldens
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import KERNEL, Stages, forward
from mxfp4ref.sm90 import fp32
from tests.helpers import layers, usual

EXPERTS = layers.random_experts(7, num_experts=4, hidden=128, inner=128)
CALL = layers.random_call(7, EXPERTS, tokens=48, top_k=2)
PIPELINE = prepared(CALL)
EXPECTED = forward(CALL)


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def staged(call: MoeCall = CALL, **stages: object) -> Tensor:
    return forward(call, replace(Stages(), **stages))  # type: ignore[arg-type]


def overwritten(name: str) -> Tensor:
    weights = getattr(CALL.experts, name)
    other = torch.randint(
        0, 256, weights.shape, generator=torch.Generator().manual_seed(3), dtype=torch.uint8
    )
    return forward(replace(CALL, experts=replace(CALL.experts, **{name: other})))


def in_fp8(x: Tensor) -> Tensor:
    scale = x.float().abs().amax(-1, keepdim=True) / 448
    return fp32.to_bf16((x.float() / scale).to(torch.float8_e4m3fn).float() * scale)


def softplus_of_gate(_: object, x: Tensor, *rest: object) -> Tensor:
    up, gate = fp32.widen(x).chunk(2, -1)
    return torch.nn.functional.softplus(gate) * up


def second_slot_of_the_next_token(y: Tensor, *rest: Tensor | None) -> Tensor:
    return KERNEL.finalize(torch.stack((y[:, 0], y[:, 1].roll(-1, 0)), 1), *rest)  # type: ignore[arg-type]


KERNELS: dict[str, tuple[Callable[[], Tensor], set[str], str]] = {
    "another function": (lambda: staged(activate=softplus_of_gate), {"activation"}, "another function"),
    "other fc2": (lambda: overwritten("fc2_weights"), {"fc2"}, "GEMM2"),
    "activation in fp8": (lambda: staged(round_activation=in_fp8), {"activation"}, "in proportion"),
    "other rows": (
        lambda: staged(finalize=second_slot_of_the_next_token),
        {"slots", "finalize"},
        "other rows'",
    ),
    "other fc1": (lambda: overwritten("fc1_weights"), {"fc1"}, "GEMM1"),
    "input in fp8": (lambda: forward(replace(CALL, input=in_fp8(CALL.input))), {"fc1", "input"}, "GEMM1"),
}


def seen(got: Tensor) -> list[tuple[tuple[str, ...], str]]:
    wrong = differing(got, EXPECTED)
    found = look_closer(PIPELINE, got, wrong, gather(PIPELINE, got, EXPECTED, wrong))
    return [(e.stages, e.sentence) for e in found if e.stages]


@pytest.mark.parametrize("name", usual.first(1, KERNELS))
def test_the_stage_is_proved(name: str) -> None:
    kernel, stages, words = KERNELS[name]
    said, sentence = seen(kernel())[0]
    assert stages & set(said)
    assert len(said) <= 2
    assert words in sentence


def by_chance(x: Tensor) -> Tensor:
    """Up or down to bf16."""
    up = torch.randint(0, 1 << 16, x.shape, generator=torch.Generator().manual_seed(5), dtype=torch.int32)
    return ((x.contiguous().view(torch.int32) + up) >> 16).to(torch.int16).view(torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("stage", usual.first(1, ["round_activation", "round_fc2"]))
def test_the_stage_of_roundings_that_need_not_be_wrong(stage: str) -> None:
    experts = layers.random_experts(7, num_experts=4, hidden=256, inner=256)  # fewer columns tell too little
    call = layers.random_call(7, experts, tokens=24, top_k=2)
    got, want, pipeline = staged(call, **{stage: by_chance}), forward(call), prepared(call)
    wrong = differing(got, want)
    found = look_closer(pipeline, got, wrong, gather(pipeline, got, want, wrong))
    staged_ones = [e for e in found if e.stages]
    if stage == "round_fc2":
        assert staged_ones == []
        return
    (one,) = staged_ones
    assert one.stages == ("fc1", "activation")
    assert one.hedged
    assert "a rounding of GEMM1 or of the activation, or another order of GEMM1's sums" in one.sentence
    assert one.sentence.endswith("lies within the interval of all correct evaluations, and need not be wrong")


@pytest.mark.slow
@pytest.mark.parametrize("size", usual.first(1, [0.1, 0.01]))
def test_noise_has_no_stage(size: float) -> None:
    output = fp32.widen(EXPECTED)
    even, relative = (
        size * output.std() * random(1, *output.shape),
        size * output * random(2, *output.shape),
    )
    assert seen(fp32.to_bf16(output + even)) == []
    assert seen(fp32.to_bf16(output + relative)) == []


@pytest.mark.slow
def test_an_error_is_called_little_only_where_it_is_measured_to_be() -> None:
    """Whose place looks like that of a little error may be large: gate's scales, 32 rows too far on, are 66 % off."""
    call = open_goldens().load("parallel/expert_and_tensor_rank_1").call()
    scales = call.experts.fc1_scales
    assert scales is not None
    gate = scales.shape[1] // 2
    rows = torch.arange(gate, 2 * gate).add(32).clamp(max=2 * gate - 1)
    other = replace(call.experts, fc1_scales=torch.cat((scales[:, :gate], scales[:, rows]), 1))
    got, want = forward(replace(call, experts=other)), forward(call)
    wrong, pipeline = differing(got, want), prepared(call)
    (first,) = look_closer(pipeline, got, wrong, gather(pipeline, got, want, wrong))
    assert first.hedged
    single = ", or single elements of the activation are" * ("activation" in first.stages)
    assert f": GEMM1 or its input is wrong{single}; GEMM2" in first.sentence
    assert "by little beside its size, as by a rounding" in seen(KERNELS["input in fp8"][0]())[0][1]


def test_a_sentence_on_the_input_has_it_among_its_stages() -> None:
    ((stages, words),) = seen(KERNELS["input in fp8"][0]())
    assert stages == ("fc1", "input")
    assert "GEMM1 or its input is wrong, by little" in words


def test_the_call_is_one_of_which_least_squares_tell_nothing() -> None:
    call: MoeCall = CALL
    assert call.top_k * call.experts.intermediate_size > call.experts.hidden_size


@pytest.mark.parametrize("factor", usual.first(0, [1.0, 1.004]))
def test_an_input_that_is_off_by_little_is_no_rounding_of_gemm1(factor: float) -> None:
    noise = 1 + 2.0**-9 * random(9, *CALL.input.shape) * (factor == 1)
    got = forward(replace(CALL, input=fp32.to_bf16((CALL.input.float() * factor * noise).contiguous())))
    assert [stages for stages, _ in seen(got) if "input" not in stages] == []
