"""What defines a golden case, and how one is registered."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from mxfp4ref.formats.generations import NEWEST
from mxfp4ref.formats.layout import fold_scales_sm90, interleave_weights_sm90
from mxfp4ref.goldens.case import EXPERT_TENSORS, tensor_bytes
from mxfp4ref.goldens.cases.source import Source
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import forward, trace
from mxfp4ref.sm90.activation import SWIGLU
from mxfp4ref.sm90.tactics import TILE_K, Sm90Kernel, Tactic

__all__ = ["DEFINITIONS", "Content", "Definition", "define", "moe_content", "outputs_by_tile_k"]

_TRACE_FIELDS = (
    *("token", "slot", "expert", "fc1_accumulators", "fc1_output", "activation"),
    *("fc2_accumulators", "fc2_output"),
)


@dataclass(frozen=True)
class Content:
    """What is stored of a case: see `case.Case`."""

    tensors: Mapping[str, Tensor]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    derived: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    output_tensors: Mapping[tuple[int, int], str] = field(default_factory=dict)


@dataclass(frozen=True)
class Definition:
    """A case before it is built; `build` is deterministic."""

    suite: str
    name: str
    kind: str
    why: str
    catches: tuple[str, ...]
    unique_for: str
    build: Callable[[Source], Content]
    pending: bool = False

    @property
    def id(self) -> str:
        return f"{self.suite}/{self.name}"

    def content(self) -> Content:
        return self.build(Source(self.id))


DEFINITIONS: dict[str, Definition] = {}


def define(
    kind: str = "moe",
    *,
    why: str = "",
    catches: str = "",
    unique_for: str = "",
    name: str | None = None,
    pending: bool = False,
) -> Callable[[Callable[[Source], Content | MoeCall]], Callable[[Source], Content | MoeCall]]:
    """Register the decorated function as a case of its module's suite, under its own name.

    Args:
        kind, unique_for: as in `case.Case`.
        why: as there; by default the function's docstring.
        catches: names of defects, separated by blanks.
        name: another name, where one function makes several cases.
        pending: a kernel call, of W4A16 or W4A8, that no GPU has confirmed yet, from a contributor who has none.

    Raises:
        ValueError: two cases of one name, or a case that is pending and no kernel call.
    """
    if pending and kind not in ("moe", "w4a8"):
        raise ValueError(
            f"pending: expected a case of kind 'moe' or 'w4a8', which a GPU can confirm, got kind {kind!r}"
        )

    def register(build: Callable[[Source], Content | MoeCall]) -> Callable[[Source], Content | MoeCall]:
        def content(source: Source) -> Content:
            built = build(source)
            return moe_content(built) if isinstance(built, MoeCall) else built

        definition = Definition(
            suite=build.__module__.rpartition(".")[2],
            name=name or build.__name__,
            kind=kind,
            why=" ".join((why or build.__doc__ or "").split()),
            catches=tuple(catches.split()),
            unique_for=unique_for,
            build=content,
            pending=pending,
        )
        if definition.id in DEFINITIONS:
            raise ValueError(f"{definition.id}: defined twice")
        DEFINITIONS[definition.id] = definition
        return build

    return register


def moe_content(
    call: MoeCall,
    *,
    derived: Mapping[str, Mapping[str, Any]] | None = None,
    extra: Mapping[str, Tensor] | None = None,
    compact: bool = False,
    tile_n: int | None = None,
) -> Content:
    """Everything that is stored of a kernel call: tensors in both layouts, the trace, every output.

    Args:
        call: the call, of the default kernel.
        derived: recipes of the tensors that are not stored; then neither layouts nor trace are.
        extra: further tensors to keep.
        compact: without the second layouts and the trace, which are most of a case of many tokens or experts.
        tile_n: the N tile of both GEMMs, where the outputs are those of this one alone.

    Raises:
        ValueError: an output depends on tile_n, which that of a golden must not (docs/arithmetic.md, section 3).
    """
    experts = {name: getattr(call.experts, name) for name in EXPERT_TENSORS}
    tensors: dict[str, Tensor] = {name: t for name, t in experts.items() if t is not None}
    tensors = {name: t for name, t in tensors.items() if name not in (derived or {})}
    for name in ("input", "token_selected_experts", "token_final_scales"):
        tensors[name] = getattr(call, name)
    tensors |= extra or {}
    outputs = outputs_by_tile_k(call, tile_n)
    if not derived and tile_n is None:
        _refuse_tile_n(call, outputs)
    if not derived and not compact:
        for name in ("fc1", "fc2"):
            tensors[f"{name}_weights_sm90"] = interleave_weights_sm90(experts[f"{name}_weights"])
            tensors[f"{name}_scales_sm90"] = fold_scales_sm90(experts[f"{name}_scales"])
        stages = trace(call)
        tensors |= {f"trace.{name}": getattr(stages, name) for name in _TRACE_FIELDS}

    names: dict[tuple[int, int], str] = {}
    distinct: dict[bytes, str] = {}
    for pair, output in outputs.items():
        names[pair] = distinct.setdefault(tensor_bytes(output), f"output.tile_k_{pair[0]}_{pair[1]}")
        tensors.setdefault(names[pair], output)
    parameters = {
        name: getattr(call, name) for name in ("ep_size", "ep_rank", "tp_size", "tp_rank", "strict")
    }
    parameters |= {} if tile_n is None else {"tile_n": tile_n}
    if call.activation_type != SWIGLU:
        parameters["activation_type"] = call.activation_type
    parameters |= {name: True for name in ("unscaled", "enable_alltoall") if getattr(call, name)}
    return Content(tensors, parameters, derived or {}, names)


def outputs_by_tile_k(call: MoeCall, tile_n: int | None = None) -> dict[tuple[int, int], Tensor]:
    """The output for every pair of K tiles that divide the GEMMs' K; of the default N tile or of another one.

    Only of tiles that the newest kernel runs: with some N tiles the largest K lacks shared memory.
    """
    n = Tactic().tile_n if tile_n is None else tile_n
    run = {tile[2] for tile in NEWEST.tiles if tile[1] == n and tile not in NEWEST.refused}
    first_tiles, second_tiles = (
        [tile for tile in TILE_K if tile in run and depth % tile == 0]
        for depth in (call.experts.hidden_size, call.experts.intermediate_size)
    )
    return {
        (first, second): forward(replace(call, kernel=Sm90Kernel.of_tiles((first, second), (n, n))))
        for first in first_tiles
        for second in second_tiles
    }


def _refuse_tile_n(call: MoeCall, outputs: Mapping[tuple[int, int], Tensor]) -> None:
    for tile_k in ((tile, tile) for tile in TILE_K if (tile, tile) in outputs):
        expected = tensor_bytes(outputs[tile_k])
        for tile_n in sorted({tile[1] for tile in NEWEST.tiles if tile[2] == tile_k[0]}):
            output = forward(replace(call, kernel=Sm90Kernel.of_tiles(tile_k, (tile_n, tile_n))))
            if tensor_bytes(output) != expected:
                raise ValueError(f"the output for tile_k {tile_k} depends on tile_n: {tile_n} gives another")
