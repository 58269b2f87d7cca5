"""The held-out kernels are wrong, what they are built on is right, and the tool that judges the diagnosis is fair."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from mxfp4ref import forward, quantize
from mxfp4ref.conformance import differing
from mxfp4ref.conformance.comparison import ulp_distance
from mxfp4ref.goldens import open_goldens
from mxfp4ref.goldens.runs import run_stage, runs
from tests.held_out_kernels.by_hand import layer
from tests.held_out_kernels.calls import CALLS, captured
from tests.held_out_kernels.definition import STAGES, Wrong, load_all, wrong
from tests.held_out_kernels.formats import _rounded_half_away
from tests.held_out_kernels.routers import in_torch
from tests.helpers.tools import load_tool

KERNELS = load_all()


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_tool("tables/held_out.py")


def kernel_of(function: Any = forward, **changes: Any) -> Wrong:
    given = {"stages": ("fc2",), "says": ("scale", "next|neighbou?r"), "kind": "moe", **changes}
    return Wrong("kernel", "theme", function=function, story="", **given)


def some_always() -> Iterator[Any]:
    """The first of each theme that takes no 2 s; the others are slow tests."""
    seen = {"sigmoid_of_a_large_gate_is_nan"}
    for name, kernel in KERNELS.items():
        yield pytest.param(name, marks=pytest.mark.slow) if {name, kernel.theme} & seen else name
        if name not in seen:
            seen.add(kernel.theme)


@pytest.mark.parametrize("name", list(some_always()))
def test_each_kernel_is_wrong_on_a_call(tool: ModuleType, name: str) -> None:
    kernel = KERNELS[name]
    _, _, expected, got = tool.one_call(kernel)
    assert {n: (t.shape, t.dtype) for n, t in got.items()} == {
        n: (t.shape, t.dtype) for n, t in expected.items()
    }
    assert any(bool(differing(got[n], want).any()) for n, want in expected.items())


def test_a_right_kernel_conforms(tool: ModuleType) -> None:
    detected, said = tool.over_goldens(kernel_of(), "parallel/*", whole=False)
    assert not detected
    assert said == tool.Said()
    assert not tool.on_one_call(kernel_of(kind="dequantize", function=dequantised))[0]


def dequantised(**inputs: Any) -> dict[str, torch.Tensor]:
    return {"values": run_stage("dequantize", inputs)}


@pytest.mark.parametrize("name", CALLS)
def test_the_layer_by_hand_is_right_without_hooks(name: str) -> None:
    assert not bool(differing(layer(captured(name)), forward(captured(name))).any())


def test_the_layer_by_hand_is_right_on_swiglu_bias_without_parameters() -> None:
    call = open_goldens().load("step_and_situ/swiglu_bias_alone").call()
    assert not bool(differing(layer(call), forward(call)).any())


def test_the_router_in_torch_is_right_to_four_ulps() -> None:
    goldens = open_goldens()
    for name in goldens.names("routing"):
        case = goldens.load(name)
        one = runs(case)[0]
        got, sure = in_torch(one.inputs), ~case.tensors["ambiguous"]
        assert torch.equal(got["ids"][sure], one.expected["ids"][sure]), name
        distance = ulp_distance(got["scales"][sure], one.expected["scales"][sure])
        assert not bool((distance > 4).any()), name


def test_the_quantiser_by_hand_is_right_but_for_ties() -> None:
    values = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    packed, scales = quantize(values)
    assert torch.equal(_rounded_half_away(values, scales), packed)


@pytest.mark.parametrize(
    ("stages", "sentence", "right", "described", "misleading"),
    [
        (("fc2",), "GEMM2's scales are those of the next expert", True, True, False),
        (("fc1", "fc2"), "the scales are wrong", True, False, False),
        (("fc1", "activation", "fc2"), "", False, False, False),
        ((), "", False, False, False),
        (("finalize",), "the next scale is taken", False, True, True),
        ((), "the activation's limit is ignored", False, False, True),
        ((), "something before finalize is wrong", False, False, False),
        (("fc2",), "GEMM1 and GEMM2 are right", True, False, True),
        (("fc2",), "GEMM1 is right: the next scale in GEMM2", True, True, False),
    ],
)
def test_the_rules(
    tool: ModuleType, stages: tuple[str, ...], sentence: str, right: bool, described: bool, misleading: bool
) -> None:
    said = tool.Said(stages, sentence)
    judged = tool.judge(kernel_of(), "suite", True, said)
    assert (judged.stage_right, judged.described, judged.misleading) == (right, described, misleading)
    unseen = tool.judge(kernel_of(), "suite", False, said)
    assert (unseen.stage_right, unseen.described, unseen.misleading) == (False, False, False)


def test_noise_is_best_left_unnamed(tool: ModuleType) -> None:
    noise = kernel_of(stages=("none",), says=("random|scattered",))
    cases = {
        tool.Said(): (True, True, False),
        tool.Said((), "scattered single bits"): (True, True, False),
        tool.Said(("fc1",), ""): (False, True, True),
        tool.Said((), "fc1's scales are doubled"): (True, False, True),
        tool.Said((), "scattered, as of x", True): (True, True, True),
    }
    for said, expected in cases.items():
        judged = tool.judge(noise, "suite", True, said)
        assert (judged.stage_right, judged.described, judged.misleading) == expected, said


def test_the_four_numbers(tool: ModuleType) -> None:
    good = tool.judge(kernel_of(), "suite", True, tool.Said(("fc2",), "the next scale"))
    bad = tool.judge(kernel_of(), "suite", True, tool.Said(("fc1",)))
    assert tool.numbers([good, bad]) == {
        "detected": 1,
        "stage right": 0.5,
        "described": 0.5,
        "misleading": 1,
    }
    assert tool.reached(tool.numbers([good]))
    assert not tool.reached(tool.numbers([good, bad]))


def test_a_finding_is_taken_as_it_is(tool: ModuleType) -> None:
    class Result:
        finding = tool.Said(("fc1", "fc2"), "words", True)

    assert tool.said_of(Result()) == tool.Said(("fc1", "fc2"), "words", True)


def test_every_kernel_says_what_is_looked_for() -> None:
    assert len(KERNELS) > 60
    assert {stage for kernel in KERNELS.values() for stage in kernel.stages} == set(STAGES)
    assert len({kernel.story for kernel in KERNELS.values()}) == len(KERNELS)
    with pytest.raises(ValueError, match="stage: expected one or more of"):
        wrong(stage="gemm", says=("x",), story="")
    with pytest.raises(ValueError, match="a name that is not taken"):
        wrong(stage="fc1", says=("x",), story="")(KERNELS["all_zeros"].function)


@pytest.mark.slow
def test_words_that_say_nothing_describe_no_kernel(tool: ModuleType) -> None:
    words = (
        "The kernel does not conform: 57 of 58 cases fail. 1,018 elements of the output lie outside the "
        "interval of all correct evaluations, and other weights for the right expert outputs do "
        "not explain it, whatever the model."
    )
    judged = [tool.judge(kernel, "suite", True, tool.Said((), words)) for kernel in KERNELS.values()]
    assert [row.kernel for row in judged if row.described] == []
