"""What is in a checkpoint: its layers, what would be refused, and unusual weights and scales, counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mxfp4ref._spans import spans
from mxfp4ref._validate import shown
from mxfp4ref.checkpoint.config import Config, read_config
from mxfp4ref.checkpoint.disk import ReadOptions, find_layers, layer_at, left_out, ranges
from mxfp4ref.checkpoint.format import CheckpointFormat, Found
from mxfp4ref.checkpoint.layer import CheckpointLayer, ExpertsInFiles, Swiglu
from mxfp4ref.checkpoint.router import checked_router
from mxfp4ref.checkpoint.shards import CheckpointError, Shards, open_shards
from mxfp4ref.formats.experts import Experts
from mxfp4ref.formats.mxfp4 import GROUP_SIZE
from mxfp4ref.routing.models import Preset

__all__ = ["Counts", "Inspection", "LayerEntry", "inspect"]

_BYTES_AT_ONCE = 1 << 27
_DEFAULTS = ReadOptions()
_NO_SIGNS = 0x7777777777777777  # of the 16 codes in an int64: all but their signs


@dataclass
class Counts:
    """How many weights and scales of a layer's experts are unusual.

    Attributes:
        groups, codes: how many there are, 32 codes in a group.
        zero_scales: byte 0, 2^-127 by the OCP and 0 on SM90, over codes that are not all zero.
        nan_scales: byte 255, NaN by the OCP and Inf on SM90.
        empty_groups: all codes zero.
        saturated_codes: +-6, the largest there is.
        not_powers: float32 scales that are no power of two, which are refused.
    """

    groups: int = 0
    codes: int = 0
    zero_scales: int = 0
    nan_scales: int = 0
    empty_groups: int = 0
    saturated_codes: int = 0
    not_powers: int = 0

    def add(self, experts: Experts) -> None:
        """Count some experts."""
        for weights, scales in (
            (experts.fc1_weights, experts.fc1_scales),
            (experts.fc2_weights, experts.fc2_scales),
        ):
            assert scales is not None
            groups = weights.reshape(-1, GROUP_SIZE // 2).view(torch.int64)
            empty = (groups[:, 0] | groups[:, 1]) & _NO_SIGNS == 0
            flat = scales.reshape(-1)
            self.groups += flat.numel()
            self.codes += 2 * weights.numel()
            self.zero_scales += _how_many((flat == 0) & ~empty)
            self.nan_scales += _how_many(flat == 255)
            self.empty_groups += _how_many(empty)
            self.saturated_codes += sum(_how_many(weights & largest == largest) for largest in (0x07, 0x70))


def _how_many(mask: Tensor) -> int:
    return int(np.count_nonzero(mask.numpy()))  # some ten times as fast as the sum


@dataclass
class LayerEntry:
    """What is known of a layer.

    Attributes:
        layer, format, prefix: as `find_layers` has them; of what is in no known format, as `left_out` has it and "".
        experts, hidden_size, intermediate_size: E, H and I, 0 if it cannot be told.
        router: in words, "" if it cannot be told.
        parameters, bytes: of the experts, and of all tensors below the prefix, as stored.
        carried: tensors that nothing here uses, by the ends of their names.
        counts: of its weights, None if they were not read.
        refused: why `layer` would refuse it, "" if it would not.
    """

    layer: int | str
    format: str
    prefix: str
    experts: int = 0
    hidden_size: int = 0
    intermediate_size: int = 0
    router: str = ""
    parameters: int = 0
    bytes: int = 0
    carried: list[str] = field(default_factory=list)
    counts: Counts | None = None
    refused: str = ""


@dataclass
class Inspection:
    """What is in a checkpoint.

    Attributes:
        root: where it is.
        model_type: what config.json calls it, "" without.
        files, tensors: how many.
        layers: in order.
    """

    root: Path
    model_type: str
    files: int
    tensors: int
    layers: list[LayerEntry]


def inspect(
    checkpoint: str | Path,
    options: ReadOptions = _DEFAULTS,
    *,
    layers: Sequence[int | str] = (),
    weights: bool = True,
    step: Callable[[str, int], None] | None = None,
) -> Inspection:
    """Look at every layer of a checkpoint; no more of it is in memory at a time than some experts.

    Args:
        checkpoint, options: as for `read_layer`.
        layers: only these; by default all.
        weights: read all weights and count what is unusual, instead of the first expert's only.
        step: called before each part of a layer with a description and the number of parts.

    Raises:
        CheckpointError: it has no experts, or its config.json or index cannot be read.
        ValueError: there is no such layer.
    """
    shards = open_shards(checkpoint)
    found = find_layers(shards, options.format)
    unknown = left_out(shards, found, options.format)
    everything = sorted({**found, **unknown}, key=lambda layer: (isinstance(layer, str), layer))
    if absent := [layer for layer in layers if layer not in everything]:
        raise ValueError(
            f"layer: expected one of {ranges(everything)} in {shards.root}, got {shown(absent[0])}"
        )
    config = read_config(shards.root, options.config)
    entries = []
    for layer in layers or everything:
        if layer in unknown:
            entries.append(LayerEntry(layer, "", "", refused=unknown[layer]))
            continue
        entry = LayerEntry(layer, found[layer][0].name, found[layer][1])
        try:
            _look(entry, shards, found[layer], config, options)
        except (CheckpointError, ValueError, TypeError) as error:
            entry.refused = str(error)
        entries.append(entry)
    if weights:
        _count(
            entries,
            shards,
            {entry.layer: found[entry.layer][0] for entry in entries if entry.layer in found},
            options,
            step,
        )
    return Inspection(
        shards.root,
        str(config.values.get("model_type", "")),
        len(set(shards.files.values())),
        len(shards.files),
        entries,
    )


def _look(
    entry: LayerEntry,
    shards: Shards,
    place: tuple[CheckpointFormat, str],
    config: Config,
    options: ReadOptions,
) -> None:
    """Fill in what is known without the weights, as far as nothing is refused."""
    found = place[0].storage.find(place[0], shards, place[1])
    entry.experts, entry.hidden_size, entry.intermediate_size = (
        len(found.ids),
        found.hidden_size,
        found.intermediate_size,
    )
    entry.parameters = 3 * entry.experts * entry.hidden_size * entry.intermediate_size
    per_group = 2 * GROUP_SIZE if not place[0].storage.quantized else GROUP_SIZE // 2 + 1
    entry.bytes = entry.parameters // GROUP_SIZE * per_group
    config.refuse_unknown()
    config.check_scheme()
    layer = layer_at(shards, entry.layer, place, config, (Swiglu(), 128, options))
    rest = [layer.router_weight, layer.router_bias, layer.image_bias, layer.tid2eid]
    rest += [*layer.shared_experts.values(), *layer.others.values()]
    entry.bytes += sum(tensor.nbytes for tensor in rest if tensor is not None)
    entry.carried = sorted(layer.others)
    preset = checked_router(layer)
    entry.router = _in_words(preset, layer)


def _in_words(preset: Preset, layer: CheckpointLayer) -> str:
    words = [f"{preset.score.__name__}, {preset.top_k} of {layer.num_experts}"]
    if preset.n_group > 1:
        words.append(f"{preset.topk_group} of {preset.n_group} groups")
    if layer.tid2eid is not None:
        words.append("table")
    elif layer.router_bias is not None:
        words.append("bias")
    if layer.image_bias is not None:
        words.append("bias of images")
    words.append("not normalised" if preset.normalize == "none" else f"normalised by {preset.normalize}")
    if preset.temperature != 1.0:
        words.append(f"temperature {preset.temperature:g}")
    if preset.factor not in (None, 1.0):
        words.append(f"factor {preset.factor:g}")
    return ", ".join(words)


def _count(
    entries: Sequence[LayerEntry],
    shards: Shards,
    formats: dict[int | str, CheckpointFormat],
    options: ReadOptions,
    step: Callable[[str, int], None] | None,
) -> None:
    """Count what is unusual in the weights of all layers that can be read."""
    readable = [e for e in entries if e.experts and (options.quantize or formats[e.layer].storage.quantized)]
    pieces = [
        (entry, some)
        for entry in readable
        for some in spans(entry.experts, max(_BYTES_AT_ONCE * entry.experts // max(entry.bytes, 1), 1))
    ]
    found: Found | None = None
    for entry, some in pieces:
        if step is not None:
            step(f"layer {entry.layer}", len(pieces))
        format = formats[entry.layer]
        try:
            if found is None or some.start == 0:
                found = format.storage.find(format, shards, entry.prefix)
            ids = found.ids[some]
            entry.counts = entry.counts or Counts()
            if found.dtypes[1] == torch.float32:
                entry.counts.not_powers += _not_powers(format, shards, entry.prefix, ids)
            experts = ExpertsInFiles(
                format,
                shards,
                entry.prefix,
                found,
                tuple(ids),
                found.hidden_size,
                found.intermediate_size,
                rule=options.quantize,
            )
            entry.counts.add(experts.read())
        except (CheckpointError, ValueError, TypeError) as error:
            entry.refused = entry.refused or str(error)


def _not_powers(format: CheckpointFormat, shards: Shards, prefix: str, ids: Sequence[int]) -> int:
    """How many float32 scales of some experts are no power of two that a byte can be."""
    roles = [name for role, name in format.names.items() if role.endswith("scales")]
    names = {prefix + name.replace("{expert}", str(expert)): expert for name in roles for expert in ids}
    stacked = not any("{expert}" in name for name in roles)
    return sum(
        _wrong(tensor[list(ids)] if stacked else tensor)
        for tensor in shards.read(names).values()
        if tensor.dtype == torch.float32
    )


def _wrong(scales: Tensor) -> int:
    bits = scales.contiguous().view(torch.int32)
    normal = (bits >> 23 >= 1) & (bits >> 23 <= 254) & (bits & 0x7FFFFF == 0)
    return int((~(normal | (bits == 0x00400000))).sum())
