"""The stages in which a named defect lies. Nothing here needs torch, which takes seconds to import."""

from __future__ import annotations

from mxfp4ref.conformance.findings.finding import STAGES
from mxfp4ref.conformance.source import written_defects

__all__ = ["stages_of"]

_BY_MODULE = {
    "weights": ("fc1", "fc2"),
    "gemm": ("fc1", "fc2"),
    "activation": ("activation",),
    "finalize": ("finalize",),
    "arguments": ("activation",),
}
_BY_NAME = {
    **dict.fromkeys(
        ("gate_up_swapped", "gate_up_interleaved", "scales_not_swapped", "padding_end_of_fused"), ("fc1",)
    ),
    **dict.fromkeys(
        ("biases_not_swapped", "bias1_before_rounding", "bias1_bf16", "bias1_ignored"), ("fc1", "activation")
    ),
    **dict.fromkeys(
        ("limit_ignored", "alpha_ignored", "beta_ignored", "all_or_none_params", "params_by_global_id"),
        ("activation",),
    ),
    **dict.fromkeys(("params_of_first_expert", "params_bf16"), ("activation",)),
    **dict.fromkeys(
        ("bias2_ignored", "bias2_on_every_tp_rank", "bias2_before_rounding"), ("finalize", "fc2")
    ),
    **dict.fromkeys(("weight_in_gemm2_epilogue", "gemm2_kept_fp32", "fc2_truncated"), ("fc2", "finalize")),
    "subnormal_input_flushed": ("input",),
    "weights_bf16": ("finalize", "routing"),
    **dict.fromkeys(
        (
            *("ep_double_mapping", "ep_sentinel_aliases", "ep_offset_dropped"),
            "ep_ids_modulo",
        ),
        ("slots",),
    ),
    "last_slot_dropped": ("slots", "finalize"),
    **dict.fromkeys(("gemm1_kept_fp32", "fc1_truncated"), ("fc1", "activation")),
    **dict.fromkeys(("act_kept_fp32", "activation_truncated", "activation_fp16"), ("activation", "fc2")),
    "weight_before_gemm2": ("activation", "finalize"),
    **dict.fromkeys(("output_truncated", "nan_as_7fc0", "nan_as_ffc0"), ("finalize",)),
    **dict.fromkeys(("round_half_away", "bf16_saturates"), ("fc1", "finalize")),
    "minus_zero_kept": ("fc2", "finalize"),
}


def stages_of(name: str) -> tuple[str, ...]:
    """Where a named defect lies, one or two stages."""
    defect = written_defects()[name]
    if defect.target != "moe":
        return (defect.target,) if defect.target in STAGES else ()
    return _BY_NAME.get(name) or _BY_MODULE.get(defect.module, ("fc1", "activation"))
