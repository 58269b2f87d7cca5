"""What goes into an output element: the token's row, and what each of its experts gives."""

from __future__ import annotations

import torch
from torch import Tensor

from mxfp4ref.conformance.findings.reduction import local_experts
from mxfp4ref.conformance.findings.stage_fit import numbers
from mxfp4ref.formats.mxfp4 import GROUP_SIZE
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import MoeTrace
from mxfp4ref.sm90 import fp32

__all__ = ["feeds_of", "feeds_of_quantizer"]


def feeds_of(call: MoeCall, one: MoeTrace, token: int, column: int) -> tuple[str, ...]:
    """What goes into output element [token, column], a line each; `one` is the trace of that token alone."""
    x = fp32.widen(call.input[token])
    ids = call.token_selected_experts[token]
    local = local_experts(call)[token]
    lines = [
        f"input[{token}]: {int(torch.isfinite(x).sum()):,} of {x.numel():,} finite, "
        f"largest {float(x.nan_to_num(0, 0, 0).abs().max()):.6g}, starts {numbers(x[:4])}"
    ]
    for slot, (global_id, expert) in enumerate(zip(ids.tolist(), local.tolist(), strict=True)):
        scale = float(call.token_final_scales[token, slot])
        if expert < 0:
            lines.append(f"slot {slot}: id {global_id} is not on this rank or repeated, skipped")
            continue
        row = int((one.slot == slot).nonzero()[0])
        activation = fp32.widen(one.activation[row])
        bias = call.experts.fc2_biases
        words = (
            f", fc2 bias {float(bias[expert, column]):.9g}" if bias is not None and call.tp_rank == 0 else ""
        )
        lines.append(
            f"slot {slot}: expert {global_id}, weight {scale:.9g}, GEMM2 gives "
            f"{float(one.fc2_output[row, column]):.9g}{words}; activation starts {numbers(activation[:4])}"
        )
    return tuple(lines)


def feeds_of_quantizer(values: Tensor, index: tuple[int, ...], output: str) -> tuple[str, ...]:
    """What goes into an element of `packed`, two values, or of `scales`: these, and their group."""
    size = 2 if output == "packed" else GROUP_SIZE
    first, row = index[-1] * size, values[index[:-1]].float()
    start = first // GROUP_SIZE * GROUP_SIZE
    group = row[start : start + GROUP_SIZE]
    where = f"group {start // GROUP_SIZE} of the row, values [{start}, {start + GROUP_SIZE - 1}]"
    largest = f"{where}: largest magnitude {float(group.abs().max()):.9g}"
    return (f"values from {first} on: {numbers(row[first : first + min(size, 4)])}", largest)
