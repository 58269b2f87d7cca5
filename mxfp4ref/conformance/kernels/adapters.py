"""What a kernel under test is, and how the inputs of a golden case become its arguments."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mxfp4ref._shown import Shown
from mxfp4ref.conformance.isolation.plain import PACKAGE, TensorError, of_exception, printable
from mxfp4ref.formats.experts import PARAMETERS
from mxfp4ref.formats.generations import NEWEST, Generation
from mxfp4ref.formats.layout import fold_scales_sm90, interleave_weights_sm90
from mxfp4ref.goldens.runs import OUTPUTS
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.flashinfer_arguments import IN_LOGICAL_LAYOUT
from mxfp4ref.model.forward import MoeTrace
from mxfp4ref.model.humming import call_of
from mxfp4ref.sm90.activation import SWIGLU

__all__ = [
    "INTERMEDIATES",
    "OTHER_KIND",
    "SKIPPED_BEFORE",
    "Kernel",
    "KernelError",
    "Skip",
    "is_poison",
    "keyword_arguments",
    "logical_arguments",
    "outputs_by_name",
    "plain_arguments",
    "poisoned",
    "raised_words",
    "rows_left",
    "sm90_arguments",
    "takes",
    "whole_arguments",
]

INTERMEDIATES = ("fc1_output", "activation", "fc2_output")  # those of `MoeTrace` that a diagnosis looks at
_POISON = 0x7FA5  # a NaN of bf16 and of fp16 that no arithmetic produces
_OPTIONAL = ("fc1_biases", "fc2_biases", *PARAMETERS)

# Why a case is skipped that the kernel was not called for, as far as the reasons are alike.
OTHER_KIND = "does not run cases of kind"
_OWN_TILE = "the output depends on the N tile"
_NOT_QUANTIZED = "the experts are not quantised"
_SM90_SIZES = "the SM90 layouts need rows in multiples of 64 and K in multiples of 128"
SKIPPED_BEFORE = (OTHER_KIND, _OWN_TILE, _NOT_QUANTIZED, _SM90_SIZES)

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Prepare = Callable[[str, Any], Arguments]


class KernelError(ValueError):
    """The kernel cannot be loaded or used here; the message says why."""


class Skip(Exception):
    """Raised by a kernel, or before it is called: it cannot take this case, through no fault of its own.

    The case is reported as skipped, with the exception's text, and neither passes nor fails.
    """


@dataclass(frozen=True, repr=False)
class Kernel(Shown):
    """A function under test and how it is called.

    Attributes:
        name: what it was loaded by, as in `kernels`.
        kinds: the kinds of golden cases it can run.
        prepare: turns a case's inputs into positional and keyword arguments; may raise `Skip`, or ValueError
            where something of the kernel's that is not the function itself is wrong.
        function: the callable.
        forces_tile_k: whether the call says which K tiles the kernel uses. If it does, each legitimate pair is
            run and compared with its own output; if not, one run may agree with any of them.
        device: where the tensors go.
        forces_tactics: whether it runs with the very tactics that a call names, clusters too.
        generation: of the SM90 kernel that it claims to be; goldens are of the newest.
    """

    name: str
    kinds: tuple[str, ...]
    prepare: Prepare
    function: Callable[..., Any]
    forces_tile_k: bool = False
    device: str = "cpu"
    forces_tactics: bool = False
    generation: Generation = NEWEST

    def unable(self, kind: str, parameters: Mapping[str, Any]) -> str:
        """Why it cannot be compared on a case of this kind with these parameters, or ""."""
        if kind not in self.kinds:
            return f"{self.name} {OTHER_KIND} {kind}"
        if "tile_n" in parameters and not self.forces_tile_k:
            return f"{_OWN_TILE}, and {self.name} chooses its own"
        return ""


def poisoned(like: Tensor) -> Tensor:
    """A bf16 (or fp16) tensor of the same shape and device, every element the poison NaN 0x7FA5."""
    dtype = torch.float16 if like.dtype == torch.float16 else torch.bfloat16
    return torch.full(like.shape, _POISON, dtype=torch.int16, device=like.device).view(dtype)


def is_poison(output: Tensor) -> Tensor:
    """Where a bf16 or fp16 tensor still holds the poison, as bool."""
    return output.contiguous().view(torch.int16) == _POISON


def rows_left(kind: str, inputs: Any) -> Tensor | None:
    """Which rows of its output a kernel leaves as they are (`MoeCall.written`), `[M] bool`; None if it writes all."""
    if kind not in ("moe", "w4a8"):
        return None
    call = inputs if isinstance(inputs, MoeCall) else call_of(inputs)
    left: Tensor = ~call.written.cpu()
    return left if bool(left.any()) else None


def whole_arguments(kind: str, inputs: Any) -> Arguments:
    """The case's kind and its inputs as they are, for the stand-ins."""
    return (kind, inputs), {}


