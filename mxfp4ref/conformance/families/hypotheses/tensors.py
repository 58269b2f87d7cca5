"""Hypotheses on the experts' tensors: read at another place, scaled, dropped, or in another order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, permutations

import torch
from torch import Tensor

from mxfp4ref.conformance.families.hypotheses.index_maps import (
    IndexMap,
    block_maps,
    expert_maps,
    neighbour_maps,
    padded_maps,
    taken,
)
from mxfp4ref.conformance.families.hypothesis import Change, Hypothesis, Pipeline
from mxfp4ref.conformance.families.solved.tensor_groups import (
    both_gemms,
    gemm_groups,
    groups_of,
    parameter_groups,
)
from mxfp4ref.formats.mxfp4 import GROUP_SIZE, pack_codes, unpack_codes
from mxfp4ref.model.call import MoeCall

__all__ = [
    "bias_hypotheses",
    "constants",
    "expert_hypotheses",
    "layout_hypotheses",
    "mapped",
    "of_codes",
    "of_gemms",
    "value_hypotheses",
]

_BYTES = GROUP_SIZE // 2  # of a K group's codes
_AS_COLUMNS = ", or so are the activation's columns, as they are stored or as GEMM2 reads them"
_On = Callable[[Tensor], Tensor]


def mapped(names: tuple[str, ...], change: Callable[[str, Tensor], Tensor]) -> Change:
    """The change of these tensors, where they are given."""

    def on(pipeline: Pipeline) -> Pipeline:
        tensors = {name: getattr(pipeline.call.experts, name) for name in names}
        return pipeline.having(**{n: change(n, t) for n, t in tensors.items() if t is not None})

    return on


def of_gemms(
    family: str, fcs: tuple[str, ...], words: str, what: str, change: _On, cost: float
) -> Hypothesis:
    """That the `what` ("weights", "scales") of these GEMMs are changed alike."""
    return Hypothesis(
        family, fcs, words, mapped(tuple(f"{fc}_{what}" for fc in fcs), lambda _, t: change(t)), cost
    )


def expert_hypotheses(call: MoeCall) -> Iterator[Hypothesis]:
    """Tensors of another expert."""
    for group in groups_of(call) if call.experts.num_experts > 1 else ():
        for axis in expert_maps():
            yield Hypothesis(
                "another expert's",
                group.stages,
                group.of(axis.of("expert")),
                mapped(group.names, _along(0, axis)),
                axis.cost,
                kind=group.kind,
            )


def _along(dim: int, axis: IndexMap, size: int = 1) -> Callable[[str, Tensor], Tensor]:
    """The map along a dimension that counts so many elements as one."""

    def change(name: str, tensor: Tensor) -> Tensor:
        unit = size if name.endswith("weights") and dim == 2 else 1
        shape = tensor.shape
        parted = tensor.reshape(*shape[:dim], shape[dim] // unit, -1)
        return parted.index_select(dim, axis.index(parted.shape[dim]).to(tensor.device)).reshape(shape)

    return change


def _row_parts(call: MoeCall, names: tuple[str, ...]) -> Iterator[tuple[str, Callable[[_On], _On]]]:
    """Rows taken together: all, or for an fc1 with gates the rows of up and gate each by themselves."""
    yield "", lambda change: change
    if call.experts.gated and all(name.startswith("fc1") for name in names):
        yield " within each of the halves up and gate", lambda change: lambda t: _halves(t, change, (0, 1))
        yield " within the up half", lambda change: lambda t: _halves(t, change, (0,))
        yield " within the gate half", lambda change: lambda t: _halves(t, change, (1,))


def _halves(tensor: Tensor, change: _On, which: tuple[int, ...]) -> Tensor:
    parts = tensor.chunk(2, dim=1)
    return torch.cat([change(part) if i in which else part for i, part in enumerate(parts)], dim=1)


def bias_hypotheses(call: MoeCall) -> Iterator[Hypothesis]:
    """Biases in another order."""
    return _layouts(call, biases=True)


def layout_hypotheses(call: MoeCall) -> Iterator[Hypothesis]:
    """Rows and K groups of weights and scales in another order."""
    return _layouts(call, biases=False)


def _layouts(call: MoeCall, *, biases: bool) -> Iterator[Hypothesis]:
    for group in gemm_groups():
        alone = group.names[0].endswith("biases")
        if not group.given(call) or alone != biases:
            continue
        fc = group.names[0][:3]
        every = (f"{fc}_{what}" for what in ("weights", "scales", "biases"))
        whole = {name for name in every if getattr(call.experts, name) is not None}
        for part, within in _row_parts(call, group.names):
            # Rows of up and of gate that move alike, with all they have, are the activation's columns.
            moved = "each of" in part
            columns = fc == "fc1" and moved and whole <= set(group.names)
            for axis in (*neighbour_maps(), *block_maps(), *padded_maps()):
                change = within(lambda t, a=axis: taken(t, 1, a.index(t.shape[1])))
                row = axis.of("row") + axis.of_up_and_gate * (fc == "fc1" and call.experts.gated and not part)
                yield Hypothesis(
                    "rows",
                    ("activation", "fc1") if columns else group.stages,
                    f"{group.words} are in each row those of {row}{part}{_AS_COLUMNS * columns}",
                    mapped(group.names, lambda _, t, c=change: c(t)),
                    axis.cost + 0.3 * bool(part),
                )
        if not alone and len(group.names) < 3:
            for axis in (*neighbour_maps(), *block_maps((2, 4, 8, 16))):
                yield Hypothesis(
                    "K groups",
                    group.stages,
                    f"{group.words} are in each K group of 32 those of {axis.of('K group')}",
                    mapped(group.names, _along(2, axis, _BYTES)),
                    axis.cost + 0.1,
                )
        if group.names == (f"{fc}_weights",):
            for axis in (*neighbour_maps(), *block_maps((2, 4, 8))):
                yield Hypothesis(
                    "K groups",
                    group.stages,
                    f"the bytes of {group.words} within each K group are those of {axis.of('byte')}",
                    mapped(group.names, lambda _, t, a=axis: _within_groups(t, a.index(_BYTES))),
                    axis.cost + 0.4,
                )


def _within_groups(packed: Tensor, index: Tensor) -> Tensor:
    return packed.view(*packed.shape[:2], -1, _BYTES)[..., index.to(packed.device)].flatten(2)


def _scale_values() -> Iterator[tuple[str, _On, float]]:
    for shift in (1, -1, 2, -2, 3, -3, 4, -4, 5, -5, 6, -6, 7, -7, 8, -8):
        factor = f"{2**shift}x" if shift > 0 else f"1/{2**-shift} of"
        words = f"{factor} what they should be (every scale byte {abs(shift)} too {'high' if shift > 0 else 'low'})"
        yield (
            words,
            lambda s, d=shift: (s.to(torch.int16) + d).clamp(0, 255).to(torch.uint8),
            abs(shift) ** 0.3,
        )
    yield "taken as 1 (byte 127): they are not applied", lambda s: torch.full_like(s, 127), 1
    yield "those of the first row, used for all rows", lambda s: s[:, :1].expand_as(s).contiguous(), 1.1
    yield "the largest of each row's", lambda s: s.amax(2, keepdim=True).expand_as(s).contiguous(), 1.5
    yield (
        "the largest of each expert's",
        lambda s: s.amax((1, 2), keepdim=True).expand_as(s).contiguous(),
        1.5,
    )
    yield "the smallest of each row's", lambda s: s.amin(2, keepdim=True).expand_as(s).contiguous(), 1.7
    for size in (2, 4):
        yield f"the largest of each {size} K groups'", lambda s, n=size: largest_of_groups(s, n), 1.6
    yield "at most 1 (bytes cut off at 127)", lambda s: s.clamp(max=127), 1.6
    yield "at least 1 (bytes cut off at 127)", lambda s: s.clamp(min=127), 1.6
    yield "inverted (2^-e for 2^e)", lambda s: (254 - s.to(torch.int16)).clamp(0, 255).to(torch.uint8), 1.6
    yield "squared", lambda s: (2 * s.to(torch.int16) - 127).clamp(0, 255).to(torch.uint8), 1.6
    yield "applied to a power of four (lowest bit of the byte cleared)", lambda s: s & 0xFE, 1.8
    yield "read with the highest bit of the byte cleared", lambda s: s & 0x7F, 1.8


def largest_of_groups(scales: Tensor, size: int) -> Tensor:
    """Each scale byte the largest of so many K groups', `[E, N, G]`; as they are where these do not fill G."""
    if scales.shape[2] % size:
        return scales
    grouped = scales.view(*scales.shape[:2], -1, size)
    return grouped.amax(3, keepdim=True).expand_as(grouped).reshape(scales.shape)


