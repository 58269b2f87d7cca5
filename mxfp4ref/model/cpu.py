"""The forward on a CPU by compiled loops, from bits to bits: the stages of `forward` without what joins them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from mxfp4ref._compiled import as_numpy
from mxfp4ref._spans import spans
from mxfp4ref.formats.humming_experts import HummingExperts
from mxfp4ref.formats.mxfp4 import GROUP_SIZE
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.rows import Array, Rows, local_experts, route
from mxfp4ref.sm90.elementwise import activated, elementwise_loops, parameter_rows, rounded, weighted_sum
from mxfp4ref.sm90.gemm.compiled import compiled_loops, grouped_gemm
from mxfp4ref.sm90.gemm.order import group_order

__all__ = ["ROWS_AT_ONCE", "TOKENS_AT_ONCE", "forward_in_parts", "gemm", "usable"]

TOKENS_AT_ONCE = 512  # bounds the memory of the per-slot outputs; tokens do not influence each other
ROWS_AT_ONCE = 256  # of the activation, likewise
_DTYPES = {2: torch.bfloat16, 4: torch.float32}  # by the bytes of an element


def usable(call: MoeCall) -> bool:
    """Whether a call's forward is computed here: MXFP4 beside bf16, on a CPU that the loops compile for."""
    if (
        call.input.device.type != "cpu"
        or not call.experts.quantized
        or isinstance(call.experts, HummingExperts)
    ):
        return False
    elements = elementwise_loops()
    return (
        compiled_loops() is not None and elements is not None and call.activation.id in elements.ACTIVATIONS
    )


def forward_in_parts(call: MoeCall, *, keep: bool) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Outputs `[M, H] bf16` and, if they are to be kept, the intermediates by name, for some tokens at a time."""
    x, ids = as_numpy(call.input, np.int16), as_numpy(call.token_selected_experts, np.int32)
    scales, before = as_numpy(call.token_final_scales, np.int32), np.zeros(call.experts.num_experts, np.int64)
    for tokens in spans(max(call.num_tokens, 1), TOKENS_AT_ONCE):
        local = local_experts(ids[tokens], call.experts.num_experts, call.ep_rank)
        rows = route(local, before)
        computed = _forward(call, x[tokens], rows, local, scales[tokens])
        of_rows = {"token": rows.token + tokens.start, "slot": rows.slot, "expert": rows.expert}
        tensors = {
            name: torch.from_numpy(bits).view(_DTYPES[bits.itemsize]) for name, bits in computed.items()
        }
        output = tensors.pop("output")
        yield (
            output,
            tensors | {n: torch.from_numpy(numbers) for n, numbers in of_rows.items()} if keep else {},
        )


def _forward(call: MoeCall, x: Array, rows: Rows, local: Array, scales: Array) -> dict[str, Array]:
    """The bits of what the stages give, by name."""
    fc1_accumulators = gemm(call, 0, x[rows.token], rows)
    fc1_output = rounded(elementwise_loops(), fc1_accumulators)
    activation = _activation(call, fc1_output, rows.expert)
    fc2_accumulators = gemm(call, 1, activation, rows)
    fc2_output = rounded(elementwise_loops(), fc2_accumulators)
    by_slot = np.empty((*local.shape, fc2_output.shape[1]), np.int16)
    by_slot[rows.token, rows.slot] = fc2_output
    bias = call.experts.fc2_biases if call.tp_rank == 0 else None
    added = None if bias is None else as_numpy(bias, np.int16)
    output = rounded(elementwise_loops(), weighted_sum(elementwise_loops(), by_slot, local, scales, added))
    return {
        "fc1_accumulators": fc1_accumulators,
        "fc1_output": fc1_output,
        "activation": activation,
        "fc2_accumulators": fc2_accumulators,
        "fc2_output": fc2_output,
        "output": output,
    }


def gemm(call: MoeCall, which: int, x: Array, rows: Rows) -> Array:
    """The accumulators of GEMM1 (`which` 0) or GEMM2 (1), as bits."""
    tactic, generation = call.kernel.tactics[which], call.kernel.generation
    weights = call.experts.stored(("fc1", "fc2")[which], rows.used)
    order = group_order(x.shape[1] // GROUP_SIZE, tactic.tile_k, generation)
    swapped = np.asarray(generation.first_pair_swapped(rows.position, tactic.tile_n, tactic.tile_k))
    return grouped_gemm(compiled_loops(), x, rows.ends, weights, order, swapped)


def _activation(call: MoeCall, fc1_output: Array, expert: Array) -> Array:
    """The activation in bf16, with the bias and the parameters of each row's expert."""
    activation, experts = call.activation, call.experts
    bias = None if experts.fc1_biases is None else as_numpy(experts.fc1_biases, np.int16)
    given = [getattr(experts, name) for name in activation.defaults]
    parameters = parameter_rows(activation, given, (experts.num_experts,))
    out = np.empty((len(fc1_output), experts.intermediate_size), np.int16)
    for some in spans(len(out), ROWS_AT_ONCE):
        added = None if bias is None else bias[expert[some]]
        of_rows = parameters.take(expert[some], 1)
        out[some] = rounded(
            elementwise_loops(),
            activated(elementwise_loops(), activation.id, fc1_output[some], added, of_rows),
        )
    return out