def keyword_arguments(kind: str, inputs: Any) -> Arguments:
    """A stage's inputs by name."""
    return (), dict(inputs)


def plain_arguments(kind: str, call: MoeCall) -> Arguments:
    """`(x, ids, scales, w1, s1, w2, s2)` and by name what else the call has, but for sizes of 1 and Swiglu.

    Routing weights of 1 stand for none.
    """
    experts = call.experts
    keywords = {name: value for name in _OPTIONAL if (value := getattr(experts, name)) is not None}
    if call.ep_size != 1:
        keywords |= {"ep_size": call.ep_size, "ep_rank": call.ep_rank}
    if call.tp_size != 1:
        keywords |= {"tp_size": call.tp_size, "tp_rank": call.tp_rank}
    if call.activation_type != SWIGLU:
        keywords["activation_type"] = call.activation_type
    weights = (experts.fc1_weights, experts.fc1_scales, experts.fc2_weights, experts.fc2_scales)
    return (call.input, call.token_selected_experts, call.token_final_scales, *weights), keywords


def logical_arguments(function: Callable[..., Any]) -> Prepare:
    """flashinfer's arguments with weights and scales in logical layout; `output` where the function takes one."""
    takes_output = takes(function, "output")

    def prepare(kind: str, call: MoeCall) -> Arguments:
        experts = call.experts
        keywords: dict[str, Any] = {
            "input": call.input,
            "token_selected_experts": call.token_selected_experts,
            "token_final_scales": call.token_final_scales,
            "fc1_expert_weights": experts.fc1_weights,
            "fc2_expert_weights": experts.fc2_weights,
            "output_dtype": call.input.dtype,
            "quant_scales": [experts.fc1_scales, experts.fc2_scales],
            "use_w4_group_scaling": True,
            "tp_size": call.tp_size,
            "tp_rank": call.tp_rank,
            "ep_size": call.ep_size,
            "ep_rank": call.ep_rank,
        }
        if call.activation_type != SWIGLU:
            keywords["activation_type"] = call.activation_type
        if call.unscaled:
            keywords["token_final_scales"] = None
        if call.enable_alltoall:
            keywords["enable_alltoall"] = True
        for name in _OPTIONAL:
            if (value := getattr(experts, name)) is not None:
                keywords[name.replace("_biases", "_expert_biases")] = value
        biases = ("fc1_expert_biases", "fc2_expert_biases")
        if sum(name in keywords for name in biases) == 1:
            # The real call takes both or none. Adding +0 changes nothing, since a GEMM never gives -0.
            for name, like in zip(biases, ("fc1_weights", "fc2_weights"), strict=True):
                shape = getattr(experts, like).shape[:2]
                keywords.setdefault(name, call.input.new_zeros(shape))
        if takes_output:
            keywords["output"] = poisoned(call.input)
        return (), keywords

    return prepare


