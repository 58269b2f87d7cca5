"""What may not change a bit of the forward: modes, strides, layouts, the order of tokens and experts, the device."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from mxfp4ref.formats.experts import Experts
from mxfp4ref.formats.generations import GENERATIONS, Generation
from mxfp4ref.model.forward import forward, trace
from tests.helpers import bits, layers, usual
from tests.helpers.forward_calls import (
    CALL,
    CALLS,
    DENSE_CALL,
    EXPERTS,
    TRACE_NAMES,
    assert_same_trace,
    expected_trace,
)
from tests.helpers.modes import MODES, all_modes, forget_constants


def test_the_calls_exercise_what_they_say() -> None:
    assert torch.isfinite(expected_trace("ordinary").output).all()
    assert torch.isnan(expected_trace("nonfinite").output).any()
    lowest = expected_trace("tiny").fc1_accumulators.abs()
    assert 0 < lowest[lowest > 0].min() < 2.0**-100


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("mode", MODES)
def test_modes(mode: str, name: str) -> None:
    with MODES[mode]():
        got = forward(CALLS[name])
    bits.assert_same(got, expected_trace(name).output)


def test_all_modes_at_once() -> None:
    """In the trace too, with constants made in these modes, which must do afterwards as well."""
    for name in CALLS:
        expected_trace(name)
    forget_constants()
    try:
        with all_modes():
            got = {name: trace(call) for name, call in CALLS.items()}
        for name, call in CALLS.items():
            assert_same_trace(got[name], expected_trace(name))
            bits.assert_same(forward(call), expected_trace(name).output)
    finally:
        forget_constants()


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # by torch 2.11 itself
@pytest.mark.parametrize("backend", usual.first(1, ["eager", "aot_eager"]))
def test_a_compiled_caller(backend: str) -> None:
    """The forward stays out of a caller's graph, whose fused operations would round otherwise."""

    def caller(x: Tensor) -> Tensor:
        doubled = x * 2
        output = forward(replace(CALL, input=doubled))
        return output + doubled

    expected = caller(CALL.input)
    torch.compiler.reset()
    try:
        bits.assert_same(torch.compile(caller, backend=backend)(CALL.input), expected)
    finally:
        torch.compiler.reset()


def test_arguments_are_left_alone() -> None:
    tensors = {"input": CALL.input, "ids": CALL.token_selected_experts, "scales": CALL.token_final_scales}
    held = {f.name: getattr(EXPERTS, f.name) for f in fields(Experts)}
    tensors |= {name: tensor for name, tensor in held.items() if tensor is not None}
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    for call in CALLS.values():
        trace(call)
    for name, tensor in tensors.items():
        bits.assert_same(tensor, copies[name])


def test_no_gradients() -> None:
    x = CALL.input.clone().requires_grad_()
    weights = CALL.token_final_scales.clone().requires_grad_()
    got = forward(replace(CALL, input=x, token_final_scales=weights))
    assert not got.requires_grad
    bits.assert_same(got, forward(CALL))
    dense = DENSE_CALL.experts
    trained = replace(dense, fc1_weights=torch.nn.Parameter(dense.fc1_weights))
    bits.assert_same(forward(replace(DENSE_CALL, experts=trained)), forward(DENSE_CALL))


def test_strides_do_not_matter() -> None:
    def strided(tensor: Tensor) -> Tensor:
        return torch.stack([tensor, tensor], -1)[..., 0]

    for name in ("ordinary", "tiny", "bf16"):
        call = CALLS[name]
        values = {f.name: getattr(call.experts, f.name) for f in fields(Experts)}
        experts = replace(call.experts, **{n: None if t is None else strided(t) for n, t in values.items()})
        got = forward(
            replace(
                call,
                input=strided(call.input),
                token_selected_experts=strided(call.token_selected_experts),
                token_final_scales=strided(call.token_final_scales),
                experts=experts,
            )
        )
        bits.assert_same(got, forward(call))


@pytest.mark.parametrize("name", CALLS)
def test_token_by_token(name: str) -> None:
    """Default tactic: positions have no effect, nor has anything else of the other tokens."""
    call = CALLS[name]
    single = [forward(call.select(slice(t, t + 1))) for t in range(call.num_tokens)]
    bits.assert_same(torch.cat(single), expected_trace(name).output)


@pytest.mark.parametrize("name", CALLS)
def test_order_of_tokens(name: str) -> None:
    call = CALLS[name]
    order = torch.from_numpy(np.random.default_rng(1).permutation(call.num_tokens))
    shuffled = replace(
        call,
        input=call.input[order],
        token_selected_experts=call.token_selected_experts[order],
        token_final_scales=call.token_final_scales[order],
    )
    bits.assert_same(forward(shuffled), expected_trace(name).output[order])


@pytest.mark.parametrize("name", CALLS)
def test_order_of_experts(name: str) -> None:
    call = CALLS[name]
    order = torch.from_numpy(np.random.default_rng(2).permutation(call.experts.num_experts))
    new_id = torch.argsort(order)
    ids = call.token_selected_experts.long()
    ids = torch.where(ids < 0, -1, new_id[ids.clamp(min=0)]).to(torch.int32)
    renamed = replace(call, experts=call.experts.select(order), token_selected_experts=ids)
    bits.assert_same(forward(renamed), expected_trace(name).output)


@pytest.mark.parametrize("name", [name for name in CALLS if name != "bf16"])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_sm90_layouts(name: str, generation: Generation) -> None:
    call = replace(CALLS[name], experts=layers.to_sm90(CALLS[name].experts, generation))
    assert_same_trace(trace(call), expected_trace(name))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", CALLS)
def test_cuda_gives_the_same_bits(name: str) -> None:
    call = CALLS[name]
    moved = replace(
        call,
        input=call.input.cuda(),
        token_selected_experts=call.token_selected_experts.cuda(),
        token_final_scales=call.token_final_scales.cuda(),
        experts=call.experts.to("cuda"),
    )
    got, expected = trace(moved), trace(call)
    for field in TRACE_NAMES:
        bits.assert_same(getattr(got, field).cpu(), getattr(expected, field))
    bits.assert_same(forward(moved).cpu(), expected.output)
