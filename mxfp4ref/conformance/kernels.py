"""Kernels under test: named stand-ins, flashinfer's own, and anybody's function by its import path.

What a kernel specification may be:

    oracle                     this package's own forward
    defect:NAME                a named wrong pipeline of `mxfp4ref.defects`
    torch-bf16                 dequantise to bf16, torch matmuls: the reference that most projects use
    flashinfer                 the installed flashinfer's kernel, with layouts made by its own helpers
    package.module:function    a function with flashinfer's signature, SM90 layouts
    logical:package.module:f   the same signature with weights and scales in logical layout
    plain:package.module:f     f(x, ids, scales, w1, s1, w2, s2, **parameters), logical layout
    stage:KIND:package.module:f    one stage; KIND and its arguments are those of the golden cases
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mxfp4ref.conformance.comparison import differing
from mxfp4ref.defects import Defect, DequantizeCall, RoutingCall, get_defect
from mxfp4ref.formats.generations import NEWEST, Generation, generation_of
from mxfp4ref.formats.layout import fold_scales_sm90, interleave_weights_sm90
from mxfp4ref.formats.mxfp4 import dequantize
from mxfp4ref.goldens.runs import OUTPUTS, routing_options, run_stage
from mxfp4ref.goldens.store import KINDS
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import Stages, forward
from mxfp4ref.sm90.tactics import Sm90Kernel

__all__ = [
    "Kernel",
    "KernelError",
    "Skip",
    "defect_outputs",
    "is_poison",
    "load_kernel",
    "outputs_by_name",
    "poisoned",
]

STAND_INS = ("oracle", "torch-bf16", "defect:NAME", "flashinfer")
_POISON = 0x7FA5  # a bf16 NaN that no arithmetic produces


class KernelError(ValueError):
    """The kernel cannot be loaded or used here; the message says why."""


class Skip(Exception):
    """The kernel cannot take this case, through no fault of its own."""


@dataclass(frozen=True)
class Kernel:
    """A function under test and how it is called.

    Attributes:
        name: the specification it was loaded from.
        kinds: the kinds of golden cases it can run.
        prepare: turns a case's inputs into positional and keyword arguments; may raise `Skip`, or ValueError
            where something of the kernel's that is not the function itself is wrong.
        function: the callable.
        forces_tile_k: whether the call says which K tiles the kernel uses. If it does, each legitimate pair is
            run and compared with its own output; if not, one run may agree with any of them.
        device: where the tensors go.
        force: makes a kernel that uses the given tactics; None where tactics cannot be chosen.
        generation: of the SM90 kernel that it claims to be; goldens are of the newest.
    """

    name: str
    kinds: tuple[str, ...]
    prepare: Callable[[str, Any], tuple[tuple[Any, ...], dict[str, Any]]]
    function: Callable[..., Any]
    forces_tile_k: bool = False
    device: str = "cpu"
    force: Callable[[Sm90Kernel], Kernel] | None = None
    generation: Generation = NEWEST


def load_kernel(spec: str | Callable[..., Any], device: str | None = None) -> Kernel:
    """The kernel that a specification (see the module's text) or a callable with flashinfer's signature names.

    Args:
        spec: the specification, or the callable itself.
        device: where its tensors go; by default the CPU, and CUDA for `flashinfer`.

    Raises:
        KernelError: it names nothing that can be imported, or nothing that can run here.
    """
    if callable(spec):
        name = getattr(spec, "__qualname__", type(spec).__name__)
        return Kernel(name, ("moe",), _sm90_arguments(spec), spec, device=device or "cpu")
    head, _, rest = spec.partition(":")
    if spec == "oracle":
        return Kernel(spec, KINDS, _whole, run_stage, forces_tile_k=True, device=device or "cpu")
    if spec == "torch-bf16":
        return Kernel(spec, ("moe",), _whole, _torch_bf16, device=device or "cpu")
    if spec == "flashinfer":
        return _flashinfer(device or "cuda")
    if head == "defect":
        return _defect(rest, device or "cpu")
    if head in ("logical", "plain"):
        function = _import(rest)
        prepare = _logical_arguments(function) if head == "logical" else _plain_arguments
        return Kernel(spec, ("moe",), prepare, function, device=device or "cpu")
    if head == "stage":
        kind, _, path = rest.partition(":")
        if kind not in KINDS or kind == "moe":
            stages = ", ".join(k for k in KINDS if k != "moe")
            raise KernelError(
                f"kernel: expected stage:KIND:package.module:function, KIND one of {stages}; got {spec!r}"
            )
        return Kernel(spec, (kind,), _keywords, _import(path), device=device or "cpu")
    function = _import(spec)
    return Kernel(spec, ("moe",), _sm90_arguments(function), function, device=device or "cpu")


def poisoned(like: Tensor) -> Tensor:
    """A bf16 tensor of the same shape and device, every element the poison NaN 0x7FA5."""
    return torch.full(like.shape, _POISON, dtype=torch.int16, device=like.device).view(torch.bfloat16)


def is_poison(output: Tensor) -> Tensor:
    """Where a bf16 tensor still holds the poison, as bool."""
    return output.contiguous().view(torch.int16) == _POISON


def _import(path: str) -> Callable[..., Any]:
    module_name, separator, name = path.partition(":")
    if not separator or not module_name or not name:
        raise KernelError(
            f"kernel: expected package.module:function or one of {', '.join(STAND_INS)}, got {path!r}"
        )
    try:
        value: Any = importlib.import_module(module_name)
    except Exception as error:
        raise KernelError(
            f"kernel: cannot import {module_name!r}: {type(error).__name__}: {error}"
        ) from error
    for part in name.split("."):
        if not hasattr(value, part):
            raise KernelError(f"kernel: {module_name!r} has no {name!r}")
        value = getattr(value, part)
    if not callable(value):
        raise KernelError(f"kernel: {path!r} is no function but {type(value).__name__}")
    function: Callable[..., Any] = value
    return function


def _whole(kind: str, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (kind, inputs), {}


def _keywords(kind: str, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (), dict(inputs)


def _plain_arguments(kind: str, call: MoeCall) -> tuple[tuple[Any, ...], dict[str, Any]]:
    experts = call.experts
    optional = {name: getattr(experts, name) for name in _OPTIONAL}
    parallel = {
        f"{p}_{what}": getattr(call, f"{p}_{what}") for p in ("ep", "tp") for what in ("size", "rank")
    }
    given = {name: value for name, value in optional.items() if value is not None}
    given |= {name: value for name, value in parallel.items() if parallel[name[:3] + "size"] != 1}
    positional = (
        call.input,
        call.token_selected_experts,
        call.token_final_scales,
        experts.fc1_weights,
        experts.fc1_scales,
        experts.fc2_weights,
        experts.fc2_scales,
    )
    return positional, given


_OPTIONAL = ("fc1_biases", "fc2_biases", "swiglu_alpha", "swiglu_beta", "swiglu_limit")


def _logical_arguments(
    function: Callable[..., Any],
) -> Callable[[str, Any], tuple[tuple[Any, ...], dict[str, Any]]]:
    """flashinfer's arguments; `output` only where the function takes one."""
    takes_output = _takes(function, "output")

    def prepare(kind: str, call: MoeCall) -> tuple[tuple[Any, ...], dict[str, Any]]:
        experts = call.experts
        keywords: dict[str, Any] = {
            "input": call.input,
            "token_selected_experts": call.token_selected_experts,
            "token_final_scales": call.token_final_scales,
            "fc1_expert_weights": experts.fc1_weights,
            "fc2_expert_weights": experts.fc2_weights,
            "output_dtype": torch.bfloat16,
            "quant_scales": [experts.fc1_scales, experts.fc2_scales],
            "use_w4_group_scaling": True,
            "tp_size": call.tp_size,
            "tp_rank": call.tp_rank,
            "ep_size": call.ep_size,
            "ep_rank": call.ep_rank,
        }
        for name in _OPTIONAL:
            value = getattr(experts, name)
            if value is not None:
                keywords[name.replace("_biases", "_expert_biases")] = value
        if takes_output:
            keywords["output"] = poisoned(call.input)
        return (), keywords

    return prepare


def _sm90_arguments(
    function: Callable[..., Any],
    weights: Callable[[Tensor], Tensor] = interleave_weights_sm90,
    scales: Callable[[Tensor], Tensor] = fold_scales_sm90,
) -> Callable[[str, Any], tuple[tuple[Any, ...], dict[str, Any]]]:
    """flashinfer's arguments with the weights and scales in the layouts of the real call."""
    logical = _logical_arguments(function)

    def prepare(kind: str, call: MoeCall) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if not call.experts.quantized:
            raise Skip("the experts are not quantised")
        rows = (call.experts.fc1_weights.shape[1], call.experts.fc2_weights.shape[1])
        depths = (call.experts.hidden_size, call.experts.intermediate_size)
        if any(r % 64 for r in rows) or any(k % 128 for k in depths):
            raise Skip("the SM90 layouts need rows in multiples of 64 and K in multiples of 128")
        positional, keywords = logical(kind, call)
        for name in ("fc1_expert_weights", "fc2_expert_weights"):
            keywords[name] = weights(keywords[name])
        keywords["quant_scales"] = [scales(value).view(torch.int32) for value in keywords["quant_scales"]]
        return positional, keywords

    return prepare


def _flashinfer(device: str) -> Kernel:
    """The installed flashinfer; its layout helpers have to give the bytes that ours give."""
    try:
        version = importlib.import_module("flashinfer").__version__
        fused_moe = importlib.import_module("flashinfer.fused_moe")
        function = fused_moe.cutlass_fused_moe
        their_weights = fused_moe.interleave_moe_weights_for_sm90_mixed_gemm
        their_scales = fused_moe.interleave_moe_scales_for_sm90_mixed_gemm
        generation = generation_of(version)
    except (ImportError, AttributeError, ValueError) as error:
        raise KernelError(f"kernel: flashinfer: {type(error).__name__}: {error}") from error
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise KernelError("kernel: flashinfer needs a CUDA device, and torch sees none here")

    @_remembering
    def weights(packed: Tensor) -> Tensor:
        helper = "interleave_moe_weights_for_sm90_mixed_gemm"
        return _agreed(helper, their_weights(packed, "fp4"), interleave_weights_sm90(packed, generation))

    @_remembering
    def scales(logical: Tensor) -> Tensor:
        helper = "interleave_moe_scales_for_sm90_mixed_gemm"
        return _agreed(helper, their_scales(logical, 32), fold_scales_sm90(logical, generation))

    prepare_layouts = _sm90_arguments(function, weights, scales)

    def prepare(
        kind: str, call: MoeCall, forced: Sm90Kernel | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        positional, keywords = prepare_layouts(kind, call)
        keywords["enable_pdl"] = False
        biases = ("fc1_expert_biases", "fc2_expert_biases")
        if sum(name in keywords for name in biases) == 1:
            # The real call takes both or none. Adding +0 changes nothing, since a GEMM never gives -0.
            for name, like in zip(biases, ("fc1_weights", "fc2_weights"), strict=True):
                shape = getattr(call.experts, like).shape[:2]
                keywords.setdefault(name, call.input.new_zeros(shape))
        if generation.forces_tactics:
            keywords["profile_ids"] = (forced or call.kernel).profile_ids
        return positional, keywords

    kernel = Kernel(
        "flashinfer", ("moe",), prepare, function, generation.forces_tactics, device, generation=generation
    )
    if not generation.forces_tactics:
        return kernel
    return replace(
        kernel, force=lambda forced: replace(kernel, prepare=functools.partial(prepare, forced=forced))
    )


def _remembering(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The function with its results for the last two tensors, those of GEMM1 and GEMM2, kept for the next tactic."""
    kept: list[tuple[Tensor, Tensor]] = []

    def remembered(argument: Tensor) -> Tensor:
        for source, result in kept:
            if source is argument:
                return result
        kept.append((argument, function(argument)))
        del kept[:-2]
        return kept[-1][1]

    return remembered


def _agreed(helper: str, theirs: Tensor, ours: Tensor) -> Tensor:
    if theirs.shape != ours.shape or theirs.dtype != ours.dtype:
        raise ValueError(
            f"flashinfer's {helper} gave {theirs.dtype} {list(theirs.shape)}, expected {ours.dtype} "
            f"{list(ours.shape)}"
        )
    different = differing(theirs, ours)
    if bool(different.any()):
        first = different.nonzero()[0].tolist()
        raise ValueError(
            f"flashinfer's {helper} gave other bytes than the specification's layout: {int(different.sum()):,} of "
            f"{ours.numel():,}, the first at {first}"
        )
    return theirs


def _takes(function: Callable[..., Any], name: str) -> bool:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _defect(name: str, device: str) -> Kernel:
    try:
        defect = get_defect(name)
    except ValueError as error:
        raise KernelError(f"kernel: {error}") from error

    def run(kind: str, inputs: Any) -> Any:
        outputs = defect_outputs(defect, inputs)
        return run_stage(kind, inputs) if outputs is None else outputs

    return Kernel(
        f"defect:{name}", (defect.target,), _defect_arguments, run, forces_tile_k=True, device=device
    )


def _defect_arguments(kind: str, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if kind == "dequantize" and inputs["dtype"] != "bfloat16":
        raise Skip("the defects of dequantisation give bf16")
    return (kind, inputs), {}


def defect_outputs(defect: Defect, inputs: Any) -> dict[str, Tensor] | None:
    """What a defect makes of a golden case's inputs, by name; None where it says that it cannot show."""
    call = inputs
    if defect.target == "routing":
        call = RoutingCall(inputs["preset"], inputs["logits"], routing_options(inputs))
    elif defect.target == "dequantize":
        call = DequantizeCall(inputs["packed"], inputs["scales"], inputs["convention"])
    if not defect.applies(call):
        return None
    result = defect.run(call)
    if defect.target == "routing":
        return {"ids": result.ids, "scales": result.scales}
    return {"values" if defect.target == "dequantize" else "output": result}


def _torch_bf16(kind: str, call: MoeCall) -> Tensor:
    """Weights dequantised to bf16; float32 matmuls, bf16 between the stages; torch's sigmoid; float32 sum.

    A bf16 matmul is a float32 one whose result is rounded; said in this way it is the same on every machine
    that has float32.
    """
    return forward(call, _TORCH_BF16)


def _matmul(x: Tensor, weights: Tensor, scales: Tensor, **_tactic: object) -> Tensor:
    dense = dequantize(weights, scales, dtype=torch.bfloat16)
    return x.to(torch.float32) @ dense.to(torch.float32).transpose(-1, -2)


def _torch_swiglu(
    fc1_output: Tensor,
    bias: Tensor | None = None,
    alpha: Tensor | None = None,
    beta: Tensor | None = None,
    limit: Tensor | None = None,
) -> Tensor:
    value = fc1_output.to(torch.float32)
    if bias is not None:
        value = value + bias.to(torch.float32)
    up, gate = value.chunk(2, dim=-1)
    if limit is not None:
        up, gate = torch.minimum(torch.maximum(up, -limit), limit), torch.minimum(gate, limit)
    scaled = gate if alpha is None else gate * alpha
    return gate * torch.sigmoid(scaled) * (up if beta is None else up + beta)


_TORCH_BF16 = replace(Stages(), fc1_gemm=_matmul, fc2_gemm=_matmul, swiglu=_torch_swiglu)


def outputs_by_name(kind: str, result: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A kernel's return value as outputs by name; intermediates too where it returned `(output, mapping)`.

    A function that returns None is taken to have written into the `output` it was given.
    """
    if isinstance(result, Mapping):
        return dict(result)
    if kind != "moe":
        return {OUTPUTS[kind][0]: result}
    stages: Mapping[str, Any] = {}
    if isinstance(result, tuple) and len(result) == 2 and not isinstance(result[1], Tensor):
        result, found = result
        stages = found if isinstance(found, Mapping) else vars(found)
    if isinstance(result, list | tuple) and result:
        result = result[0]  # flashinfer's function returns a list, the output first
    if result is None:
        result = arguments.get("output")
    return {**{name: value for name, value in stages.items() if name != "output"}, "output": result}
