"""What flashinfer's call refuses: what is not modelled, and wrong arguments."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mxfp4ref.formats.experts import PARAMETERS
from mxfp4ref.formats.generations import BYTEWISE
from mxfp4ref.formats.layout import fold_scales_sm90
from mxfp4ref.model.forward import forward
from mxfp4ref.sm90.activation import ACTIVATIONS
from mxfp4ref.sm90.tactics import Sm90Kernel
from tests.helpers import bits
from tests.helpers.drop_in import (
    CALL,
    DENSE_CALL,
    EXPECTED,
    EXPERTS,
    OPTIONAL,
    SM90_CALL,
    ActivationType,
    arguments_of,
    oracle,
)

GATED = [id for id, activation in ACTIVATIONS.items() if activation.gated]


@pytest.mark.parametrize(
    "refused",
    [
        {"input_sf": torch.ones(1)},
        {"cluster_size": 2},
        {"use_deepseek_fp8_block_scale": True},
        {"use_mxfp8_act_scaling": True},
        {"min_latency_mode": True},
        {"use_packed_weights": True},
        {"clamped_relu2_limit": torch.ones(1)},
        {"backend": "cake"},
        {"output_dtype": torch.float16},
        {"output_dtype": torch.float32},
        *({"activation_type": kind} for kind in ActivationType if kind not in ACTIVATIONS),
        {"activation_type": 12},  # ClampedRelu2, which is not in the enumeration
    ],
)
def test_not_modelled(refused: dict[str, Any]) -> None:
    (name,) = refused
    with pytest.raises(NotImplementedError, match=f"^{name}: .*got "):
        oracle(**refused)


@pytest.mark.parametrize(
    ("x", "weights"),
    [
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float8_e4m3fn),
        (torch.float8_e4m3fn, torch.float8_e4m3fn),
        (torch.float8_e4m3fn, torch.int64),
        (torch.uint8, torch.int64),
    ],
)
def test_other_kernels_of_the_real_function(x: torch.dtype, weights: torch.dtype) -> None:
    """A swap can hand them to the real function: they are not wrong, but not modelled."""
    message = f"^fc1_expert_weights: not modelled, .*got {weights} weights and a {x} input$"
    with pytest.raises(NotImplementedError, match=message):
        oracle(input=A["input"].to(x), fc1_expert_weights=A["fc1_expert_weights"].to(weights))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("Relu2", r"write 6 \(Relu2\)"),
        ("situ", r"write 10 \(Situ\)"),
        ("swiglu_step", r"did you mean 7 \(SwigluStep\)"),
        ("xyz", r"one of 0 \(Gelu\), .*, 10 \(Situ\)"),
    ],
)
def test_an_activation_by_its_name(name: str, hint: str) -> None:
    """Its number is told, by the drop-in and by `MoeCall`."""
    message = f"^activation_type: expected an int, got str '{name}'; {hint}"
    with pytest.raises(TypeError, match=message):
        oracle(activation_type=name)
    with pytest.raises(TypeError, match=message):
        replace(SM90_CALL, activation_type=name)  # type: ignore[arg-type]


def test_the_refusal_lists_the_table() -> None:
    message = r"^activation_type: not modelled, expected one of Gelu \(0\), .*, Situ \(10\), got 12 \(ClampedRelu2, "
    with pytest.raises(NotImplementedError, match=message):
        oracle(activation_type=12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_dtype": torch.float16}, "; the kernel has torch.float16 with use_wfp4afp8_humming=True$"),
        (
            {"output_dtype": torch.float16, "use_wfp4afp8_humming": True},
            "expected torch.bfloat16, as the input has",
        ),
        (
            {"output_dtype": torch.float32, "use_wfp4afp8_humming": True},
            "expected torch.bfloat16, as the input has",
        ),
        ({"cluster_size": 2}, r"expected 1 \(the kernel refuses any other\), got 2$"),
    ],
)
def test_refusals_say_why(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(NotImplementedError, match=message):
        oracle(**changes)


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("activation_type", GATED)
def test_parameters_are_checked_whether_they_are_read_or_not(name: str, activation_type: int) -> None:
    with pytest.raises(
        ValueError, match=rf"^{name}: expected a float32 tensor of shape \[4\], got float32 \[3\]$"
    ):
        oracle(activation_type=activation_type, **{name: torch.ones(3)})
    with pytest.raises(
        TypeError, match=rf"^{name}: expected a float32 tensor of shape \[4\], got float64 \[4\]$"
    ):
        oracle(activation_type=activation_type, **{name: torch.ones(4, dtype=torch.float64)})


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
        (
            {"quant_scales": [S1, S2.float()]},
            TypeError,
            "quant_scales[1]: expected a uint8 or int32 or float8_e8m0fnu tensor",
        ),
        ({"quant_scales": [S2, S1]}, ValueError, "quant_scales[0]: expected folded scales"),
        (
            {"weight_layout": "sm100"},
            ValueError,
            "weight_layout: expected one of 'sm90', 'logical', 'logical_weights_folded_scales', got 'sm100'",
        ),
        (
            {"weight_layout": "logical"},
            TypeError,
            "quant_scales[0]: expected a uint8 tensor of shape [4, 256, 8]",
        ),
        (
            {"use_w4_group_scaling": False},
            TypeError,
            "fc1_expert_weights: expected bfloat16 weights, got uint8; MXFP4 weights need use_w4_group_scaling=True",
        ),
        (
            {"token_selected_experts": A["token_selected_experts"].long()},
            TypeError,
            "token_selected_experts: expected an int32 tensor of shape [M=7, k], got int64 [7, 2]; "
            "write token_selected_experts.to(torch.int32)",
        ),
        (
            {"token_final_scales": A["token_final_scales"].bfloat16()},
            TypeError,
            "token_final_scales: expected a float32 tensor of shape [M=7, k=2], got bfloat16 [7, 2]; "
            "write token_final_scales.to(torch.float32)",
        ),
        (
            {"fc1_expert_biases": None},
            ValueError,
            "fc1_expert_biases: expected a tensor beside fc2_expert_biases, since the kernel takes both or none, got "
            "None; write fc1_expert_weights.new_zeros(fc1_expert_weights.shape[:2], dtype=torch.bfloat16)",
        ),
        (
            {"fc2_expert_biases": None},
            ValueError,
            "fc2_expert_biases: expected a tensor beside fc1_expert_biases",
        ),
        ({"strict": "skip"}, ValueError, "strict: expected one of True, False, 'count', got 'skip'"),
        ({"strict": 1}, ValueError, "strict: expected one of True, False, 'count', got 1"),
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


def test_bf16_weights_refusals() -> None:
    for layout in ("sm90", "logical_weights_folded_scales"):
        message = f"weight_layout: expected 'logical' for bfloat16 weights, got '{layout}'"
        with pytest.raises(ValueError, match=f"^{message}$"):
            oracle(DENSE_CALL, weight_layout=layout)
    with pytest.raises(TypeError, match=r"^quant_scales: expected a sequence or None, got Tensor$"):
        oracle(DENSE_CALL, quant_scales=torch.ones(2))
    with pytest.raises(TypeError, match=r"^fc2_expert_weights: expected a bfloat16 tensor .*, got uint8"):
        oracle(DENSE_CALL, use_w4_group_scaling=True, fc2_expert_weights=A["fc2_expert_weights"])


def test_zero_biases_are_no_biases() -> None:
    """The line to write that the refusal of a lone bias names."""
    weights = A["fc2_expert_weights"]
    zeros = weights.new_zeros(weights.shape[:2], dtype=torch.bfloat16)
    alone = replace(CALL, experts=replace(EXPERTS, fc2_biases=None))
    bits.assert_same(oracle(fc2_expert_biases=zeros), forward(alone))


def test_tensors_in_logical_layout_are_told_how_they_are_taken() -> None:
    with pytest.raises(ValueError, match=r'^quant_scales\[0\]: .* taken with weight_layout="logical"'):
        oracle(CALL, weight_layout="sm90")
