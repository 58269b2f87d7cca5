"""The named defects as hypotheses: points of families that have a name, a story and a thread."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from mxfp4ref.conformance.families.hypothesis import STAGES, Hypothesis, Pipeline, fields_set
from mxfp4ref.defects import DEFECTS, Defect, activation, arguments, finalize, gemm, weights
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import KERNEL

__all__ = ["NUMBER_OF_NAMES", "named_hypotheses", "stages_of"]

_BY_MODULE = (
    (weights, ("fc1", "fc2")),
    (gemm, ("fc1", "fc2")),
    (activation, ("activation",)),
    (finalize, ("finalize",)),
)
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


def stages_of(defect: Defect) -> tuple[str, ...]:
    """Where a named defect lies, one or two stages."""
    if defect.target != "moe":
        return (defect.target,) if defect.target in STAGES else ()
    if (stages := _BY_NAME.get(defect.name)) is not None:
        return stages
    for module, stages in _BY_MODULE:
        if defect.name in vars(module):
            return stages
    return ("activation",) if defect.name in vars(arguments) else ("fc1", "activation")


NUMBER_OF_NAMES = sum(defect.target == "moe" for defect in DEFECTS.values())


def named_hypotheses(call: MoeCall) -> Iterator[Hypothesis]:
    """All that can show on the call, the quick ones first."""
    found = [d for d in DEFECTS.values() if d.target == "moe"]
    for defect in sorted(found, key=lambda d: _slow(d)):
        yield Hypothesis(
            "named",
            stages_of(defect),
            f"{defect.name}: {defect.summary}",
            lambda p, d=defect: _running(p, d),
            0.5,
            name=defect.name,
            slow=_slow(defect),
        )


def _slow(defect: Defect) -> bool:
    return defect.name in vars(gemm) or defect.name in ("act_kept_fp32", "minus_zero_kept")


def _running(pipeline: Pipeline, defect: Defect) -> Pipeline:
    if not defect.applies(pipeline.call):
        return pipeline
    pipeline.check_open()
    assert defect.change is not None
    call, stages = defect.change(pipeline.call)
    return replace(pipeline, call=call).staging(**fields_set(KERNEL, stages))
