"""The runs that a golden case asks for, and this package's answer to each kind of case.

A case of kind "moe" is a kernel call with a legitimate output for each pair of K tiles. The other kinds test one
stage; a stage's function takes a case's tensors and parameters by name and returns its output, or a mapping:

    quantize     values, rule                                              -> packed, scales
    dequantize   packed, scales, convention, dtype                         -> values
    layout       before, operation, and its parameters                     -> after
    tensor_core  a, b, c                                                   -> d
    gemm         x, packed, scales, tile_k                                 -> accumulators
    activation   fc1_output, activation_type, and its parameters           -> activation
    finalize     fc2_output, local_experts, token_final_scales, fc2_biases -> output
    routing      preset, logits, and the preset's arguments                -> ids, scales

and for W4A8

    w4a8             the arguments of `model.humming.call_of`  -> output
    preparation      packed, scales                            -> codes, offsets, residual
    fp8_rows         x, residual                               -> values, factor
    fp8_tensor_core  a, b, c                                   -> d
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mxfp4ref._choices import ScaleRule
from mxfp4ref._validate import check_choice
from mxfp4ref._words import did_you_mean
from mxfp4ref.formats import humming, layout
from mxfp4ref.formats.experts import PARAMETERS
from mxfp4ref.formats.generations import generation_named
from mxfp4ref.formats.mxfp4 import dequantize
from mxfp4ref.formats.quantize import quantize
from mxfp4ref.goldens.case import Case
from mxfp4ref.goldens.store import GoldenError
from mxfp4ref.model.forward import forward
from mxfp4ref.model.humming import call_of
from mxfp4ref.routing import presets as routing
from mxfp4ref.sm90 import fp8, fp32, tensor_core
from mxfp4ref.sm90.activation import ACTIVATIONS, SWIGLU, activate, activation_of
from mxfp4ref.sm90.finalize import finalize
from mxfp4ref.sm90.gemm.cpu import group_scaled_gemm
from mxfp4ref.sm90.row_quantize import quantize_rows
from mxfp4ref.sm90.tactics import Sm90Kernel

__all__ = ["OUTPUTS", "Run", "run_stage", "runs"]

# What each kind of case has to give.
OUTPUTS: dict[str, tuple[str, ...]] = {
    "moe": ("output",),
    "quantize": ("packed", "scales"),
    "dequantize": ("values",),
    "layout": ("after",),
    "tensor_core": ("d",),
    "gemm": ("accumulators",),
    "activation": ("activation",),
    "finalize": ("output",),
    "routing": ("ids", "scales"),
    "w4a8": ("output",),
    "preparation": ("codes", "offsets", "residual"),
    "fp8_rows": ("values", "factor"),
    "fp8_tensor_core": ("d",),
}
# Further stored results that are no inputs.
_RESULTS = ("activation_float32", "output_float32", "ambiguous")


@dataclass(frozen=True, eq=False)
class Run:
    """One run of a case: the tiles it is for ("" where there are none), the inputs, the expected outputs.

    Of a part of a call `first_token` is the whole call's token that its first one is.
    """

    tiles: str
    inputs: Any
    expected: Mapping[str, Tensor]
    first_token: int = 0


def runs(case: Case) -> list[Run]:
    """The runs of a case; more than one where the output depends on the K tiles.

    Raises:
        GoldenError: the case lacks tensors or parameters of its kind, or has others than the kind can take.
    """
    try:
        if found := _runs(case):
            return found
        raise GoldenError(f"{case.id}: expected an output of kind {case.kind} to compare with, got none")
    except GoldenError:
        raise
    except (LookupError, TypeError, ValueError) as error:
        raise GoldenError(
            f"{case.id}: not a case of kind {case.kind}: {type(error).__name__}: {error}"
        ) from error


def _runs(case: Case) -> list[Run]:
    if case.kind == "moe":
        return [
            Run("{}x{}".format(*pair), case.call(Sm90Kernel.of_tiles(pair)), {"output": output})
            for pair, output in case.outputs.items()
        ]
    names = OUTPUTS[case.kind]
    prefix = "accumulators.tile_k_"
    inputs: dict[str, Any] = {
        name: tensor
        for name, tensor in case.tensors.items()
        if name not in (*names, *_RESULTS) and not name.startswith(prefix)
    }
    inputs |= case.parameters
    if case.kind == "gemm":
        tiles = [name.removeprefix(prefix) for name in case.tensors if name.startswith(prefix)]
        return [
            Run(tile, {**inputs, "tile_k": int(tile)}, {"accumulators": case.tensors[prefix + tile]})
            for tile in sorted(tiles, key=int)
        ]
    return [Run("", inputs, {name: case.tensors[name] for name in names})]


def run_stage(kind: str, inputs: Any) -> Tensor | Mapping[str, Tensor]:
    """This package's output for a case of any kind."""
    return forward(inputs) if kind == "moe" else _STAGES[kind](**inputs)


