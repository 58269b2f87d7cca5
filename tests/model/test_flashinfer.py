"""flashinfer's call on top of the forward: signature, layouts, what has no effect, what is refused."""

from __future__ import annotations

import enum
import inspect
import re
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mxfp4ref.formats.generations import BYTEWISE, GENERATIONS, Generation
from mxfp4ref.formats.layout import fold_scales_sm90
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.flashinfer import WEIGHT_LAYOUTS, torch_ref_cutlass_fused_moe
from mxfp4ref.model.forward import MoeTrace, forward
from mxfp4ref.model.forward import trace as moe_trace
from mxfp4ref.sm90.tactics import Sm90Kernel
from tests.helpers import bits, layers

# --- the signature ----------------------------------------------------------------------------------------

REQUIRED = inspect.Parameter.empty
# flashinfer.fused_moe.cutlass_fused_moe of flashinfer-python 0.7.2.post1: names in order, and their defaults.
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
OURS = {
    "kernel": Sm90Kernel(),
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
    assert list(positional.items()) == list(POSITIONAL.items())
    assert list(keyword_only.items()) == list((KEYWORD_ONLY | OURS).items())
    assert len(inspect.signature(torch_ref_cutlass_fused_moe).parameters) == len(positional) + len(
        keyword_only
    )


def test_signature_is_that_of_flashinfer() -> None:
    flashinfer = pytest.importorskip("flashinfer.fused_moe", exc_type=ImportError)
    theirs = inspect.signature(flashinfer.cutlass_fused_moe).parameters.values()
    ours = inspect.signature(torch_ref_cutlass_fused_moe).parameters
    wanted = [(p.name, p.kind, p.default) for p in theirs]
    got = [(p.name, p.kind, p.default) for p in ours.values() if p.name not in OURS]
    assert got == wanted


# --- the same call ----------------------------------------------------------------------------------------

EXPERTS = layers.random_experts(1, hidden=256, inner=128, biases=True, parameters=layers.PARAMETERS)
CALL = layers.random_call(1, EXPERTS, tokens=7, top_k=2)
EXPECTED = forward(CALL)
PARALLEL = ("ep_size", "ep_rank", "tp_size", "tp_rank")
OPTIONAL = layers.PARAMETERS


def arguments_of(call: MoeCall) -> dict[str, Any]:
    """The arguments of the real call for a call with experts of any layout."""
    experts = call.experts
    scales = None if experts.fc1_scales is None else [experts.fc1_scales, experts.fc2_scales]
    return {
        "input": call.input,
        "token_selected_experts": call.token_selected_experts,
        "token_final_scales": call.token_final_scales,
        "fc1_expert_weights": experts.fc1_weights,
        "fc2_expert_weights": experts.fc2_weights,
        "output_dtype": torch.bfloat16,
        "quant_scales": scales,
        "fc1_expert_biases": experts.fc1_biases,
        "fc2_expert_biases": experts.fc2_biases,
        "use_w4_group_scaling": experts.quantized,
        **{name: getattr(experts, name) for name in OPTIONAL},
        **{name: getattr(call, name) for name in PARALLEL},
    }


SM90_CALL = replace(CALL, experts=layers.to_sm90(EXPERTS))
DENSE_CALL = layers.random_call(
    3, layers.random_experts(3, hidden=96, inner=64, biases=True, quantized=False), tokens=5
)


def oracle(call: MoeCall = SM90_CALL, **changes: Any) -> Any:
    return torch_ref_cutlass_fused_moe(**(arguments_of(call) | changes))


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_sm90_layouts(generation: Generation, dtype: torch.dtype) -> None:
    call = replace(CALL, experts=layers.to_sm90(EXPERTS, generation, dtype))
    bits.assert_same(oracle(call), EXPECTED)
    bits.assert_same(oracle(call, weight_layout="sm90"), EXPECTED)


def test_logical_layout() -> None:
    bits.assert_same(oracle(CALL, weight_layout="logical"), EXPECTED)
    assert WEIGHT_LAYOUTS == ("sm90", "logical")


def test_positional_arguments() -> None:
    arguments = arguments_of(SM90_CALL)
    positional = [arguments.get(name, default) for name, default in POSITIONAL.items()]
    bits.assert_same(torch_ref_cutlass_fused_moe(*positional), EXPECTED)


@pytest.mark.parametrize("present", [(), *((name,) for name in OPTIONAL), OPTIONAL[:2], OPTIONAL[1:]])
@pytest.mark.parametrize("biases", [(), ("fc1_biases",), ("fc2_biases",)])
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
        output, traces[tile_k] = oracle(call, weight_layout="logical", kernel=kernel, trace=True)
        bits.assert_same(output, forward(replace(call, kernel=kernel)))
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


def test_trace() -> None:
    output, got = oracle(trace=True)
    expected = moe_trace(CALL)
    bits.assert_same(output, EXPECTED)
    for field in fields(MoeTrace):
        bits.assert_same(getattr(got, field.name), getattr(expected, field.name))


def test_output_is_written_in_place() -> None:
    for trace in (False, True):
        output = torch.full_like(EXPECTED, torch.nan)
        got = oracle(output=output, trace=trace)
        assert (got[0] if trace else got) is output
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


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        (
            torch.zeros(7, 256),
            TypeError,
            "output: expected a bfloat16 tensor of shape [7, 256], got float32 [7, 256]",
        ),
        (
            EXPECTED[:6],
            ValueError,
            "output: expected a bfloat16 tensor of shape [7, 256], got bfloat16 [6, 256]",
        ),
        (7, TypeError, "output: expected a bfloat16 tensor of shape [7, 256], got int"),
    ],
)
def test_refuses_a_wrong_output_before_any_work(output: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        oracle(output=output)


def test_empty_batch() -> None:
    empty = SM90_CALL.select(slice(0, 0))
    assert oracle(empty).shape == (0, 256)
    output = torch.zeros(0, 256, dtype=torch.bfloat16)
    assert oracle(empty, output=output) is output


class ActivationType(enum.IntEnum):
    """As flashinfer's."""

    Gelu = 0
    Silu = 2
    Swiglu = 3
    Geglu = 4
    SwigluBias = 5
    Relu2 = 6


@pytest.mark.parametrize(
    "accepted",
    [
        {"tune_max_num_tokens": 1},
        {"enable_pdl": True},
        {"enable_pdl": False},
        {"swizzled_input_sf": False},
        {"use_fused_finalize": False},
        {"profile_ids": [3, 200]},
        {"workspace_buffer": torch.zeros(16, dtype=torch.uint8)},
        {"activation_type": ActivationType.Swiglu},
        {"activation_type": 5},
        {"activation_type": ActivationType.SwigluBias},
        {"cluster_rank": 0},
        {"backend": "cutlass"},
        {"quant_scales": tuple(arguments_of(SM90_CALL)["quant_scales"])},
    ],
)
def test_arguments_without_effect(accepted: dict[str, Any]) -> None:
    bits.assert_same(oracle(**accepted), EXPECTED)


@pytest.mark.parametrize(
    "refused",
    [
        {"input_sf": torch.ones(1)},
        {"cluster_size": 2},
        {"enable_alltoall": True},
        {"use_deepseek_fp8_block_scale": True},
        {"use_mxfp8_act_scaling": True},
        {"min_latency_mode": True},
        {"use_packed_weights": True},
        {"use_wfp4afp8_humming": True},
        {"clamped_relu2_limit": torch.ones(1)},
        {"situ_beta": torch.ones(4)},
        {"situ_linear_beta": torch.ones(4)},
        {"backend": "cake"},
        {"output_dtype": torch.float16},
        {"output_dtype": torch.float32},
        *({"activation_type": kind} for kind in ActivationType if kind.name not in ("Swiglu", "SwigluBias")),
    ],
)
def test_not_modelled(refused: dict[str, Any]) -> None:
    (name,) = refused
    with pytest.raises(NotImplementedError, match=f"^{name}: .*got "):
        oracle(**refused)


def test_every_argument_is_accounted_for() -> None:
    """Accepted without effect, refused, or tested above: an argument that is added has to be placed too."""
    effective = {"output", *PARALLEL, "activation_type", *arguments_of(CALL)}
    no_effect = {"tune_max_num_tokens", "enable_pdl", "swizzled_input_sf", "use_fused_finalize"}
    no_effect |= {"profile_ids", "workspace_buffer", "cluster_rank"}
    refused = {"input_sf", "cluster_size", "enable_alltoall", "use_deepseek_fp8_block_scale"}
    refused |= {"use_mxfp8_act_scaling", "min_latency_mode", "use_packed_weights", "use_wfp4afp8_humming"}
    refused |= set(KEYWORD_ONLY)
    assert effective | no_effect | refused == set(POSITIONAL) | set(KEYWORD_ONLY)


def test_swiglu_bias_needs_a_parameter() -> None:
    plain = dict.fromkeys(OPTIONAL)
    with pytest.raises(NotImplementedError, match=r"^activation_type: .*along with alpha, beta or limit"):
        oracle(activation_type=5, **plain)
    only_limit = plain | {"swiglu_limit": EXPERTS.swiglu_limit}
    bits.assert_same(oracle(activation_type=5, **only_limit), oracle(**only_limit))


# --- wrong arguments --------------------------------------------------------------------------------------

A = arguments_of(SM90_CALL)
S1, S2 = A["quant_scales"]


def strided(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, tensor], -1)[..., 0]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"input": A["input"].float()},
            TypeError,
            "input: expected a bfloat16 tensor of shape [M, H], got float32",
        ),
        (
            {"input": A["input"][:, :128].contiguous()},
            ValueError,
            "fc1_expert_weights: expected a uint8 tensor of",
        ),
        ({"fc1_expert_weights": None}, TypeError, "fc1_expert_weights: expected a uint8 tensor of shape"),
        ({"fc1_expert_weights": A["fc1_expert_weights"][:, :-1]}, ValueError, "fc2_expert_weights: expected"),
        (
            {"fc2_expert_weights": A["fc2_expert_weights"][:3]},
            ValueError,
            "fc2_expert_weights: expected a uint8",
        ),
        (
            {"quant_scales": None},
            ValueError,
            "quant_scales: expected the scales of fc1 and fc2, two tensors, got None",
        ),
        (
            {"quant_scales": [S1]},
            ValueError,
            "quant_scales: expected the scales of fc1 and fc2, two tensors, got 1",
        ),
        (
            {"quant_scales": S1},
            ValueError,
            "quant_scales: expected the scales of fc1 and fc2, two tensors, got Tensor",
        ),
        ({"quant_scales": [S1, S2.float()]}, TypeError, "quant_scales[1]: expected a uint8 or int32 tensor"),
        ({"quant_scales": [S2, S1]}, ValueError, "quant_scales[0]: expected folded scales"),
        (
            {"weight_layout": "sm100"},
            ValueError,
            "weight_layout: expected one of 'sm90', 'logical', got 'sm100'",
        ),
        (
            {"weight_layout": "logical"},
            TypeError,
            "quant_scales[0]: expected a uint8 tensor of shape [4, 256, 8]",
        ),
        ({"use_w4_group_scaling": False}, TypeError, "fc1_expert_weights: expected a bfloat16 tensor"),
        (
            {"token_selected_experts": A["token_selected_experts"].long()},
            TypeError,
            "token_selected_experts: expected",
        ),
        ({"token_final_scales": A["token_final_scales"][:3]}, ValueError, "token_final_scales: expected"),
        ({"swiglu_limit": 7.0}, TypeError, "swiglu_limit: expected a float32 tensor of shape [4], got float"),
        ({"fc1_expert_biases": A["fc1_expert_biases"].float()}, TypeError, "fc1_expert_biases: expected"),
        ({"ep_rank": 1}, ValueError, "ep_rank: expected an int from 0 to 0, got 1"),
        (
            {"kernel": Sm90Kernel.of_tiles((256, 256))},
            ValueError,
            "kernel: expected a K tile that divides GEMM2's K = 128, got tactic 64x16x256/1x1",
        ),
        ({"kernel": "wordwise"}, TypeError, "kernel: expected Sm90Kernel, got str"),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        oracle(**changes)


