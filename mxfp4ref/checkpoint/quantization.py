"""What a quantization_config says of the experts, by the tool that wrote it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mxfp4ref._validate import shown

__all__ = ["not_mxfp4"]

_SCHEMES = "mxfp4, fp8 with expert_dtype fp4, compressed-tensors, quark or modelopt"


def not_mxfp4(scheme: Mapping[str, Any]) -> str:
    """What in a quantization_config says that the experts' weights are not MXFP4, in words; "" if nothing does."""
    method = scheme.get("quant_method")
    if method in (None, "mxfp4", "fp8"):  # fp8: DeepSeek's, whose experts are a matter of expert_dtype
        return ""
    if method == "compressed-tensors":
        groups = _objects(scheme.get("config_groups"))
        formats = [scheme.get("format"), *(group.get("format") for group in groups)]
        if "mxfp4-pack-quantized" not in formats:
            return f"format: expected 'mxfp4-pack-quantized', got {shown(formats[0])}"
        transforms = _objects([scheme.get("transform_config")])
        steps = [
            step
            for each in transforms
            for group in _objects(each.get("config_groups"))
            for step in _objects(group.get("apply"))
        ]
        if any(step.get("location") in ("input", "output") for step in steps):
            return "transform_config: expected no transform of the activations, which is not modelled"
        return ""
    if method == "quark":
        if any(
            str(step.get("name")) == "rotation" and any("online" in key and step[key] for key in step)
            for step in _objects(scheme.get("algo_config"))
        ):
            return "algo_config: expected no rotation of the activations, which is not modelled"
        layers = _objects(scheme.get("layer_quant_config"))
        weights = [part.get("weight") for part in (*_objects([scheme.get("global_quant_config")]), *layers)]
        if not any(
            part.get("dtype") in ("fp4", "mxfp4") for weight in weights for part in _objects([weight])
        ):
            return "global_quant_config.weight.dtype: expected 'fp4', found it nowhere"
        return ""
    if method == "modelopt":
        wanted = {"MXFP4", "W4A8_MXFP4_FP8"}
        layers = _objects(scheme.get("quantized_layers"))
        algorithms = [scheme.get("quant_algo"), *(part.get("quant_algo") for part in layers)]
        if not wanted & {a for a in algorithms if isinstance(a, str)}:
            return f"quant_algo: expected {' or '.join(sorted(wanted))}, got {shown(algorithms[0])}"
        return ""
    return f"quant_method: expected {_SCHEMES}, got {shown(method)}"


def _objects(value: object) -> list[dict[str, Any]]:
    """The JSON objects in a list, or among the values of an object."""
    found: Iterable[object] = (
        value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    )
    flat = [item for part in found for item in (part if isinstance(part, list) else [part])]
    return [item for item in flat if isinstance(item, dict)]