def of_codes(change: _On) -> _On:
    """The change of codes, each by itself, as one of packed bytes."""

    def on(packed: Tensor) -> Tensor:
        codes = change(unpack_codes(torch.arange(256, dtype=torch.uint8)[:, None]))
        table = pack_codes(codes.to(torch.uint8)).flatten()
        return table.to(packed.device)[packed.view(torch.uint8).to(torch.int32)]

    return on


def _weight_values() -> Iterator[tuple[str, _On, float]]:
    def table(*magnitudes: int) -> _On:
        of = torch.tensor(magnitudes, dtype=torch.uint8)
        return of_codes(lambda c: c & 8 | of[(c & 7).to(torch.int64)])

    yield "without their signs", of_codes(lambda c: c & 7), 1
    yield "with the opposite sign", of_codes(lambda c: c ^ 8), 1
    yield "with the low code of each byte taken twice", lambda p: p & 15 | p << 4, 1.1
    yield "with the high code of each byte taken twice", lambda p: p >> 4 | p & 0xF0, 1.1
    yield "with the largest code (6) read as 4", table(0, 1, 2, 3, 4, 5, 6, 6), 1.3
    yield "with 4 and 6 cut off at 3", table(0, 1, 2, 3, 4, 5, 5, 5), 1.4
    yield "with 0.5 read as 1", table(0, 2, 2, 3, 4, 5, 6, 7), 1.4
    yield "with 1.5 read as 1 and 3 as 2 (mantissa bit dropped)", table(0, 0, 2, 2, 4, 4, 6, 6), 1.4
    yield "with codes one too high", table(1, 2, 3, 4, 5, 6, 7, 7), 1.6
    yield "with codes one too low", table(0, 0, 1, 2, 3, 4, 5, 6), 1.6
    yield "with sign and lowest bit exchanged", of_codes(lambda c: (c & 1) << 3 | c & 6 | c >> 3), 1.6
    yield (
        "with the bits of each code in reverse",
        of_codes(lambda c: (c & 1) << 3 | (c & 2) << 1 | (c & 4) >> 1 | c >> 3),
        1.6,
    )


