"""What is wrong with a byte order, from the bytes: another operation, or a map of rows, bytes or bits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mxfp4ref._words import shortened
from mxfp4ref.conformance.findings.index_words import map_words, moved_runs
from mxfp4ref.conformance.values.value_words import bit_words, region_words, slice_words
from mxfp4ref.formats import layout
from mxfp4ref.formats.generations import GENERATIONS

__all__ = ["layout_words", "permutation_words"]

_INVERSES = {
    "interleave_weights_sm90": "deinterleave_weights_sm90",
    "swap_gate_up": "swap_gate_up",
    "interleaved_to_halves": "halves_to_interleaved",
    "halves_to_interleaved": "interleaved_to_halves",
}
_PERIODS = (2, 4, 8, 16, 32, 64, 128, 256)
_CHUNKS = (256, 128, 64, 32, 16, 8)  # bytes that stay together
_LISTED = 6
_ENOUGH = 16  # blocks from which a permutation is told


def layout_words(inputs: Mapping[str, Any], got: Tensor, want: Tensor) -> str:
    """What explains every byte, or "".

    Args:
        inputs: of a golden case of kind "layout".
        got, want: uint8, of one shape.
    """
    for words, made in _operations(inputs):
        if made is not None and made.numel() == got.numel() and torch.equal(made.flatten(), got.flatten()):
            return words
    if torch.equal(got, (want & 15) << 4 | want >> 4):
        return "the nibbles of every byte are exchanged"
    plain = got.dim() == 3
    names = ("expert", "row", "column") if plain else tuple(f"dimension-{n} slice" for n in range(got.dim()))
    if words := region_words(got, want, names, _there(inputs, want)) or bit_words(got, want):
        return words
    for dim, name in enumerate(names):
        if words := slice_words(got, want, dim, name):
            return words
    if words := permutation_words(got, want) or _constant_words(got, want):
        return words
    slices = (slice_words(got, want, dim, name, listed=True) for dim, name in enumerate(names))
    return next(filter(None, slices), "") or _moved_words(got, want)


def _operations(inputs: Mapping[str, Any]) -> Iterator[tuple[str, Tensor | None]]:
    """Other operations than the right one, and their results."""
    before, operation = inputs["before"].cpu(), inputs["operation"]
    yield f"{operation} is left out", before
    right = _applied(operation, before, inputs)
    if right is not None and right.shape == before.shape:
        yield f"{operation} is applied twice", _applied(operation, right, inputs)
    if (inverse := _INVERSES.get(operation)) is not None:
        yield f"{inverse} is applied instead of {operation}", _applied(inverse, before, inputs)
    if operation.endswith("_sm90"):
        for generation in GENERATIONS:
            made = _called(operation, before, generation)
            yield f"the order is that of the {generation.name} kernel", made
    for other in ("swap_gate_up", "interleaved_to_halves", "halves_to_interleaved"):
        if other != operation:
            yield f"{other} is applied instead of {operation}", _called(other, before)
    if operation == "pad_halves":
        padded = before.new_zeros(right.shape if right is not None else before.shape)
        padded[:, : before.shape[1]] = before
        yield "the padding is at the end of the joined halves instead of each half's", padded


def _there(inputs: Mapping[str, Any], want: Tensor) -> Iterator[tuple[str, Tensor | None]]:
    """What there may be in some places only."""
    yield from _operations(inputs)
    yield "the nibbles of every byte are exchanged", (want & 15) << 4 | want >> 4
    for dim in range(1, want.dim()):
        yield f"dimension {dim} is in reverse", want.flip(dim)


def _applied(operation: str, tensor: Tensor, inputs: Mapping[str, Any]) -> Tensor | None:
    from mxfp4ref.goldens.runs import run_stage

    try:
        made = run_stage("layout", {**inputs, "operation": operation, "before": tensor})
    except (TypeError, ValueError):
        return None
    return made if isinstance(made, Tensor) else None


def _called(operation: str, *arguments: Any) -> Tensor | None:
    try:
        made: Tensor = getattr(layout, operation)(*arguments)
    except (TypeError, ValueError):
        return None
    return made


def permutation_words(got: Tensor, want: Tensor) -> str:
    """One permutation of the bytes, or bits, of every block of some size."""
    one, other = got.flatten(), want.flatten()
    for period in (*_PERIODS, *{got.shape[-1], got[0].numel()} - set(_PERIODS)):
        if len(one) % period == 0 and len(one) // period >= _ENOUGH:
            places = _permutation(one.view(-1, period), other.view(-1, period))
            if places is not None:
                return f"bytes are right but in another order, with a period of {period}: {_order(places, 'byte')}"
    for size in (1, 2, 4):
        if len(one) % size == 0 and len(one) // size >= _ENOUGH * size:
            bits = [(t.view(-1, size, 1) >> torch.arange(8)) & 1 for t in (one, other)]
            places = _permutation(*(b.flatten(1) for b in bits))
            if places is not None:
                words = f"the bits of every word of {8 * size} are in another order"
                return f"{words}: {_order(places, 'bit')}"
    return ""


def _permutation(got: Tensor, want: Tensor) -> list[int] | None:
    """For each column of `got` the column of `want` that it is, if they are all different ones."""
    same = (got[:, :, None] == want[:, None]).all(0)
    if not bool(same.any(1).all()):
        return None
    places: list[int] = []
    for column in same:
        left = [place for place in column.nonzero().flatten().tolist() if place not in places]
        if not left:
            return None
        places.append(left[0])
    return places


def _order(places: list[int], name: str) -> str:
    words = map_words(torch.tensor(places), name, len(places))
    return words or f"{name}s " + ", ".join(map(str, places[:16])) + (", ..." if len(places) > 16 else "")


def _constant_words(got: Tensor, want: Tensor) -> str:
    wrong = got != want
    values = set(got[wrong].tolist())
    if len(values) != 1 or int(wrong.sum()) < _ENOUGH:
        return ""
    rows = wrong.flatten(1).any(1) if got.dim() < 3 else wrong.any(0).flatten(1).any(1)
    places = rows.nonzero().flatten().tolist()
    where = f" of rows {places[0]} to {places[-1]} of {len(rows)}" if len(places) < len(rows) else ""
    return f"every byte{where} that differs is {values.pop()}"


def _moved_words(got: Tensor, want: Tensor) -> str:
    """Where each chunk of bytes has come from, if all of them stand somewhere."""
    for size in _CHUNKS:
        if got.numel() % size or got.numel() < 2 * size:
            continue
        one, other = (t.reshape(-1, size).tolist() for t in (got, want))
        places: dict[tuple[int, ...], int] = {}
        for place, chunk in enumerate(other):
            places.setdefault(tuple(chunk), place)
        own = [chunk == there for chunk, there in zip(one, other, strict=True)]
        source = [n if own[n] else places.get(tuple(chunk), -1) for n, chunk in enumerate(one)]
        if -1 not in source:
            told = (
                f"{first * size} to {last * size + size - 1} are those from {place * size} on"
                for first, last, place in moved_runs(source)
            )
            return f"bytes are right but at other places, in chunks of {size}: {shortened(told, _LISTED)}"
    return ""
