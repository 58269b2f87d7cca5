"""The shared expert as one more expert of the fused call, as engines run it."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor

from mxfp4ref._choices import ScaleRule
from mxfp4ref._ieee import to_fp32, to_fp64
from mxfp4ref._validate import check_choice, check_tensor
from mxfp4ref.checkpoint.layer import CheckpointLayer, ExpertsInFiles, concatenated, has_shared_expert
from mxfp4ref.checkpoint.shards import CheckpointError
from mxfp4ref.formats.experts import PARAMETERS, Experts
from mxfp4ref.formats.mxfp4 import GROUP_SIZE, PACKED_DTYPES, SCALE_DTYPES
from mxfp4ref.formats.quantize import SCALE_RULES, quantize
from mxfp4ref.formats.resize import resize_experts

__all__ = ["fuse_shared"]

_MODULES = (("w1", "w3", "w2"), ("gate_proj", "up_proj", "down_proj"))
_SCALES = (".scale", ".weight_scale", ".weight_scale_inv")


def fuse_shared(layer: CheckpointLayer, rule: ScaleRule | None = None) -> CheckpointLayer:
    """The layer with its shared expert in slot E, which every token chooses with weight 1.

    A shared expert that is n times as wide as the others takes the slots E to E + n - 1. It gets the SwiGLU
    parameters of the others, as in the engines' one call for all. Weights in MXFP4 are taken as they are;
    float8_e4m3fn in blocks (each value times its block's scale, rounded to float32) and bf16 are quantised.

    Args:
        layer: with a shared expert and all of its experts.
        rule: how to quantise, see `mxfp4ref.formats.quantize`; needed unless the weights are MXFP4.

    Raises:
        ValueError: the layer has no shared expert, or only a part of its experts; or an unknown rule, or one that has
            nothing to quantise.
        CheckpointError: the shared expert's tensors are of other names, dtypes or shapes.
    """
    if rule is not None:
        check_choice("rule", rule, SCALE_RULES)
    if layer.expert_ids is not None:
        raise ValueError("layer: expected all experts to put the shared one beside them, got a part")
    if not layer.shared_experts:
        gated = next(
            (name for name in layer.others if has_shared_expert({}, {name: layer.others[name]})), None
        )
        found = f"{gated}: one with a gate of its own, or in GGUF, is not fused" if gated else "none"
        raise ValueError(f"layer: expected a shared expert in {layer.prefix}*, found {found}")
    shared = _slots(layer, rule)
    source = layer.experts
    experts: Experts | ExpertsInFiles
    if isinstance(source, ExpertsInFiles):
        experts = replace(source, more=shared)
    else:
        shared = resize_experts(shared, source.hidden_size, source.intermediate_size)
        like = source.select(torch.zeros(shared.num_experts, dtype=torch.int64, device="cpu"))
        shared = replace(
            shared,
            **{name: getattr(like, name) for name in PARAMETERS},
        )
        experts = concatenated([source, shared])
    return replace(layer, experts=experts, fused=shared.num_experts, shared_experts=MappingProxyType({}))


def _slots(layer: CheckpointLayer, rule: ScaleRule | None) -> Experts:
    """The shared expert as experts of the width of the others, without padding and parameters."""
    packed = {name: name.replace(".weight_packed", ".weight") for name in layer.shared_experts}
    if len(set(packed.values())) == len(packed):  # compressed-tensors' name for weights in MXFP4
        renamed = {packed[name]: tensor for name, tensor in layer.shared_experts.items()}
        layer = replace(layer, shared_experts=renamed)
    names = next((names for names in _MODULES if f"{names[0]}.weight" in layer.shared_experts), None)
    if names is None:
        raise CheckpointError(
            f"{layer.prefix}*: expected a shared expert with {' or '.join('/'.join(names) for names in _MODULES)}, "
            f"found {', '.join(sorted(layer.shared_experts))}"
        )
    known = {name + end for name in names for end in (".weight", *_SCALES)}
    if unknown := sorted(layer.shared_experts.keys() - known):
        raise CheckpointError(
            f"{layer.prefix}*: expected a shared expert of weights and scales, found {unknown[0]} too"
        )
    hidden, inner = layer.hidden_size, layer.intermediate_size
    (gate, gate_scales), (up, up_scales), (down, down_scales) = (_matrix(layer, name, rule) for name in names)
    count = gate.shape[0] // inner
    shapes = [tuple(t.shape) for t in (gate, up, down)]
    wide = count * inner
    if not count or shapes != [(wide, hidden // 2), (wide, hidden // 2), (hidden, wide // 2)]:
        raise CheckpointError(
            f"{layer.prefix}*: expected a shared expert of H={hidden} and I a multiple of {inner}, got weights "
            f"of the shapes {', '.join(str([*shape[:1], 2 * shape[1]]) for shape in shapes)}"
        )

    def rows(upper: Tensor, lower: Tensor) -> Tensor:
        return torch.cat([t.reshape(count, inner, -1) for t in (upper, lower)], dim=1)

    def columns(tensor: Tensor) -> Tensor:
        return tensor.reshape(len(tensor), count, -1).transpose(0, 1).contiguous()

    return Experts(rows(up, gate), rows(up_scales, gate_scales), columns(down), columns(down_scales))


def _matrix(layer: CheckpointLayer, name: str, rule: ScaleRule | None) -> tuple[Tensor, Tensor]:
    """A matrix of the shared expert as codes and scales."""
    label = f"{layer.prefix}*.{name}.weight"
    if f"{name}.weight" not in layer.shared_experts:
        raise CheckpointError(f"{label}: expected in the shared expert, not there")
    weight = layer.shared_experts[f"{name}.weight"]
    scales = next((layer.shared_experts[name + s] for s in _SCALES if name + s in layer.shared_experts), None)
    if weight.dtype in PACKED_DTYPES:
        if rule is not None:
            raise ValueError(f"{label}: expected weights to quantise by {rule}, it is MXFP4 already")
        codes = weight.view(torch.uint8)
        wanted = (codes.shape[0], 2 * codes.shape[1] // GROUP_SIZE)
        if scales is None or scales.dtype not in SCALE_DTYPES or tuple(scales.shape) != wanted:
            raise CheckpointError(f"{label}: expected UE8M0 scales of the shape {list(wanted)} beside it")
        return codes, scales.view(torch.uint8)
    if rule is None:
        raise CheckpointError(
            f"{label}: expected MXFP4, got {str(weight.dtype).removeprefix('torch.')}; name the rule by which "
            f"it is to be requantised: rule= (--fuse-shared on the command line) {' or '.join(SCALE_RULES)}"
        )
    if weight.dtype == torch.bfloat16:
        return quantize(weight, rule=rule)
    if weight.dtype != torch.float8_e4m3fn or scales is None or weight.dim() != 2 or scales.dim() != 2:
        raise CheckpointError(f"{label}: expected bfloat16, or float8_e4m3fn with scales of its blocks")
    if scales.dtype == torch.uint8:  # UE8M0, as beside MXFP4
        scales = scales.view(torch.float8_e8m0fnu)
    dtypes = (torch.float32, torch.bfloat16, torch.float8_e8m0fnu)
    check_tensor(f"{label}: scales", scales, dtype=dtypes, shape=("...",))
    wide = scales.to(torch.float32)
    for dim, (count, size) in enumerate(zip(scales.shape, weight.shape, strict=True)):
        # The last block may be cut off: of all powers of two one at most gives so many blocks, unless that is one.
        block = next((1 << n for n in range(size.bit_length() + 1) if -(-size >> n) == count), 0)
        if not block:
            raise CheckpointError(
                f"{label}: expected scales of blocks of a power of two, got {count} for {size}"
            )
        wide = wide.repeat_interleave(block, dim).narrow(dim, 0, size)
    return quantize(to_fp32(to_fp64(weight.to(torch.float32)) * to_fp64(wide)), rule=rule)
