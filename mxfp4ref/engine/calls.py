"""A recorded call as a `MoeCall`: its arguments by flashinfer's signature, its experts shared with other calls."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch

from mxfp4ref._words import did_you_mean
from mxfp4ref.engine.arguments import generation_in_record, layout_of_release
from mxfp4ref.engine.recordings import FUNCTIONS, Recording, Unreadable
from mxfp4ref.formats.experts import PARAMETERS, Experts, Sm90Experts
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.flashinfer import torch_ref_cutlass_fused_moe
from mxfp4ref.model.flashinfer_arguments import call_of

__all__ = ["Layers", "arguments_of", "read_call", "release_of"]

_SIGNATURE = inspect.signature(torch_ref_cutlass_fused_moe)
_RELEASE = re.compile(r"[0-9][0-9A-Za-z.+!_-]{0,79}")
_OURS = {"strict": False, "trace": False}  # what the kernel accepted is not refused


class Layers:
    """The experts of the calls read so far, numbered by their weights; the latest two stay loaded.

    A recording holds the weights of each call once more: calls of one layer get the same tensors back.
    """

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._first: dict[
            int, dict[str, str]
        ] = {}  # the digests of the activation's parameters in the first call
        self._loaded: OrderedDict[str, Experts] = OrderedDict()

    def __len__(self) -> int:
        return len(self._numbers)

    def share(self, experts: Experts) -> tuple[int, Experts]:
        """The number of these weights, from 1, and the experts, those of an earlier call if they are equal."""
        digest = hashlib.blake2b(type(experts).__name__.encode())
        for field in fields(experts):
            if field.name not in PARAMETERS:
                _add(digest, field.name, getattr(experts, field.name))
        number = self._numbers.setdefault(digest.hexdigest(), len(self._numbers) + 1)
        parameters = _parameters(experts)
        self._first.setdefault(number, parameters)
        key = f"{number} {parameters}"
        shared = self._loaded.setdefault(key, experts)
        self._loaded.move_to_end(key)
        while len(self._loaded) > 2:
            self._loaded.popitem(last=False)
        return number, shared

    def other_parameters(self, number: int, experts: Experts) -> tuple[str, ...]:
        """The activation's parameters that are not those of the first call with these weights."""
        first, these = self._first[number], _parameters(experts)
        return tuple(name for name in PARAMETERS if first[name] != these[name])


def _parameters(experts: Experts) -> dict[str, str]:
    """A digest of each parameter of the activation."""
    digests = {name: hashlib.blake2b() for name in PARAMETERS}
    for name, digest in digests.items():
        _add(digest, name, getattr(experts, name))
    return {name: digest.hexdigest() for name, digest in digests.items()}


def _add(digest: Any, name: str, tensor: torch.Tensor | None) -> None:
    if tensor is not None:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy())


def release_of(metadata: Mapping[str, Any]) -> str | None:
    """The release of flashinfer that made the recording, if it says so."""
    versions = metadata.get("versions")
    release = versions.get("flashinfer") if isinstance(versions, dict) else None
    return release if isinstance(release, str) and _RELEASE.fullmatch(release) else None


def arguments_of(recording: Recording) -> dict[str, Any]:
    """The recorded arguments by name, those that were not given with their defaults.

    Raises:
        Unreadable, Incomplete: as `Recording.arguments`; or an argument is missing that a call which returned had.
        NotImplementedError: an argument that the function does not have.
    """
    positional, keywords = recording.arguments()
    try:
        bound = _SIGNATURE.bind(*positional, **{k: v for k, v in keywords.items() if k not in _OURS})
    except TypeError as error:
        unknown = next((name for name in keywords if name not in _SIGNATURE.parameters), None)
        if unknown is None and recording.returned():
            raise Unreadable(f"inputs: {error}, which the call had, since it returned") from None
        raise NotImplementedError(
            f"arguments: {error}{did_you_mean(unknown, _SIGNATURE.parameters)}"
        ) from None
    bound.apply_defaults()
    return bound.arguments | _OURS


def read_call(recording: Recording, arguments: Mapping[str, Any], layers: Layers) -> tuple[int, MoeCall]:
    """The number of the call's experts in `layers`, and the call.

    Raises:
        NotImplementedError: an argument is not modelled.
        TypeError, ValueError: an argument is wrong, or not what the release takes that made the recording.
    """
    metadata = recording.metadata()
    release = release_of(metadata) or ""
    unnamed = arguments["weight_layout"] is None and arguments["kernel"] is None
    if unnamed and metadata.get("function_name") == FUNCTIONS[0]:
        arguments = {**arguments, "weight_layout": layout_of_release(release, arguments)}
    call = call_of(arguments)
    ran = generation_in_record(release)
    if ran is not None and isinstance(call.experts, Sm90Experts) and call.experts.generation is not ran:
        raise ValueError(
            f"quant_scales: expected scales as flashinfer {release} takes them ({ran.layout.SCALE_AXES}), got "
            f"those of the {call.experts.generation.name} kernel (flashinfer {call.experts.generation.spans}); the "
            f"kernel reads other scales than are meant. interleave_weights_sm90(weights, {ran!r}) and "
            f"fold_scales_sm90(scales, {ran!r}) give what flashinfer {ran.spans} takes"
        )
    number, experts = layers.share(call.experts)
    return number, replace(call, experts=experts)
