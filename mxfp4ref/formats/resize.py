"""Experts as a whole in other layouts: padded to the kernel's sizes, interleaved and folded, and back."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mxfp4ref._compiler import uncompiled
from mxfp4ref._validate import check_instance, check_int
from mxfp4ref.formats.experts import Experts, PlainExperts, Sm90Experts
from mxfp4ref.formats.generations import NEWEST, PLAIN, Generation
from mxfp4ref.formats.layout import fold_scales_sm90, interleave_weights_sm90
from mxfp4ref.formats.mxfp4 import GROUP_SIZE

__all__ = ["resize_experts", "to_logical", "to_sm90"]


def resize_experts(experts: Experts, hidden_size: int, intermediate_size: int) -> Experts:
    """Pad experts with zeros to other sizes, or cut such padding off; each half of fc1 by itself, if it has two.

    Zero bytes are zero codes under any scale, and a padded row's activation is zero: no output changes, apart
    from H's added columns, which are zero. The input is to be padded with zeros, too.

    Raises:
        TypeError: a size is not an int, or the experts are in another layout than the logical one.
        ValueError: a size is no multiple of 32, or what would be cut off is not zero.
    """
    check_instance("experts", experts, Experts, exact=True)
    for name, size in (("hidden_size", hidden_size), ("intermediate_size", intermediate_size)):
        if check_int(name, size, minimum=GROUP_SIZE) % GROUP_SIZE:
            raise ValueError(f"{name}: expected a multiple of {GROUP_SIZE}, got {size}")
    old_hidden, old_inner = experts.hidden_size, experts.intermediate_size
    if (old_hidden, old_inner) == (hidden_size, intermediate_size):
        return experts
    packing = 2 if experts.quantized else 1
    sizes = {
        "fc1_weights": (intermediate_size, hidden_size // packing),
        "fc1_scales": (intermediate_size, hidden_size // GROUP_SIZE),
        "fc1_biases": (intermediate_size,),
        "fc2_weights": (hidden_size, intermediate_size // packing),
        "fc2_scales": (hidden_size, intermediate_size // GROUP_SIZE),
        "fc2_biases": (hidden_size,),
    }
    changed: dict[str, Any] = {
        name: _fit(getattr(experts, name), 2 if name.startswith("fc1") and experts.gated else 1, *size)
        for name, size in sizes.items()
    }
    resized = replace(experts, **changed)
    if hidden_size < old_hidden or intermediate_size < old_inner:
        largest = max(hidden_size, old_hidden), max(intermediate_size, old_inner)
        before, after = resize_experts(experts, *largest), resize_experts(resized, *largest)
        for name in sizes:
            old, new = getattr(before, name), getattr(after, name)
            if old is not None and not torch.equal(old.view(torch.uint8), new.view(torch.uint8)):
                raise ValueError(f"{name}: expected zeros beyond H={hidden_size}, I={intermediate_size}")
    return resized


@uncompiled
def to_sm90(experts: Experts, generation: Generation = NEWEST) -> Sm90Experts:
    """Bring experts into the layouts that the real call takes: interleaved weights, folded int32 scales.

    Args:
        experts: MXFP4 experts; H and I must be multiples of 128.
        generation: whose layouts; see `mxfp4ref.formats.generations`.

    Raises:
        TypeError: no experts, or in another layout than the logical one.
        TypeError: no `Generation`.
        ValueError: bf16 weights, or other sizes.
    """
    check_instance("experts", experts, Experts, exact=True)
    if experts.fc1_scales is None or experts.fc2_scales is None:
        raise ValueError("experts: expected MXFP4 weights, got bfloat16")
    changed: dict[str, Any] = {
        "fc1_weights": interleave_weights_sm90(experts.fc1_weights, generation),
        "fc1_scales": fold_scales_sm90(experts.fc1_scales, generation).view(torch.int32),
        "fc2_weights": interleave_weights_sm90(experts.fc2_weights, generation),
        "fc2_scales": fold_scales_sm90(experts.fc2_scales, generation).view(torch.int32),
    }
    layout = PlainExperts if generation is PLAIN else Sm90Experts
    return layout(**{field.name: getattr(experts, field.name) for field in fields(experts)} | changed)


@uncompiled
def to_logical(experts: Sm90Experts) -> Experts:
    """All experts in logical layout, the inverse of `to_sm90`; the shape tells the generation."""
    check_instance("experts", experts, Sm90Experts)
    return experts.select(torch.arange(experts.num_experts, device=experts.device))


def _fit(tensor: Tensor | None, parts: int, *size: int) -> Tensor | None:
    """Pad, or crop, the last dimensions of each of so many parts of the rows to these sizes."""
    if tensor is None:
        return None
    split = tensor.reshape(len(tensor), parts, -1, *tensor.shape[2:])
    ends = [want - have for want, have in zip(size, split.shape[-len(size) :], strict=True)]
    return F.pad(split, [amount for end in reversed(ends) for amount in (0, end)]).flatten(1, 2)
