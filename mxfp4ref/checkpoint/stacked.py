"""One tensor for all experts, gate and up together, as gpt-oss has them.

The low nibble of a byte is the even index along K, as everywhere in this package.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mxfp4ref._choices import ScaleRule
from mxfp4ref.checkpoint.format import ROUTER, CheckpointFormat, Found, Storage, check_sizes
from mxfp4ref.checkpoint.shards import CheckpointError, Shards
from mxfp4ref.formats.experts import Experts
from mxfp4ref.formats.mxfp4 import GROUP_SIZE
from mxfp4ref.formats.quantize import SCALE_RULES, quantize

__all__ = ["BFLOAT16", "BLOCKS"]


def _find(format: CheckpointFormat, shards: Shards, prefix: str) -> Found:
    """Blocks `[E, 2I, H/32, 16] uint8` with scales of their own."""
    names = {role: prefix + format.names[role] for role in ("fc1_weights", "fc1_scales")}
    first = shards.read(names.values())
    weights, scales = (first[name] for name in names.values())
    shape = shards.check(names["fc1_weights"], weights, torch.uint8, ("E", "2I", "H/32", 16)).shape
    inner = _half(shards.label(names["fc1_weights"]), shape[1])
    hidden = GROUP_SIZE * shape[2]
    check_sizes(shards.label(names["fc1_weights"]), shape[0], hidden, inner)
    return Found(range(shape[0]), hidden, inner, (weights.dtype, scales.dtype))


def _load(
    format: CheckpointFormat,
    shards: Shards,
    prefix: str,
    found: Found,
    ids: Sequence[int],
    rule: ScaleRule | None,
) -> Experts:
    assert format.rows is not None
    names = {role: prefix + name for role, name in format.names.items() if role not in ROUTER}
    tensors = shards.read(names.values())
    count, hidden, inner = len(found.ids), found.hidden_size, found.intermediate_size
    shapes = {
        "fc1_weights": (count, 2 * inner, hidden // GROUP_SIZE, 16),
        "fc1_scales": (count, 2 * inner, hidden // GROUP_SIZE),
        "fc1_biases": (count, 2 * inner),
        "fc2_weights": (count, hidden, inner // GROUP_SIZE, 16),
        "fc2_scales": (count, hidden, inner // GROUP_SIZE),
        "fc2_biases": (count, hidden),
    }
    parts: dict[str, Tensor] = {}
    for role, name in names.items():
        tensor, scales = tensors[name], role.endswith("scales")
        if scales:
            assert found.dtypes[1] is not None
            shards.check_scales(name, tensor, found.dtypes[1], shapes[role])
        else:
            shards.check(
                name, tensor, torch.bfloat16 if role.endswith("biases") else torch.uint8, shapes[role]
            )
        some = tensor[list(ids)]
        if scales:
            some = shards.to_bytes(name, some)
        if role.endswith("weights"):
            some = some.flatten(2)
        parts[role] = format.rows.to_halves(some) if role.startswith("fc1") else some
    return Experts(**parts)


def _dump(format: CheckpointFormat, experts: Experts) -> dict[str, Tensor]:
    assert format.rows is not None
    tensors = {role: getattr(experts, role) for role in format.names if role not in ROUTER}
    missing = [role for role, tensor in tensors.items() if tensor is None]
    if missing:
        raise ValueError(f"layer: expected all tensors of {format.name}, got None for {', '.join(missing)}")
    for role in tensors:
        if role.startswith("fc1"):
            tensors[role] = format.rows.from_halves(tensors[role])
        if role.endswith("weights"):
            tensors[role] = tensors[role].unflatten(2, (-1, GROUP_SIZE // 2))
    return {format.names[role]: tensor for role, tensor in tensors.items()}


def _find_bfloat16(format: CheckpointFormat, shards: Shards, prefix: str) -> Found:
    """`[E, H, 2I] bf16`, transposed against all the others."""
    name = prefix + format.names["fc1_weights"]
    count, hidden, rows = shards.check(
        name, shards.read([name])[name], torch.bfloat16, ("E", "H", "2I")
    ).shape
    inner = _half(shards.label(name), rows)
    check_sizes(shards.label(name), count, hidden, inner)
    return Found(range(count), hidden, inner, (torch.bfloat16, None))


def _load_bfloat16(
    format: CheckpointFormat,
    shards: Shards,
    prefix: str,
    found: Found,
    ids: Sequence[int],
    rule: ScaleRule | None,
) -> Experts:
    assert format.rows is not None
    if rule is None:
        raise CheckpointError(
            f"{shards.label(prefix + format.names['fc1_weights'])}: expected MXFP4 experts, got bfloat16; name "
            f"the rule by which they are to be quantised: quantize= (--quantize on the command line) "
            f"{' or '.join(SCALE_RULES)}"
        )
    names = {role: prefix + name for role, name in format.names.items() if role not in ROUTER}
    tensors = shards.read(names.values())
    count, hidden, inner = len(found.ids), found.hidden_size, found.intermediate_size
    shapes = {
        "fc1_weights": (count, hidden, 2 * inner),
        "fc1_biases": (count, 2 * inner),
        "fc2_weights": (count, inner, hidden),
        "fc2_biases": (count, hidden),
    }
    parts: dict[str, Tensor] = {}
    for role, name in names.items():
        some = shards.check(name, tensors[name], torch.bfloat16, shapes[role])[list(ids)]
        if role.endswith("weights"):
            some = some.transpose(1, 2).contiguous()
        if role.startswith("fc1"):
            some = format.rows.to_halves(some)
        if role.endswith("weights"):
            parts[role], parts[role.replace("weights", "scales")] = quantize(some, rule=rule)
        else:
            parts[role] = some
    return Experts(**parts)


def _dump_bfloat16(format: CheckpointFormat, experts: Experts) -> dict[str, Tensor]:
    raise ValueError(
        f"layer.format: expected a format of MXFP4 weights to write to, as gpt_oss, got {format.name}"
    )


def _half(label: str, rows: int) -> int:
    if rows % 2:
        raise CheckpointError(f"{label}: expected rows in pairs, gate and up, got {rows}")
    return rows // 2


BLOCKS = Storage(_find, _load, _dump)
BFLOAT16 = Storage(_find_bfloat16, _load_bfloat16, _dump_bfloat16, quantized=False)
