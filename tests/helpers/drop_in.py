"""flashinfer's call: the arguments that a MoeCall stands for."""

from __future__ import annotations

import enum
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mxfp4ref.formats.experts import PARAMETERS
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.flashinfer import torch_ref_cutlass_fused_moe
from mxfp4ref.model.forward import forward
from tests.helpers import layers

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
        "activation_type": call.activation_type,
        **{name: getattr(experts, name) for name in PARAMETERS},
        **{name: getattr(call, name) for name in PARALLEL},
    }


SM90_CALL = replace(CALL, experts=layers.to_sm90(EXPERTS))
DENSE_CALL = layers.random_call(
    3, layers.random_experts(3, hidden=96, inner=64, biases=True, quantized=False), tokens=5
)


def oracle(call: MoeCall = SM90_CALL, **changes: Any) -> Tensor:
    """The output alone of the call, with some arguments changed."""
    result = torch_ref_cutlass_fused_moe(**(arguments_of(call) | changes))
    assert isinstance(result, list)
    (output,) = result
    return output


class ActivationType(enum.IntEnum):
    """As flashinfer's."""

    Gelu = 0
    Silu = 2
    Swiglu = 3
    Geglu = 4
    SwigluBias = 5
    Relu2 = 6