@pytest.mark.parametrize(
    "name",
    [
        "input",
        "token_selected_experts",
        "token_final_scales",
        "fc1_expert_weights",
        "fc2_expert_weights",
        "fc1_expert_biases",
        "fc2_expert_biases",
        *OPTIONAL,
    ],
)
def test_refuses_what_is_not_contiguous(name: str) -> None:
    message = rf"^{name}: expected a contiguous tensor, got strides \["
    with pytest.raises(ValueError, match=message):
        oracle(**{name: strided(A[name])})


def test_refuses_scales_that_are_not_contiguous() -> None:
    for index in (0, 1):
        scales = [S1, S2]
        scales[index] = strided(scales[index])
        with pytest.raises(ValueError, match=rf"^quant_scales\[{index}\]: expected a contiguous tensor"):
            oracle(quant_scales=scales)


def test_refuses_another_fold_than_the_shapes_allow() -> None:
    logical = CALL.experts.fc1_scales
    assert logical is not None
    with pytest.raises(ValueError, match=r"^quant_scales\[0\]: expected folded scales"):
        oracle(quant_scales=[logical, S2])
    other = fold_scales_sm90(logical[:, :128], BYTEWISE).contiguous()
    with pytest.raises(ValueError, match=r"^quant_scales\[0\]: expected folded scales"):
        oracle(quant_scales=[other, S2])


