"""What a dequantisation gives by scale byte, by code and by place, as a table of ranges.

Each value is right, zero, Inf, NaN, a power of two times the right one, rounded, or another number. Which it is
follows from the scale byte, the size of the right value, the code, both, or the place; the fewest ranges are told.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from mxfp4ref.conformance.comparison import differing
from mxfp4ref.conformance.findings.conditions import indices_words
from mxfp4ref.conformance.values.value_rules import computed_otherwise
from mxfp4ref.formats.mxfp4 import E2M1_VALUES, GROUP_SIZE, SCALE_BIAS, unpack_codes

__all__ = ["value_table"]

_MOST = 5  # ranges of one table
_ENOUGH = 16  # values from which something is told
_OTHER = "another number"
_ROUNDED = "rounded"
_NUMBERS = "numbers instead of NaN"
_BESIDE, _ALL = "beside these by the code", "are others, and no others are"
_INEXACT = _BESIDE, _ALL, "in places"
_TIMES = "times the right ones"
_Runs = list[tuple[int, int, str]]  # from which number to which, and what comes there


def value_table(inputs: Mapping[str, Any], got: Tensor, want: Tensor) -> tuple[str, bool]:
    """What comes instead of the right values, and whether that predicts every bit; "" where nothing orders it.

    Args:
        inputs: of a golden case of kind "dequantize".
        got, want: `[..., K]`, of one floating-point dtype and shape.
    """
    codes, scales = unpack_codes(inputs["packed"].cpu()).long(), inputs["scales"].cpu()
    shape = codes.shape
    bytes_ = scales.view(torch.uint8).long().repeat_interleave(GROUP_SIZE, -1)
    columns, rows = torch.arange(shape[-1]).expand(shape), torch.arange(shape[:-1].numel())[:, None]
    parts = codes, bytes_, columns, rows.expand(-1, shape[-1]), got, want
    values = _Values(*(part.reshape(-1) for part in parts))
    if int(values.wrong.sum()) < _ENOUGH:
        return "", False
    table = _table(values)
    if rule := computed_otherwise(inputs, got):
        return f"{rule}{', ' if ': ' in rule else ': '}{table}" if table else rule, True
    if not table:
        return _of_one_kind(values), False
    return f"values are others: {table}", values.exact and not any(part in table for part in _INEXACT)


class _Values:
    """Values one by one, `[N]` each, with what each is instead of the right one."""

    def __init__(self, *parts: Tensor) -> None:
        self.parts = parts
        self.code, self.byte, self.column, self.row, self.got, self.want = parts
        self.wrong = differing(self.got, self.want) & ~(self.got.isnan() & self.want.isnan())
        self.kind, self.words = _kinds(self.got, self.want, self.wrong)
        self.telling = (self.want != 0) & ~self.want.isnan()  # zero comes right of most mistakes

    def of(self, chosen: Tensor) -> _Values:
        return _Values(*(part[chosen] for part in self.parts))

    @property
    def exact(self) -> bool:
        """Whether what each is gives its bits, with the sign of the right one."""
        signs = (self.got.signbit() == self.want.signbit()) | self.got.isnan()
        for sure in ("+0", "of the other sign"):
            signs |= self.kind == self.words.index(sure)
        fine = torch.tensor([word not in (_OTHER, _ROUNDED, _NUMBERS) for word in self.words])[self.kind]
        return bool((~self.wrong | (fine & signs)).all())


def _kinds(got: Tensor, want: Tensor, wrong: Tensor) -> tuple[Tensor, list[str]]:
    """What each value is, as a number `[N]`, and these in words; 0 is right."""
    one, other = got.double(), want.double()
    fraction, power = torch.frexp(one / other)
    ratio = one / other
    usable = wrong & one.isfinite() & other.isfinite() & (one != 0) & (other != 0)
    kind = torch.zeros(len(got), dtype=torch.int64)
    words = ["right", "0", "+0", "Inf", "NaN", _OTHER, _ROUNDED, "of the other sign", _NUMBERS]
    kind[wrong] = words.index(_OTHER)
    rest = wrong & (one != 0) & one.isfinite() & ~other.isnan()
    kind[usable & (ratio > 0.5) & (ratio < 2)] = words.index(_ROUNDED)
    sizes = one[rest & (fraction != 0.5)].abs()
    for factor in sorted(set(power[usable & (fraction == 0.5) & (ratio != 1)].tolist())):
        kind[usable & (fraction == 0.5) & (power == factor)] = len(words)
        words.append(f"{_power(factor - 1)} {_TIMES}")
    if len(sizes) and bool((sizes == sizes[0]).all()):
        words.append(f"+-{float(sizes[0]):.6g}")
        kind[rest & (one.abs() == sizes[0])] = len(words) - 1
    kind[wrong & other.isnan()] = words.index(_NUMBERS)
    zeros = wrong & (one == 0) & (other != 0)
    plain = bool((zeros & other.signbit()).any()) and not bool(one[zeros].signbit().any())
    kind[zeros] = words.index("+0" if plain else "0")
    kind[wrong & one.isinf()] = words.index("Inf")
    kind[wrong & one.isnan()] = words.index("NaN")
    kind[wrong & (one == -other)] = words.index("of the other sign")
    return kind, words


def _power(exponent: int) -> str:
    return f"{2.0**exponent:g}" if abs(exponent) < 10 else f"2^{exponent}"


def _table(values: _Values) -> str:
    """The table of the fewest ranges, of all values or of those in a part that all wrong ones lie in."""
    zeros = values.code & 7 == 0
    others, told = values.of(~zeros & (values.wrong | ~values.want.isnan())), ""
    if bool(others.wrong.any()):
        told = _in_order(others) or _by_code(others) or _in_a_part(others)
        if not told:
            return ""
    of_zeros = values.of(zeros & (values.got != 0))
    if bool(of_zeros.wrong.any()):
        made = {of_zeros.words[kind] for kind in of_zeros.kind[of_zeros.wrong].tolist()}
        told += ", " * bool(told) + f"zeros become {' or '.join(sorted(made))} in places"
    return told


def _in_order(values: _Values) -> str:
    """By the scale byte, the right value, the code or the place, whichever has the fewest ranges."""
    sizes, size = torch.unique(
        values.want.double().abs().nan_to_num(torch.inf, torch.inf), return_inverse=True
    )
    options: list[tuple[int, str]] = []
    bytes_ = _runs(values, values.byte)
    for runs, told in (
        (bytes_, _bytes_told),
        (_runs(values, size), lambda runs: _sizes_told(runs, sizes)),
        (_runs(values, values.code & 7), _codes_told),
        (_runs(values, values.code), _signed_codes_told),
        (_runs(values, values.column % 2), _places("element", " of each two")),
        (_runs(values, values.column % GROUP_SIZE), _places("element", " of each group")),
        (_runs(values, values.column // GROUP_SIZE), _places("K group", "")),
        (_runs(values, values.row), _places("row", "")),
    ):
        if runs and 0 < len(_wrong(runs)) <= _MOST and not any(kind == _OTHER for *_, kind in runs):
            options.append((len(_wrong(runs)), told(runs)))
    if not options:
        return ""
    count, words = min(options, key=lambda option: option[0])
    rows = _runs(values, values.row)
    if bytes_ and rows and words == _bytes_told(bytes_) and len(_wrong(rows)) == count:
        words += (
            f" (here {', '.join(f'rows {a} to {b}' for a, b in _wrong(rows))} of {int(values.row.max()) + 1})"
        )
    return words


def _runs(values: _Values, key: Tensor) -> _Runs | None:
    """What comes by a number, if that alone decides it, in ranges; None if it does not."""
    pairs = torch.unique(torch.stack((key, values.kind)), dim=1)
    if not 1 < len(torch.unique(pairs[0])) == pairs.shape[1]:
        return None
    runs: _Runs = []
    for word, some in groupby(zip(*pairs.tolist(), strict=True), key=lambda pair: values.words[pair[1]]):
        keys = [number for number, _ in some]
        runs.append((keys[0], keys[-1], word))
    return _ramps(runs)


def _ramps(runs: _Runs) -> _Runs:
    """Powers of two that change from number to number, as one range."""
    found: _Runs = []
    for is_power, some in groupby(runs, key=lambda run: run[2].endswith(_TIMES)):
        alike = list(some)
        if is_power and len(alike) > 2:
            low, high = (word.split()[0] for word in (alike[0][2], alike[-1][2]))
            found.append((alike[0][0], alike[-1][1], f"{low} (the first) to {high} (the last) {_TIMES}"))
        else:
            found += alike
    return found


def _wrong(runs: _Runs) -> list[tuple[int, int]]:
    return [(first, last) for first, last, kind in runs if kind != "right"]


def _told(runs: _Runs, one: Callable[[int, int, bool, bool], str]) -> str:
    ends = runs[0][0], runs[-1][1]
    return ", ".join(
        f"{one(first, last, first == ends[0], last == ends[1])}: {_give(kind)}"
        for first, last, kind in runs
        if kind != "right"
    )


def _give(kind: str) -> str:
    return {_ROUNDED: "rounded", "of the other sign": "the other sign"}.get(kind, kind)


def _bytes_told(runs: _Runs) -> str:
    def one(first: int, last: int, *_: bool) -> str:
        if first == last:
            return f"scale byte {first}"
        return f"scale bytes {first} to {last} (2^{first - SCALE_BIAS} to 2^{last - SCALE_BIAS})"

    return _told(runs, one)


def _sizes_told(runs: _Runs, sizes: Tensor) -> str:
    def number(place: int) -> str:
        size = float(sizes[place])
        if size in (0.0, torch.inf) or 1e-4 < size < 1e6:
            return f"{size:g}"
        fraction, power = math.frexp(size)
        return f"{2 * fraction:g} x 2^{power - 1}" if fraction != 0.5 else f"2^{power - 1}"

    def one(first: int, last: int, least: bool, greatest: bool) -> str:
        if first == last:
            return f"magnitudes of {number(first)}" if sizes[first] < torch.inf else "Inf and NaN"
        if least and not greatest:
            return f"magnitudes up to {number(last)}"
        return f"magnitudes from {number(first)}" + (" on" if greatest else f" to {number(last)}")

    return _told(runs, one)


def _codes_told(runs: _Runs) -> str:
    def one(first: int, last: int, *_: bool) -> str:
        low, high = E2M1_VALUES[first], E2M1_VALUES[last]
        return f"codes of +-{low:g}" if first == last else f"codes of +-{low:g} to {high:g}"

    return _told(runs, one)


def _signed_codes_told(runs: _Runs) -> str:
    def one(first: int, last: int, *_: bool) -> str:
        low, high = E2M1_VALUES[first], E2M1_VALUES[last]
        return (
            f"code {first} ({low:g})" if first == last else f"codes {first} to {last} ({low:g} to {high:g})"
        )

    return _told(runs, one)


def _places(name: str, more: str) -> Callable[[_Runs], str]:
    def one(first: int, last: int, *_: bool) -> str:
        return f"{name} {first}{more}" if first == last else f"{name}s {first} to {last}{more}"

    return lambda runs: _told(runs, one)


def _by_code(values: _Values) -> str:
    """By scale byte, for codes that are alike; or what all codes have in common."""
    tables: dict[str, list[int]] = {}
    by_code: list[dict[int, str]] = []
    for code in torch.unique(values.code & 7).tolist():
        mine = values.of(values.code & 7 == code)
        runs = _runs(mine, mine.byte)
        if runs is None:
            return ""
        kinds = zip(mine.byte.tolist(), mine.kind.tolist(), strict=True)
        by_code.append({byte: mine.words[kind] for byte, kind in kinds})
        tables.setdefault(_bytes_told(runs), []).append(code)
    if sum(map(bool, tables)) == 1 and _OTHER not in "".join(tables):
        words, codes = next((words, codes) for words, codes in tables.items() if words)
        return f"with codes of +-{', '.join(f'{E2M1_VALUES[c]:g}' for c in codes)} {words}"
    asked = set.intersection(*map(set, by_code))
    common = [(b, of.pop()) for b in sorted(asked) if len(of := {one[b] for one in by_code} - {_OTHER}) == 1]
    runs = []
    for kind, some in groupby(common, key=lambda pair: pair[1]):
        bytes_ = [byte for byte, _ in some]
        runs.append((bytes_[0], bytes_[-1], kind))
    if not 0 < len(_wrong(runs)) <= _MOST or 2 * len(common) < len(asked):
        return ""
    return f"with every code {_bytes_told(runs)}, {_BESIDE}"


def _in_a_part(values: _Values) -> str:
    """A table of the values in some rows, groups or elements of a group, where all others are right."""
    for key, name, more, count in (
        (values.column % GROUP_SIZE, "element", " of each group", GROUP_SIZE),
        (values.column // GROUP_SIZE, "K group", "", int(values.column.max()) // GROUP_SIZE + 1),
        (values.row, "row", "", int(values.row.max()) + 1),
    ):
        chosen, told = (
            torch.zeros(count, dtype=torch.bool).index_fill_(0, key[mask], True)
            for mask in (values.wrong, values.telling)
        )
        between = torch.arange(count)
        between = (between >= int(key[values.wrong].min())) & (between <= int(key[values.wrong].max()))
        if not bool((between & told & ~chosen).any()):  # of what holds zeros alone nothing is known
            chosen = between
        if 1 < 2 * int(chosen.sum()) <= count:
            part = values.of(chosen[key])
            where = f"in {indices_words(chosen, name)}{more}"
            kinds = {part.words[kind] for kind in part.kind[part.telling].tolist()}
            if len(kinds) == 1 and kinds != {_OTHER}:
                return f"all values {where}: {_give(kinds.pop())}"
            if words := _in_order(part) or _by_code(part):
                return f"{where} {words}"
            if bool(part.wrong[part.telling].all()):
                return f"all values {where} {_ALL}"
    return ""


def _of_one_kind(values: _Values) -> str:
    made = {values.words[kind] for kind in values.kind[values.wrong & (values.want != 0)].tolist()}
    if len(made) != 1 or made & {_OTHER, _ROUNDED, _NUMBERS}:
        return ""
    count = f"{int(values.wrong.sum()):,} of {len(values.wrong):,}"
    return f"some values are {made.pop()}: {count}, which neither scale byte nor code, size or place decides"