def _quantize(values: Tensor, rule: ScaleRule) -> dict[str, Tensor]:
    packed, scales = quantize(values, rule=rule)
    return {"packed": packed, "scales": scales}


def _dequantize(packed: Tensor, scales: Tensor, convention: str, dtype: str) -> Tensor:
    return dequantize(packed, scales, convention=convention, dtype=getattr(torch, dtype, None))  # type: ignore[arg-type]


def _layout(before: Tensor, operation: str, **parameters: Any) -> Tensor:
    check_choice("operation", operation, layout.__all__)
    if "generation" in parameters:
        parameters["generation"] = generation_named(parameters["generation"])
    moved: Tensor = getattr(layout, operation)(before, **parameters)
    return moved


def _gemm(x: Tensor, packed: Tensor, scales: Tensor, tile_k: int) -> Tensor:
    tactic = Sm90Kernel.of_tiles((tile_k, tile_k)).gemm1
    return group_scaled_gemm(x[None], packed[None], scales[None], tactic=tactic)[0]


def _activation(fc1_output: Tensor, activation_type: int = SWIGLU, **parameters: Tensor) -> Tensor:
    unknown = set(parameters).difference(PARAMETERS)
    if activation_type not in ACTIVATIONS or unknown:
        raise TypeError(
            f"expected an activation and its parameters, got {activation_type} with {sorted(parameters)}"
            f"{did_you_mean(next(iter(unknown), None), PARAMETERS)}"
        )
    activation = activation_of(activation_type, parameters)
    given = [parameters.get(name) for name in activation.defaults]
    return fp32.to_bf16(activate(activation, fc1_output, None, given))


def _finalize(
    fc2_output: Tensor, local_experts: Tensor, token_final_scales: Tensor, fc2_biases: Tensor | None = None
) -> Tensor:
    return fp32.to_bf16(finalize(fc2_output, local_experts.to(torch.int64), token_final_scales, fc2_biases))


def routing_options(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A routing case's inputs as the preset's arguments, without the preset and the logits."""
    options = {name: value for name, value in inputs.items() if name not in ("preset", "logits")}
    if "routed_scaling" in options:
        options["routed_scaling"] = routing.RoutedScaling(options["routed_scaling"])
    return options


def _routing(**inputs: Any) -> dict[str, Tensor]:
    routed = routing.ROUTERS[inputs["preset"]](inputs["logits"], **routing_options(inputs))
    return {"ids": routed.ids, "scales": routed.scales}


def _w4a8(**inputs: Any) -> Tensor:
    return forward(call_of(inputs))


def _preparation(packed: Tensor, scales: Tensor) -> dict[str, Tensor]:
    prepared = humming.prepare(packed, scales)
    return {"codes": prepared.packed, "offsets": prepared.offsets, "residual": prepared.residual}


def _fp8_rows(x: Tensor, residual: Tensor) -> dict[str, Tensor]:
    return quantize_rows(x, residual)._asdict()


_STAGES: dict[str, Callable[..., Tensor | Mapping[str, Tensor]]] = {
    "quantize": _quantize,
    "dequantize": _dequantize,
    "layout": _layout,
    "tensor_core": tensor_core.step,
    "gemm": _gemm,
    "activation": _activation,
    "finalize": _finalize,
    "routing": _routing,
    "w4a8": _w4a8,
    "preparation": _preparation,
    "fp8_rows": _fp8_rows,
    "fp8_tensor_core": fp8.step,
}