def sm90_arguments(
    function: Callable[..., Any],
    weights: Callable[[Tensor], Tensor] = interleave_weights_sm90,
    scales: Callable[[Tensor], Tensor] = fold_scales_sm90,
) -> Prepare:
    """flashinfer's arguments with the weights and scales in the layouts of the real call."""
    logical = logical_arguments(function)

    def prepare(kind: str, call: MoeCall) -> Arguments:
        if not call.experts.quantized:
            raise Skip(_NOT_QUANTIZED)
        if any(rows % 64 or depth % 128 for rows, depth in call.experts.gemm_shapes):
            raise Skip(_SM90_SIZES)
        positional, keywords = logical(kind, call)
        for name in ("fc1_expert_weights", "fc2_expert_weights"):
            keywords[name] = weights(keywords[name])
        keywords["quant_scales"] = [scales(value).view(torch.int32) for value in keywords["quant_scales"]]
        return positional, keywords

    return prepare


def raised_words(kernel: str, error: BaseException) -> str:
    """What a kernel of that name raised, and what to do about it where that is known."""
    words = of_exception(error, without=PACKAGE)
    if kernel.startswith("logical:") and IN_LOGICAL_LAYOUT in words:
        return f"did you mean {kernel.removeprefix('logical:')}? {words.replace(IN_LOGICAL_LAYOUT, '')}"
    name = re.search(r"unexpected keyword argument '(\w+)'", words if type(error) is TypeError else "")
    if name is None:
        return words
    return (
        f"{words}; a kernel without {name[1]} can take **others and, if there are any, "
        f'raise mxfp4ref.conformance.Skip("no {name[1]}")'
    )


def takes(function: Callable[..., Any], name: str) -> bool:
    """Whether a function has a parameter of that name, as far as its signature tells."""
    try:
        parameters = inspect.signature(function).parameters
    except Exception:  # of a callable without a signature, or with one that raises
        return False
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def outputs_by_name(kind: str, result: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A kernel's return value as outputs by name, and intermediates (`INTERMEDIATES`) where it returned some.

    A kernel may return

    - the output, or a mapping of outputs by name;
    - a list with the output first, as flashinfer's function does; what comes after it is not looked at;
    - a tuple of the output and None;
    - a tuple of the output and its intermediates, which are a mapping or an object with attributes of these names;
    - a `MoeTrace`;
    - a list or tuple of all outputs in their order, of a stage that has several, as a quantiser and a router have
    - None (also as the first of a list or tuple) if it was given an `output` to write into.

    Raises:
        TensorError: anything else, such as a tuple of two tensors, of which either might be the output.
    """
    names = OUTPUTS[kind]
    if isinstance(result, Mapping):
        found = dict(result)
        if missing := [name for name in names if name not in found]:
            has = ", ".join(sorted(printable(name, 40) for name in found)[:10]) or "nothing"
            raise TensorError(f"{missing[0]}: expected the key {missing[0]}, got a mapping with {has}")
        return found
    if isinstance(result, list | tuple) and 1 < len(names) == len(result):
        return dict(zip(names, result, strict=True))
    if isinstance(result, MoeTrace):
        result = result.output, result
    if isinstance(result, list | tuple):
        if not result:
            raise TensorError(f"{names[0]}: expected a tensor, got an empty {type(result).__name__}")
        is_list = isinstance(result, list)
        result, *rest = result
        rest = [] if is_list else [value for value in rest if value is not None]
        stages = _intermediates(rest[0]) if kind == "moe" and len(rest) == 1 else {}
        if rest and not stages:
            kinds = ", ".join(type(value).__name__ for value in rest)
            raise TensorError(
                f"{names[0]}: expected it alone or first, with nothing but None or a mapping of intermediates "
                f"({', '.join(INTERMEDIATES)}) after it, got {kinds} after it"
            )
    else:
        stages = {}
    if result is None and kind == "moe":
        result = arguments.get("output")
    return {**stages, names[0]: result}


def _intermediates(value: Any) -> dict[str, Any]:
    if isinstance(value, Tensor):
        return {}
    named = value if isinstance(value, Mapping) else {n: getattr(value, n, None) for n in INTERMEDIATES}
    return {name: named[name] for name in INTERMEDIATES if named.get(name) is not None}