# --- bf16 weights -----------------------------------------------------------------------------------------


def test_bf16_weights() -> None:
    expected = forward(DENSE_CALL)
    bits.assert_same(oracle(DENSE_CALL), expected)
    bits.assert_same(oracle(DENSE_CALL, quant_scales=[]), expected)
    bits.assert_same(oracle(DENSE_CALL, weight_layout="logical"), expected)


def test_bf16_weights_refusals() -> None:
    with pytest.raises(
        NotImplementedError, match=r"^quant_scales: not modelled without use_w4_group_scaling"
    ):
        oracle(DENSE_CALL, quant_scales=[torch.ones(1), torch.ones(1)])
    with pytest.raises(
        ValueError, match=r"^weight_layout: expected 'logical' for bfloat16 weights, got 'sm90'$"
    ):
        oracle(DENSE_CALL, weight_layout="sm90")
    with pytest.raises(TypeError, match=r"^fc1_expert_weights: expected a uint8 tensor"):
        oracle(DENSE_CALL, use_w4_group_scaling=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same_bits() -> None:
    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(item) for item in value]
        return value.cuda() if isinstance(value, Tensor) else value

    for call, expected in ((SM90_CALL, EXPECTED), (DENSE_CALL, forward(DENSE_CALL))):
        arguments = {name: moved(value) for name, value in arguments_of(call).items()}
        bits.assert_same(torch_ref_cutlass_fused_moe(**arguments).cpu(), expected)
    with pytest.raises(ValueError, match=r"^output: expected a tensor on cuda:0 like input, got one on cpu$"):
        oracle(**{name: moved(value) for name, value in A.items()}, output=torch.zeros_like(EXPECTED))
