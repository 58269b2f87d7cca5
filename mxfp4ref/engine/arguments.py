"""The arguments of a call that an engine makes, by flashinfer's names."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mxfp4ref.formats.generations import GENERATIONS, PLAIN
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.flashinfer import torch_ref_cutlass_fused_moe
from mxfp4ref.model.flashinfer_arguments import call_of

__all__ = ["bind", "capturing", "layout_of_release", "lenient_call", "loaded_release"]

_OURS = {"kernel", "weight_layout", "strict", "trace"}
_OUR_SIGNATURE = inspect.signature(torch_ref_cutlass_fused_moe)
_SIGNATURE = _OUR_SIGNATURE.replace(
    parameters=[p for name, p in _OUR_SIGNATURE.parameters.items() if name not in _OURS]
)


def bind(arguments: tuple[Any, ...], named: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that were given, by flashinfer's names.

    Raises:
        NotImplementedError: they are not those of a flashinfer that is known here.
    """
    try:
        return dict(_SIGNATURE.bind(*arguments, **named).arguments)
    except TypeError as error:
        raise NotImplementedError(f"arguments: not modelled, {error}") from None


def lenient_call(given: Mapping[str, Any]) -> MoeCall:
    """The call that arguments make, as the kernel takes it: slots that it skips are skipped.

    Raises:
        NotImplementedError, TypeError, ValueError: as `torch_ref_cutlass_fused_moe` says.
    """
    bound = _OUR_SIGNATURE.bind(**given, weight_layout=layout_of_release(given), strict=False)
    bound.apply_defaults()
    return call_of(bound.arguments)


def layout_of_release(given: Mapping[str, Any]) -> str | None:
    """The layout of the weights that the loaded flashinfer takes; None if the tensors have to tell."""
    release = loaded_release().partition("+")[0]
    if getattr(given["fc1_expert_weights"], "dtype", None) == torch.bfloat16:
        return None
    if release in PLAIN.releases:
        return "logical_weights_folded_scales"
    return "sm90" if any(release in generation.releases for generation in GENERATIONS) else None


def loaded_release() -> str:
    """The release of the flashinfer that this process has imported; "" if it does not say."""
    return str(getattr(sys.modules.get("flashinfer"), "__version__", ""))


def capturing(arguments: tuple[Any, ...], named: Mapping[str, Any]) -> bool:
    """Whether a CUDA graph is being captured by who makes this call."""
    on_gpu = any(isinstance(value, Tensor) and value.is_cuda for value in (*arguments, *named.values()))
    return on_gpu and torch.cuda.is_current_stream_capturing()
