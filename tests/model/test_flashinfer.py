"""flashinfer's call on top of the forward: signature, layouts, outputs, what has no effect."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mxfp4ref._choices import WEIGHT_LAYOUTS
from mxfp4ref.formats.generations import BYTEWISE, GENERATIONS, WORDWISE, Generation
from mxfp4ref.goldens import open_goldens
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.flashinfer import torch_ref_cutlass_fused_moe
from mxfp4ref.model.forward import MoeTrace, forward
from mxfp4ref.model.forward import trace as moe_trace
from mxfp4ref.sm90.tactics import Sm90Kernel
from tests.helpers import bits, layers
from tests.helpers.drop_in import (
    CALL,
    DENSE_CALL,
    EXPECTED,
    EXPERTS,
    OPTIONAL,
    PARALLEL,
    SM90_CALL,
    ActivationType,
    arguments_of,
    oracle,
)

# --- the signature ----------------------------------------------------------------------------------------

REQUIRED = inspect.Parameter.empty
# flashinfer.fused_moe.cutlass_fused_moe of flashinfer-python 0.7.2.post1 (fused_moe/core.py): names in order, and
# their defaults.
POSITIONAL = {
    "input": REQUIRED,
    "token_selected_experts": REQUIRED,
    "token_final_scales": REQUIRED,
    "fc1_expert_weights": REQUIRED,
    "fc2_expert_weights": REQUIRED,
    "output_dtype": REQUIRED,
    "quant_scales": REQUIRED,
    "fc1_expert_biases": None,
    "fc2_expert_biases": None,
    "input_sf": None,
    "swiglu_alpha": None,
    "swiglu_beta": None,
    "swiglu_limit": None,
    "tp_size": 1,
    "tp_rank": 0,
    "ep_size": 1,
    "ep_rank": 0,
    "cluster_size": 1,
    "cluster_rank": 0,
    "output": None,
    "enable_alltoall": False,
    "use_deepseek_fp8_block_scale": False,
    "use_w4_group_scaling": False,
    "use_mxfp8_act_scaling": False,
    "min_latency_mode": False,
    "use_packed_weights": False,
    "use_wfp4afp8_humming": False,
    "tune_max_num_tokens": 8192,
    "enable_pdl": None,
    "activation_type": 3,  # ActivationType.Swiglu
    "swizzled_input_sf": True,
    "use_fused_finalize": True,
    "profile_ids": None,
    "workspace_buffer": None,
}
KEYWORD_ONLY = {
    "clamped_relu2_limit": None,
    "situ_beta": None,
    "situ_linear_beta": None,
    "backend": "cutlass",
}
# Where the drop-in differs: bf16 weights have no scales.
DIFFERENCES: dict[str, object] = {"quant_scales": None}
OURS = {
    "kernel": None,
    "weight_layout": None,
    "strict": True,
    "trace": False,
}


def parameters_of(function: Callable[..., Any], kind: Any) -> dict[str, object]:
    parameters = inspect.signature(function).parameters
    return {name: p.default for name, p in parameters.items() if p.kind is kind}


def test_signature() -> None:
    positional = parameters_of(torch_ref_cutlass_fused_moe, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    keyword_only = parameters_of(torch_ref_cutlass_fused_moe, inspect.Parameter.KEYWORD_ONLY)
    assert list(positional.items()) == list((POSITIONAL | DIFFERENCES).items())
    assert list(keyword_only.items()) == list((KEYWORD_ONLY | OURS).items())
    assert len(inspect.signature(torch_ref_cutlass_fused_moe).parameters) == len(positional) + len(
        keyword_only
    )


def test_signature_is_that_of_flashinfer() -> None:
    flashinfer = pytest.importorskip("flashinfer.fused_moe", exc_type=ImportError)
    theirs = inspect.signature(flashinfer.cutlass_fused_moe).parameters.values()
    ours = inspect.signature(torch_ref_cutlass_fused_moe).parameters
    wanted = [(p.name, p.kind, DIFFERENCES.get(p.name, p.default)) for p in theirs]
    got = [(p.name, p.kind, p.default) for p in ours.values() if p.name not in OURS]
    assert got == wanted


# --- the same call ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_sm90_layouts(generation: Generation, dtype: torch.dtype) -> None:
    call = replace(CALL, experts=layers.to_sm90(EXPERTS, generation, dtype))
    bits.assert_same(oracle(call, weight_layout="sm90"), EXPECTED)
    bits.assert_same(oracle(call, kernel=Sm90Kernel(generation=generation)), EXPECTED)


def test_logical_layout() -> None:
    bits.assert_same(oracle(CALL, weight_layout="logical"), EXPECTED)
    assert WEIGHT_LAYOUTS == ("sm90", "logical", "logical_weights_folded_scales")


def test_positional_arguments() -> None:
    arguments = arguments_of(SM90_CALL)
    positional = [arguments.get(name, default) for name, default in POSITIONAL.items()]
    bits.assert_same(torch_ref_cutlass_fused_moe(*positional)[0], EXPECTED)


@pytest.mark.parametrize("present", [(), *((name,) for name in OPTIONAL), OPTIONAL[:2], OPTIONAL[1:]])
@pytest.mark.parametrize("biases", [(), ("fc1_biases", "fc2_biases")])
def test_any_subset_of_the_optional_tensors(present: tuple[str, ...], biases: tuple[str, ...]) -> None:
    absent = {
        name: None for name in (*OPTIONAL, "fc1_biases", "fc2_biases") if name not in (*present, *biases)
    }
    call, sm90 = (replace(c, experts=replace(c.experts, **absent)) for c in (CALL, SM90_CALL))
    bits.assert_same(oracle(sm90), forward(call))
    assert not torch.equal(oracle(sm90), EXPECTED)


@pytest.mark.parametrize(
    "options",
    [
        {"ep_size": 3, "ep_rank": 2},
        {"tp_size": 2, "tp_rank": 1},
        {"ep_size": 2, "ep_rank": 1, "tp_size": 4, "tp_rank": 0},
    ],
)
def test_ranks(options: dict[str, int]) -> None:
    call = layers.random_call(9, EXPERTS, tokens=7, top_k=3, **options)
    got = oracle(replace(call, experts=layers.to_sm90(EXPERTS)))
    bits.assert_same(got, forward(call))
    assert got.any()


def test_tactic_reaches_both_gemms() -> None:
    experts = layers.random_experts(4, hidden=768, inner=768, num_experts=1)
    call = layers.random_call(4, experts, tokens=4, top_k=1)
    traces = {}
    for tile_k in ((128, 128), (256, 128), (128, 256)):
        kernel = Sm90Kernel.of_tiles(tile_k)
        traces[tile_k] = traced(call, weight_layout="logical", kernel=kernel)
        bits.assert_same(traces[tile_k].output, forward(replace(call, kernel=kernel)))
    default = traces[128, 128]
    assert not torch.equal(default.fc1_accumulators, traces[256, 128].fc1_accumulators)
    assert torch.equal(default.fc1_accumulators, traces[128, 256].fc1_accumulators)
    assert not torch.equal(default.fc2_accumulators, traces[128, 256].fc2_accumulators)


def test_the_kernel_reaches_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[MoeCall] = []

    def record(call: MoeCall) -> Tensor:
        seen.append(call)
        return forward(call)

    monkeypatch.setattr("mxfp4ref.model.flashinfer.moe.forward", record)
    oracle()
    older = Sm90Kernel.of_tiles((128, 128), (64, 64), BYTEWISE)
    oracle(kernel=older, strict=False)
    assert [(c.kernel, c.strict) for c in seen] == [(Sm90Kernel(), True), (older, False)]


def test_the_tensors_tell_the_generation() -> None:
    """Where the products of the first two groups overflow, an older release's tensors get the older kernel's bits."""
    case = open_goldens().load("gemm/first_group_overflows")
    outputs = {}
    for generation in GENERATIONS:
        call = replace(case.call(), experts=layers.to_sm90(case.experts, generation))
        outputs[generation] = oracle(call, weight_layout="sm90")
        expected = replace(case.call(), kernel=Sm90Kernel(generation=generation))
        bits.assert_same(outputs[generation], forward(expected))
    assert not torch.equal(outputs[BYTEWISE], outputs[WORDWISE])


def test_strictness() -> None:
    ids = CALL.token_selected_experts.clone()
    ids[0] = 2
    with pytest.raises(
        ValueError, match=r"^token_selected_experts: expected each expert at most once per token"
    ):
        oracle(token_selected_experts=ids)
    first_only = ids.clone()
    first_only[0, 1] = -1
    bits.assert_same(
        oracle(token_selected_experts=ids, strict=False),
        forward(replace(CALL, token_selected_experts=first_only)),
    )


def traced(call: MoeCall = SM90_CALL, **changes: Any) -> MoeTrace:
    return torch_ref_cutlass_fused_moe(**(arguments_of(call) | changes), trace=True)


def test_trace() -> None:
    got, expected = traced(), moe_trace(CALL)
    for field in fields(MoeTrace):
        bits.assert_same(getattr(got, field.name), getattr(expected, field.name))


def test_output_is_written_in_place() -> None:
    output = torch.full_like(EXPECTED, torch.nan)
    assert oracle(output=output) is output
    bits.assert_same(output, EXPECTED)
    output = torch.full_like(EXPECTED, torch.nan)
    assert traced(output=output).output is output
    bits.assert_same(output, EXPECTED)
    # strided, and the input itself
    wide = torch.zeros(7, 512, dtype=torch.bfloat16)
    oracle(output=wide[:, 100:356])
    bits.assert_same(wide[:, 100:356].contiguous(), EXPECTED)
    assert not wide[:, :100].any()
    assert not wide[:, 356:].any()
    x = CALL.input.clone()
    assert oracle(input=x, output=x) is x
    bits.assert_same(x, EXPECTED)


def test_it_returns_a_list_as_flashinfer_does() -> None:
    """Callers write `[0]`, which would silently be the first token of a tensor."""
    result = torch_ref_cutlass_fused_moe(**arguments_of(SM90_CALL))
    assert type(result) is list
    assert len(result) == 1
    bits.assert_same(result[0], EXPECTED)


def test_empty_batch() -> None:
    empty = SM90_CALL.select(slice(0, 0))
    assert oracle(empty).shape == (0, 256)
    output = torch.zeros(0, 256, dtype=torch.bfloat16)
    assert oracle(empty, output=output) is output


@pytest.mark.parametrize(
    "accepted",
    [
        {"tune_max_num_tokens": 1},
        {"enable_pdl": True},
        {"enable_pdl": False},
        {"swizzled_input_sf": False},
        {"use_fused_finalize": False},
        {"workspace_buffer": torch.zeros(16, dtype=torch.uint8)},
        {"activation_type": ActivationType.Swiglu},
        {"activation_type": 5},
        {"activation_type": ActivationType.SwigluBias},
        {"cluster_rank": 0},
        {"backend": "cutlass"},
        {"profile_ids": None},
        {"quant_scales": tuple(arguments_of(SM90_CALL)["quant_scales"])},
    ],
)
def test_arguments_without_effect(accepted: dict[str, Any]) -> None:
    bits.assert_same(oracle(**accepted), EXPECTED)


def test_every_argument_is_accounted_for() -> None:
    """Accepted without effect, refused, or tested above: an argument that is added has to be placed too."""
    effective = {"output", *PARALLEL, "profile_ids", *arguments_of(CALL)}
    no_effect = {"tune_max_num_tokens", "enable_pdl", "swizzled_input_sf", "use_fused_finalize"}
    no_effect |= {"workspace_buffer", "cluster_rank"}
    refused = {"input_sf", "cluster_size", "use_deepseek_fp8_block_scale"}
    refused |= {"use_mxfp8_act_scaling", "min_latency_mode", "use_packed_weights"}
    effective |= {"use_wfp4afp8_humming", "enable_alltoall"}  # test_humming.py, test_activations.py
    refused |= set(KEYWORD_ONLY)
    assert effective | no_effect | refused == set(POSITIONAL) | set(KEYWORD_ONLY)


# --- bf16 weights -----------------------------------------------------------------------------------------


def test_bf16_weights() -> None:
    expected = forward(DENSE_CALL)
    bits.assert_same(oracle(DENSE_CALL), expected)
    bits.assert_same(oracle(DENSE_CALL, quant_scales=[]), expected)
    # The kernel looks neither at the flag nor at scales; an engine's debug switch leaves both as they were.
    scales = arguments_of(SM90_CALL)["quant_scales"]
    bits.assert_same(oracle(DENSE_CALL, use_w4_group_scaling=True), expected)
    bits.assert_same(oracle(DENSE_CALL, use_w4_group_scaling=True, quant_scales=scales), expected)
    bits.assert_same(oracle(DENSE_CALL, quant_scales=scales, profile_ids=[4, 120]), expected)
    without = {name: value for name, value in arguments_of(DENSE_CALL).items() if name != "quant_scales"}
    bits.assert_same(torch_ref_cutlass_fused_moe(**without)[0], expected)
    bits.assert_same(oracle(DENSE_CALL, weight_layout="logical"), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same_bits() -> None:
    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(item) for item in value]
        return value.cuda() if isinstance(value, Tensor) else value

    for call, expected in ((SM90_CALL, EXPECTED), (DENSE_CALL, forward(DENSE_CALL))):
        arguments = {name: moved(value) for name, value in arguments_of(call).items()}
        bits.assert_same(torch_ref_cutlass_fused_moe(**arguments)[0].cpu(), expected)
    with pytest.raises(ValueError, match=r"^output: expected a tensor on cuda:0 like input, got one on cpu$"):
        oracle(
            **{name: moved(value) for name, value in arguments_of(SM90_CALL).items()},
            output=torch.zeros_like(EXPECTED),
        )
