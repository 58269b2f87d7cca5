"""What goes into an output element: the token's row, and what each of its experts gives."""

from __future__ import annotations

import torch

from mxfp4ref.conformance.reduction import local_experts
from mxfp4ref.conformance.stage_fit import numbers
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import MoeTrace
from mxfp4ref.sm90 import fp32

__all__ = ["feeds_of"]


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