def _bias_values() -> Iterator[tuple[str, _On, float]]:
    yield "dropped", torch.zeros_like, 0.9
    yield "with the opposite sign", torch.neg, 1
    for factor in (2.0, 0.5):
        yield f"{factor:g} times what they should be", lambda b, f=factor: (b.float() * f).to(b.dtype), 1.1


def _cut_off_scales(call: MoeCall, names: tuple[str, ...]) -> Iterator[tuple[str, _On, float]]:
    """Near the largest or the least byte of these tensors; at 127 it is tried anyway."""
    own = torch.cat([getattr(call.experts, name).flatten() for name in names])
    low, high = int(own.min()), int(own.max())
    most = (("at most", byte, {"max": byte}) for byte in range(max(high - _CUT_OFF, 0), high))
    least = (("at least", byte, {"min": byte}) for byte in range(low + 1, min(low + _CUT_OFF, 255) + 1))
    for how, byte, ends in chain(most, least):
        if byte != 127:
            words = f"{how} 2^{byte - 127} (bytes cut off at {byte})"
            yield words, lambda s, ends=ends: s.clamp(**ends), 1.7


def value_hypotheses(call: MoeCall) -> Iterator[Hypothesis]:
    """Scales, codes and biases of other values, in one or both GEMMs, and in one half of fc1."""
    by_kind = (("scales", _scale_values), ("weights", _weight_values), ("biases", _bias_values))
    for kind, values in by_kind:
        groups = [g for g in (*gemm_groups(), *both_gemms()) if all(name.endswith(kind) for name in g.names)]
        for group in groups:
            if not group.given(call):
                continue
            cut_off = _cut_off_scales(call, group.names) if kind == "scales" else ()
            for words, change, cost in chain(values(), cut_off):
                for part, within in _row_parts(call, group.names):
                    inside = within(change)
                    yield Hypothesis(
                        "values",
                        group.stages,
                        f"{group.words} are {words}{part}",
                        mapped(group.names, lambda _, t, c=inside: c(t)),
                        cost + 0.3 * bool(part),
                    )


