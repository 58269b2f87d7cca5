"""The forward of W4A8 ("Humming"): rows as FP8 before either GEMM (`docs/arithmetic.md`, section 11)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from mxfp4ref._spans import spans
from mxfp4ref.formats.humming_experts import HummingExperts
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.cpu import ROWS_AT_ONCE
from mxfp4ref.model.forward import AnyStages, MoeTrace, activate_rows, check_stage
from mxfp4ref.model.rows import Rows
from mxfp4ref.sm90 import fp32
from mxfp4ref.sm90.elementwise import activate, finalize, to_bf16
from mxfp4ref.sm90.gemm.fp8 import fp8_gemm
from mxfp4ref.sm90.row_quantize import QuantizedRows, quantize_rows, scale_rows

__all__ = ["HUMMING", "STAGES", "HummingStages", "HummingTrace", "call_of", "forward_rows", "inputs_of"]

# What is called otherwise where experts are given tensor by tensor.
_TENSOR_NAMES = {"fc1_scales": "fc1_offsets", "fc2_scales": "fc2_offsets"}


@dataclass(frozen=True, repr=False)
class HummingStages(AnyStages):
    """The computation as replaceable stages, as `Stages` for W4A16.

    `quantize_input` and `quantize_activation` take rows and their experts' residuals, the GEMMs one expert's
    `(x [M, K] uint8, codes [N, K/2], offsets [N, K/32])`, `scale_fc1` and `scale_fc2` accumulators and rows' factors.
    """

    quantize_input: Callable[[Tensor, Tensor], QuantizedRows] = quantize_rows
    fc1_gemm: Callable[[Tensor, Tensor, Tensor], Tensor] = fp8_gemm
    scale_fc1: Callable[[Tensor, Tensor], Tensor] = scale_rows
    round_fc1: Callable[[Tensor], Tensor] = to_bf16
    activate: Callable[..., Tensor] = activate
    quantize_activation: Callable[[Tensor, Tensor], QuantizedRows] = quantize_rows
    fc2_gemm: Callable[[Tensor, Tensor, Tensor], Tensor] = fp8_gemm
    scale_fc2: Callable[[Tensor, Tensor], Tensor] = scale_rows
    round_fc2: Callable[[Tensor], Tensor] = to_bf16
    finalize: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor] = finalize
    round_output: Callable[[Tensor], Tensor] = to_bf16


HUMMING = HummingStages()
# By the dtype of the call, which its output and both GEMMs' are rounded to.
STAGES = {
    torch.bfloat16: HUMMING,
    torch.float16: HummingStages(round_fc1=fp32.to_fp16, round_fc2=fp32.to_fp16, round_output=fp32.to_fp16),
}


@dataclass(frozen=True)
class HummingTrace(MoeTrace):
    """Every intermediate of a W4A8 forward. As `MoeTrace`, but fp16 where the input is, `activation` float32, and:

    Attributes:
        fc1_input: `[R, H] uint8`, E4M3, the rows that GEMM1 multiplies.
        fc1_factor: `[R] float32`, what `fc1_accumulators` are multiplied by for `fc1_output`.
        fc2_input: `[R, I] uint8`, E4M3, the activation that GEMM2 multiplies.
        fc2_factor: `[R] float32`, likewise.
    """

    fc1_input: Tensor
    fc1_factor: Tensor
    fc2_input: Tensor
    fc2_factor: Tensor


def call_of(inputs: Mapping[str, Any]) -> MoeCall:
    """The call of tensors by name, as golden cases have them.

    Args:
        inputs: `input`, `token_selected_experts`, `token_final_scales` and the fields of `HummingExperts` in
            logical order, `fc1_scales` and `fc2_scales` as `fc1_offsets` and `fc2_offsets`; and any other fields of
            `MoeCall`.
    """
    names = {field.name: _TENSOR_NAMES.get(field.name, field.name) for field in fields(HummingExperts)}
    tensors = {name: inputs.get(given) for name, given in names.items()}
    others = {name: value for name, value in inputs.items() if name not in names.values()}
    return MoeCall(experts=HummingExperts(**tensors), **others)  # type: ignore[arg-type]


def inputs_of(call: MoeCall) -> dict[str, Tensor]:
    """The tensors of a call by name: the inverse of `call_of`, but for fields that are no tensors."""
    assert isinstance(call.experts, HummingExperts)
    names = ("input", "token_selected_experts", "token_final_scales")
    tensors = {name: getattr(call, name) for name in names}
    for field in fields(HummingExperts):
        if (tensor := getattr(call.experts, field.name)) is not None:
            tensors[_TENSOR_NAMES.get(field.name, field.name)] = tensor
    return tensors


def forward_rows(
    call: MoeCall, local: Tensor, rows: Rows, stages: HummingStages, keep: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """The stages in order: the output and, if they are to be kept, the intermediates by name."""
    experts = call.experts
    assert isinstance(experts, HummingExperts)
    x = call.input.index_select(0, rows.token)
    fc1_input = stages.quantize_input(x, experts.fc1_residual.index_select(0, rows.expert))
    fc1_accumulators = _gemm(experts, "fc1", fc1_input.values, rows, stages.fc1_gemm)
    fc1_output = stages.round_fc1(stages.scale_fc1(fc1_accumulators, fc1_input.factor))
    check_stage("round_fc1", fc1_output, (len(x), experts.gemm_shapes[0][0]))
    activation = torch.cat(
        [
            activate_rows(call, fc1_output[some], rows.expert[some], stages.activate)
            for some in spans(max(len(x), 1), ROWS_AT_ONCE)
        ]
    )
    fc2_input = stages.quantize_activation(activation, experts.fc2_residual.index_select(0, rows.expert))
    fc2_accumulators = _gemm(experts, "fc2", fc2_input.values, rows, stages.fc2_gemm)
    fc2_output = stages.round_fc2(stages.scale_fc2(fc2_accumulators, fc2_input.factor))
    check_stage("round_fc2", fc2_output, (len(x), experts.hidden_size))
    by_slot = fc2_output.new_zeros(*local.shape, experts.hidden_size)
    by_slot.view(-1, experts.hidden_size).index_copy_(0, rows.token * call.top_k + rows.slot, fc2_output)
    bias = experts.fc2_biases if call.tp_rank == 0 else None
    output = stages.round_output(stages.finalize(by_slot, local, call.token_final_scales, bias))
    kept = {
        "token": rows.token,
        "slot": rows.slot,
        "expert": rows.expert,
        "fc1_input": fc1_input.values,
        "fc1_factor": fc1_input.factor,
        "fc1_accumulators": fc1_accumulators,
        "fc1_output": fc1_output,
        "activation": activation,
        "fc2_input": fc2_input.values,
        "fc2_factor": fc2_input.factor,
        "fc2_accumulators": fc2_accumulators,
        "fc2_output": fc2_output,
    }
    return output, kept if keep else {}


def _gemm(
    experts: HummingExperts,
    gemm: str,
    x: Tensor,
    rows: Rows,
    multiply: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """The accumulators of all rows, `[R, N] float32`."""
    results = []
    for expert, some in rows.by_expert:
        packed, offsets = experts.weights(gemm, expert)
        assert offsets is not None
        results.append(multiply(x[some], packed[0], offsets[0]))
    return torch.cat(results)
