"""The arguments of a call that an engine makes, by flashinfer's names."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mxfp4ref.formats.generations import GENERATIONS, PLAIN, Generation
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.flashinfer import torch_ref_cutlass_fused_moe
from mxfp4ref.model.flashinfer_arguments import call_of

__all__ = ["bind", "capturing", "generation_in_record", "layout_of_release", "lenient_call", "loaded_release"]

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
    bound = _OUR_SIGNATURE.bind(
        **given, weight_layout=layout_of_release(loaded_release(), given), strict=False
    )
    bound.apply_defaults()
    return call_of(bound.arguments)


def layout_of_release(release: str, given: Mapping[str, Any]) -> str | None:
    """The layout of the weights that a release of flashinfer takes; None if they have none, or the scales tell.

    Args:
        release: "" where it is not known.
        given: the arguments of a call by name.

    Raises:
        NotImplementedError: neither a record of the release nor the scales tell.
    """
    if getattr(given["fc1_expert_weights"], "dtype", None) != torch.uint8:
        return None
    generation = generation_in_record(release)
    if generation is not None:
        return "logical_weights_folded_scales" if generation is PLAIN else "sm90"
    scales = given.get("quant_scales")
    if isinstance(scales, Sequence) and any(isinstance(s, Tensor) and s.dim() == 3 for s in scales):
        what = (
            f"flashinfer {release} is in no record of mxfp4ref.formats.generations"
            if release
            else "no release is told"
        )
        raise NotImplementedError(f"quant_scales: 3-D scales belong to two layouts, and {what}")
    return None


def generation_in_record(release: str) -> Generation | None:
    """The generation of the kernel that a release of flashinfer has; None if it is in no record."""
    public = release.partition("+")[0]
    return next((known for known in (*GENERATIONS, PLAIN) if public in known.releases), None)


def loaded_release() -> str:
    """The release of the flashinfer that this process has imported; "" if it does not say."""
    return str(getattr(sys.modules.get("flashinfer"), "__version__", ""))


def capturing(arguments: tuple[Any, ...], named: Mapping[str, Any]) -> bool:
    """Whether a CUDA graph is being captured by who makes this call."""
    on_gpu = any(isinstance(value, Tensor) and value.is_cuda for value in (*arguments, *named.values()))
    return on_gpu and torch.cuda.is_current_stream_capturing()