_CUT_OFF = 8  # bytes from the largest, or the least
_ALPHAS = (1.702, 1.0, 1.7, 1.5, 2.0, 0.5, -1.0, 1.595769, 0.0)
_BETAS = (1.0, 0.0, -1.0, 0.5, 2.0, 1.702)
# fmt: off
_LIMITS = (
    7, 10, 5, 6, 8, 20, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5.5, 6.5, 7.5, 9,
    0.5, 0.25, 0.75, 1.25, 12, 14, 15, 16, 24, 25, 30, 32, 50, 64, 100, 127, 128, 448, 0,
)
# fmt: on


def constants(call: MoeCall) -> Iterator[Hypothesis]:
    """SwiGLU parameters that are constants, of another value, or one another's."""
    yield from _exchanged(call)
    for group in parameter_groups():
        if not group.given(call) or len(group.names) > 1:
            continue
        name = group.names[0].removeprefix("swiglu_")
        values = {"alpha": _ALPHAS, "beta": _BETAS, "limit": _LIMITS}
        for value in values[name]:
            yield Hypothesis(
                "values",
                group.stages,
                f"the SwiGLU {name} is hard-coded as {value:g}",
                mapped(group.names, lambda _, t, v=value: torch.full_like(t, v)),
                1.2,
            )
        for words, change in (
            ("doubled", lambda t: t * 2),
            ("halved", lambda t: t / 2),
            ("one too high", lambda t: t + 1),
            ("of the opposite sign", torch.neg),
            ("its reciprocal", lambda t: 1 / t),
            ("the largest of all experts'", lambda t: t.max().expand_as(t).contiguous()),
            ("the smallest of all experts'", lambda t: t.min().expand_as(t).contiguous()),
            ("the experts' mean", lambda t: t.mean().expand_as(t).contiguous()),
            ("cut to an integer", torch.trunc),
            ("rounded to float16", lambda t: t.to(torch.float16).to(t.dtype)),
        ):
            yield Hypothesis(
                "values",
                group.stages,
                f"the SwiGLU {name} is {words}",
                mapped(group.names, lambda _, t, c=change: c(t)),
                1.5,
            )


def _exchanged(call: MoeCall) -> Iterator[Hypothesis]:
    """SwiGLU parameters in each other's places, or all in one table whose axes are taken the other way round."""
    names = ("swiglu_alpha", "swiglu_beta", "swiglu_limit")
    given = {name: t for name in names if (t := getattr(call.experts, name)) is not None}

    def hypothesis(words: str, change: Change, cost: float) -> Hypothesis:
        return Hypothesis("values", ("activation",), words, change, cost, across_experts=True)

    for order in permutations(names):
        moved = {name: other for name, other in zip(names, order, strict=True) if name != other}
        if given.keys() & moved.keys():
            told = ", ".join(f"{name[7:]} is the {other[7:]}" for name, other in moved.items())
            yield hypothesis(
                f"the SwiGLU parameters are exchanged: {told}",
                lambda p, m=moved: p.having(**{n: getattr(p.call.experts, o) for n, o in m.items()}),
                1.2,
            )
    if len(given) < 2:
        return
    for by_expert in (False, True):
        lie, read = ("[{0}, E]", "[E, {0}]")[:: -1 if by_expert else 1]

        def on(pipeline: Pipeline, by_expert: bool = by_expert) -> Pipeline:
            experts, own = pipeline.call.experts, list(given.values())
            table = torch.stack([getattr(experts, name).flatten() for name in given], int(by_expert))
            parts = (table.view(len(given), -1) if by_expert else table.view(-1, len(given)).T).contiguous()
            return pipeline.having(**{n: t.view(o.shape) for n, t, o in zip(given, parts, own, strict=True)})

        table = f"{', '.join(name[7:] for name in given)} lie in one table {lie}, which is read as {read}"
        yield hypothesis(
            f"the SwiGLU parameters {table.format(len(given))}: other experts' and each other's", on, 1.3
        )
