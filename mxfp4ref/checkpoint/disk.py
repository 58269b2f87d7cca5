"""Layers of a checkpoint, read; one at a time."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch

from mxfp4ref._choices import ScaleRule
from mxfp4ref._shown import Shown
from mxfp4ref._spans import runs
from mxfp4ref._validate import check_choice, check_instance, check_int, shown
from mxfp4ref.checkpoint.activation import activation_type, checked, parameters
from mxfp4ref.checkpoint.config import Config, read_config, router_of
from mxfp4ref.checkpoint.format import ROUTER, CheckpointFormat, Found
from mxfp4ref.checkpoint.formats import FORMATS
from mxfp4ref.checkpoint.layer import CheckpointLayer, ExpertsInFiles, Swiglu, has_shared_expert
from mxfp4ref.checkpoint.shards import CheckpointError, Shards, open_shards
from mxfp4ref.formats.quantize import SCALE_RULES
from mxfp4ref.routing.models import PRESETS

__all__ = ["FORMATS", "ReadOptions", "find_layers", "left_out", "open_layer", "ranges", "read_layer"]


@dataclass(frozen=True, repr=False)
class ReadOptions(Shown):
    """How a layer is read, where the checkpoint alone does not say it.

    Attributes:
        config: keys that go before those of config.json: `{"norm_topk_prob": True}`; None takes a key away.
        experts: which experts to read, in this order: a rank's part, as `range(64, 96)` or as an expert map lists
            them. Only their files are opened.
        quantize: how experts in bf16 are quantised: "floor", "ceil", "rceil" or "even", see
            `mxfp4ref.formats.quantize`.
        format: the checkpoint's own names (`read_name_map`); by default those of `FORMATS` are tried.
    """

    _WHOLE: ClassVar[bool] = True

    config: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    experts: Sequence[int] | None = None
    quantize: ScaleRule | None = None
    format: CheckpointFormat | None = None


_DEFAULTS = ReadOptions()
_OF_EXPERTS = re.compile("(?<!shared_)expert|_exps")


def find_layers(
    shards: Shards, format: CheckpointFormat | None = None
) -> dict[int | str, tuple[CheckpointFormat, str]]:
    """The layers with experts, in order, those of a draft head ("mtp.0") last: layer -> (format, prefix).

    Args:
        shards: the checkpoint's tensors.
        format: the only one to look for; by default all of `FORMATS`, of which that counts which has most of the
            names.

    Raises:
        CheckpointError: there is none, or a layer is there under two prefixes.
    """
    formats = list(FORMATS.values()) if format is None else [format]
    names: Counter[tuple[int | str, str, int]] = Counter()
    for name in shards.files:
        for number, candidate in enumerate(formats):
            if tensor := candidate.match(name):
                names[tensor.layer, tensor.prefix, number] += 1
    best: dict[int | str, tuple[CheckpointFormat, str]] = {}
    for (layer, prefix, number), _ in sorted(names.items(), key=lambda item: (-item[1], item[0][2])):
        other = best.setdefault(layer, (formats[number], prefix))[1]
        if other != prefix:
            raise CheckpointError(f"{prefix}*: expected one set of experts, {other}* are there too")
    if not best:
        raise CheckpointError(
            f"{shards.root}: expected experts in the naming of {', '.join(f.name for f in formats)}, found none "
            f"among {len(shards.files)} tensors: {', '.join(sorted(shards.files)[:3])}, ..."
        )
    return dict(sorted(best.items(), key=lambda item: (isinstance(item[0], str), item[0])))


def left_out(
    shards: Shards,
    found: Mapping[int | str, tuple[CheckpointFormat, str]],
    format: CheckpointFormat | None = None,
) -> dict[int | str, str]:
    """Layers with experts that `find_layers` has not found: layer -> why.

    One whose number another layer has is called by its prefix.
    """
    tensors: dict[tuple[int | str, str], list[str]] = {}  # by layer and prefix: the ends of their names
    for name in shards.files:
        parts = name.split(".")
        at = next((n for n, part in enumerate(parts) if re.fullmatch("[0-9]{1,6}", part)), len(parts))
        if _OF_EXPERTS.search(end := ".".join(parts[at + 1 :])):
            layer = f"mtp.{parts[at]}" if parts[at - 1 : at] == ["mtp"] else int(parts[at])
            tensors.setdefault((layer, ".".join(parts[: at + 1])), []).append(end)
    naming = ", ".join(FORMATS) if format is None else format.name
    layers: dict[int | str, str] = {}
    for (layer, place), ends in tensors.items():
        if not any(prefix.startswith(f"{place}.") for _, prefix in found.values()):
            layers[place if layer in found or layer in layers else layer] = (
                f"expected experts in the naming of {naming}, found {min(ends)} and {len(ends) - 1} other tensors; "
                "a name map may say what they are"
            )
    return dict(sorted(layers.items(), key=lambda item: (isinstance(item[0], str), item[0])))


def open_layer(
    checkpoint: str | Path,
    layer: int | str,
    *,
    alpha: float | None = None,
    beta: float | None = None,
    limit: float | None = None,
    multiple: int = 128,
    options: ReadOptions = _DEFAULTS,
) -> CheckpointLayer:
    """A layer of a checkpoint whose experts stay in their files until `run_layer` or `experts.select` needs them.

    Arguments and errors as for `read_layer`; an error in an expert's tensors comes when these are read.
    """
    check_int("multiple", multiple, minimum=1)
    check_instance("options", options, ReadOptions)
    if not isinstance(layer, str):
        check_int("layer", layer, minimum=0)
    if options.quantize is not None:
        check_choice("quantize", options.quantize, SCALE_RULES)
    shards = open_shards(checkpoint)
    layers = find_layers(shards, options.format)
    if layer not in layers:
        if reason := left_out(shards, layers, options.format).get(layer):
            raise CheckpointError(f"layer {shown(layer)}: {reason}")
        raise ValueError(
            f"layer: expected one of {ranges(list(layers))} in {shards.root}, got {shown(layer)}"
        )
    config = read_config(shards.root, options.config)
    config.refuse_unknown()
    config.check_scheme()
    if options.quantize is not None and layers[layer][0].storage.quantized:
        raise ValueError(
            f"quantize: expected experts in bf16 to quantise, those of {layers[layer][1]}* are MXFP4"
        )
    given = Swiglu(*(checked(*p) for p in (("alpha", alpha), ("beta", beta), ("limit", limit))))
    return layer_at(shards, layer, layers[layer], config, (given, multiple, options))


def layer_at(
    shards: Shards,
    layer: int | str,
    place: tuple[CheckpointFormat, str],
    config: Config,
    how: tuple[Swiglu, int, ReadOptions],
) -> CheckpointLayer:
    """`open_layer` of a checkpoint whose layers and config.json are known."""
    (format, prefix), (given, multiple, options) = place, how
    found = format.storage.find(format, shards, prefix)
    format.refuse_others(shards, prefix)
    draft = isinstance(layer, str)
    count = config.get("draft_experts", int) if draft else None
    count = config.get("num_experts", int) if count is None else count
    ids = _chosen(found, prefix, count, options.experts)
    _check_config(config, prefix, found)
    width = config.get("hidden_size", int) if config.get("expert_hidden_size", int) else found.hidden_size
    shape = "E" if count is None else count, "H" if width is None else width
    rest = _rest(format, shards, prefix, shape, part=options.experts is not None)
    if count is None and options.experts is None and len(rest["router_weight"]) != len(ids):
        raise CheckpointError(
            f"{prefix}*: expected as many experts as {format.names['router_weight']} has rows, "
            f"{len(rest['router_weight'])}, got {len(ids)}"
        )
    shared = has_shared_expert(rest["shared_experts"], rest["others"])
    config.check_layer(layer, hashed="tid2eid" in rest, biased="router_bias" in rest, shared=shared)
    swiglu = parameters(config, format, given)
    top_k = config.get("draft_top_k", int) if draft else None
    padded = [size + -size % multiple for size in (found.hidden_size, found.intermediate_size)]
    if not format.storage.quantized and options.quantize is None:
        format.storage.load(format, shards, prefix, found, ids[:1], None)  # which says what to write
    return CheckpointLayer(
        format=format.name,
        prefix=prefix,
        experts=ExpertsInFiles(
            format, shards, prefix, found, ids, padded[0], padded[1], swiglu, options.quantize
        ),
        hidden_size=found.hidden_size,
        intermediate_size=found.intermediate_size,
        top_k=config.get("top_k", int) if top_k is None else top_k,
        routed_scaling_factor=config.get("routed_scaling_factor", float),
        router=_router(config, format),
        expert_ids=None if options.experts is None else ids,
        activation_type=activation_type(config),
        **rest,
    )


def read_layer(
    checkpoint: str | Path,
    layer: int | str,
    *,
    alpha: float | None = None,
    beta: float | None = None,
    limit: float | None = None,
    multiple: int = 128,
    options: ReadOptions = _DEFAULTS,
) -> CheckpointLayer:
    """Read one layer of a checkpoint; other layers are not touched.

    Args:
        checkpoint: a folder with safetensors files, an index and a config.json; or one safetensors file.
        layer: its number in the tensors' names; "mtp.0" is the first of a draft head.
        alpha, beta, limit: the SwiGLU parameters of every expert. By default DeepSeek-V4 has a limit only,
            `swiglu_limit` of config.json (0 is none, as in its own code; so is an argument of inf), and
            gpt-oss has 1.702, 1 and `swiglu_limit`.
        multiple: pad H and I, each half of fc1 by itself, to a multiple of this: 128 is what the kernel
            takes. 32 leaves every published model as it is.
        options: see `ReadOptions`.

    Raises:
        TypeError, ValueError: an argument is wrong, or there is no such layer.
        CheckpointError: a file or a tensor is missing, damaged or not as expected; config.json does not
            say what was not given, or has a key that nobody here knows and that may change the result.
    """
    found = open_layer(
        checkpoint, layer, alpha=alpha, beta=beta, limit=limit, multiple=multiple, options=options
    )
    assert isinstance(found.experts, ExpertsInFiles)
    quantized = found.experts.format.storage.quantized
    return replace(found, experts=found.experts.read(), format=found.format if quantized else "gpt_oss")


def ranges(layers: Sequence[int | str]) -> str:
    """Layers in words, as "0 to 2, 5, mtp.0"."""
    numbers = runs(layer for layer in layers if isinstance(layer, int))
    words = [str(first) if first == last else f"{first} to {last}" for first, last in numbers]
    return ", ".join([*words, *(layer for layer in layers if isinstance(layer, str))])


def _chosen(found: Found, prefix: str, count: int | None, wanted: Sequence[int] | None) -> tuple[int, ...]:
    """The experts to read, all of which are there."""
    present = set(found.ids)
    if wanted is not None:
        for expert in wanted:
            check_int("experts", expert, minimum=0, maximum=None if count is None else max(count - 1, 0))
        if not wanted:
            raise ValueError("experts: expected at least one, got none")
        if absent := sorted(set(wanted) - present):
            raise CheckpointError(f"{prefix}experts.{absent[0]}.*: expected in the checkpoint, not there")
        return tuple(wanted)
    if count not in (None, len(present)):
        wanted_ones = f"experts 0 to {count - 1}" if count else "no expert"
        raise CheckpointError(
            f"{prefix}experts.*: expected {wanted_ones}, as config.json says, found {len(present)}, the "
            f"last of them {max(present)}; experts= (--experts on the command line) reads some of them"
        )
    for expert in range(len(present)):
        if expert not in present:
            raise CheckpointError(
                f"{prefix}experts.{expert}.*: expected experts 0 to {max(present)}, not there; experts= "
                f"(--experts on the command line) reads some of them"
            )
    return tuple(range(len(present)))


def _check_config(config: Config, prefix: str, found: Found) -> None:
    """Raise CheckpointError if the sizes of the experts are not those of config.json."""
    sizes = {
        "expert_hidden_size" if config.get("expert_hidden_size", int) else "hidden_size": found.hidden_size,
        "intermediate_size"
        if config.get("intermediate_size", int) is not None
        else "dense_intermediate_size": found.intermediate_size,
    }
    for role, size in sizes.items():
        if config.get(role, int) not in (None, size):
            raise CheckpointError(
                f"{prefix}*: expected {config.key(role)}={config.get(role, int)} of config.json, got {size}"
            )


def _rest(
    format: CheckpointFormat,
    shards: Shards,
    prefix: str,
    router_shape: tuple[int | str, int | str],
    *,
    part: bool,
) -> dict[str, Any]:
    """All tensors of a layer but those of its experts, by the fields of `CheckpointLayer`.

    What is carried along of single experts is left out of a part, whose other experts may be missing.
    """
    names = {role: prefix + format.names[role] for role in ROUTER if role in format.names}
    needed = {"router_weight"} if format.router is None else set(names)
    present = {role: name for role, name in names.items() if name in shards.files or role in needed}
    if "tid2eid" in names:
        given = [role for role in ("router_bias", "tid2eid") if role in present]
        # Models that see have a bias in their hash layers too, which nothing uses.
        if not given or (len(given) == 2 and "image_bias" not in present):
            found = "both" if given else "neither"
            raise CheckpointError(
                f"{prefix}{format.names['router_weight'].removesuffix('weight')}*: expected either a bias or a table "
                f"{format.names['tid2eid'].rpartition('.')[2]}, found {found}"
            )
    own = [
        name
        for name in shards.files
        if name.startswith(prefix)
        and format.keeps(name.removeprefix(prefix))
        and not (part and name.startswith(f"{prefix}experts."))
    ]
    tensors = shards.read([*present.values(), *own])
    kinds: dict[str, Any] = {
        "router_weight": ((torch.bfloat16, torch.float32), router_shape),
        "router_bias": ((torch.float32, torch.bfloat16), ("E",)),
        "image_bias": (torch.float32, ("E",)),
        "tid2eid": ((torch.int64, torch.int32), ("V", "k")),
    }
    rest: dict[str, Any] = {}
    for role, name in present.items():
        dtype, shape = kinds[role]
        if "router_weight" in rest:
            shape = tuple(rest["router_weight"].shape[0] if s == "E" else s for s in shape)
        rest[role] = shards.check(name, tensors[name], dtype, shape)
    kept = {name.removeprefix(prefix): tensors[name] for name in own}
    shared = {n: t for n, t in kept.items() if format.shared and n.startswith(format.shared)}
    return rest | {
        "shared_experts": MappingProxyType({n.removeprefix(format.shared): t for n, t in shared.items()}),
        "others": MappingProxyType({n: t for n, t in kept.items() if n not in shared}),
    }


def _router(config: Config, format: CheckpointFormat) -> Any:
    if format.router is None:
        return router_of(config, format.defaults)
    for role in ("score", "normalize", "n_group", "topk_group", "method", "temperature"):
        if config.get(role, object) is not None:
            raise config.error(
                f"{config.key(role)}: expected no such key in {format.name}, whose router is its own"
            )
    return PRESETS[format.router]
