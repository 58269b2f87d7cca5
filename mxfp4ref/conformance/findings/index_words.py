"""Index maps in words: what has come from where."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

__all__ = ["Rule", "map_rules", "map_words", "moved_runs", "pair_words"]

Rule = Callable[[Tensor, Tensor], Tensor]  # indices, and of each how many there are, to those that are taken

_MOST_LISTED = 6
_SEVERAL = 3  # indices that one rule moves
_LARGEST = 64  # divisor


def moved_runs(source: Iterable[int]) -> list[tuple[int, int, int]]:
    """Places that have others', by runs of both: the first, the last, and whose the first has; < 0 is unknown."""
    runs: list[tuple[int, int, int]] = []
    for place, other in enumerate(source):
        if other < 0 or other == place:
            continue
        if runs and runs[-1][1] == place - 1 and other - place == runs[-1][2] - runs[-1][0]:
            runs[-1] = (runs[-1][0], place, runs[-1][2])
        else:
            runs.append((place, place, other))
    return runs


def map_words(got: Tensor, name: str, count: int, *, of: Tensor | None = None) -> str:
    """How indices came to be others, in words; "" where they have not, or where no rule gives all of them.

    Args:
        got: `[N] int64`, what is there.
        name: what is counted: "token", "row of fc1", ...
        count: how many there are.
        of: `[N] int64`, what should be there; by default 0, 1, 2, ...
    """
    want = torch.arange(len(got)) if of is None else of
    if torch.equal(got, want) or not len(got):
        return ""
    rules = map_rules(got, want, name, torch.full_like(want, count))
    return next((words for words, _ in rules), "") or _listed(got, want, name)


def map_rules(got: Tensor, want: Tensor, name: str, count: Tensor) -> Iterator[tuple[str, Rule]]:
    """The rules that give all of `got`, in words and as functions; arguments as of `map_words`, `count [N]`."""
    if torch.equal(got, want):
        return
    for words, rule in (
        *_shifts(got, want, name, count),
        *_blocks(name, int(count.max())),
        *_late_shift(got, want, name),
    ):
        if torch.equal(rule(want, count), got):
            yield words, rule


def pair_words(pairs: Iterable[tuple[int, int]], name: str, numbers: range) -> str:
    """The rule of some pairs, what should be there and what is, of which at least three are unlike; "" if none.

    One that gives each of the numbers another one of them, if there is one.
    """
    known = sorted(set(pairs))
    if sum(a != b for a, b in known) < _SEVERAL or len({a for a, _ in known}) < len(known):
        return ""
    want, got = torch.tensor(known).unbind(1)
    every = torch.tensor(numbers)
    rules = list(map_rules(got, want, name, torch.full_like(want, numbers.stop)))
    all_of = ((words, rule(every, torch.full_like(every, numbers.stop))) for words, rule in rules)
    inside = (
        words for words, to in all_of if int(to.min()) >= numbers.start and int(to.max()) < numbers.stop
    )
    return next(inside, next((words for words, _ in rules), ""))


def _by(rule: Callable[[Tensor, Tensor, int], Tensor], number: int) -> Rule:
    return lambda n, of: rule(n, of, number)


def _signed(number: int) -> str:
    return f"{'-' if number < 0 else '+'} {abs(number)}"


def _shifts(got: Tensor, want: Tensor, name: str, count: Tensor) -> Iterator[tuple[str, Rule]]:
    moved = got != want
    shift = int((got - want)[moved][0])
    if bool(moved[0]):
        yield f"{name} n is {name} n {_signed(shift)}", lambda n, of: n + shift
        around = shift % int(count[0])
        around -= int(count[0]) * (around > int(count[0]) // 2)
        yield f"{name} n is {name} n {_signed(around)}, around the end", lambda n, of: (n + around) % of
        yield (
            f"{name} n is {name} n {_signed(shift)}, {'the last' if shift > 0 else f'{name} 0'} where there is none",
            lambda n, of: (n + shift).clamp(min=0).minimum(of - 1),
        )
    yield f"every {name} is {name} {int(got[0])}", _by(lambda n, of, to: n * 0 + to, int(got[0]))
    last = str(int(count[0]) - 1) if bool((count == count[0]).all()) else "the last one"
    yield f"in reverse: {name} n is {name} {last} - n", lambda n, of: of - 1 - n


def _late_shift(got: Tensor, want: Tensor, name: str) -> Iterator[tuple[str, Rule]]:
    moved = got != want
    shift, first = int((got - want)[moved][0]), int(want[moved].min())
    if len(torch.unique(want[want >= first])) >= _SEVERAL:
        yield (
            f"from {name} {first} on {name} n is {name} n {_signed(shift)}",
            lambda n, of: torch.where(n >= first, n + shift, n),
        )


def _blocks(name: str, count: int) -> Iterator[tuple[str, Rule]]:
    for size in range(count - 1, 1, -1):  # of several that fit the one that moves least
        yield f"{name} n is {name} n modulo {size}", _by(lambda n, of, s: n % s, size)
    size = 1
    while size < count:
        whose = f"blocks of {size}" if size > 1 else f"{name}s"
        yield (
            f"neighbouring {whose} are exchanged: {name} n is {name} n ^ {size}",
            _by(lambda n, of, s: n ^ s, size),
        )
        yield f"{name} n is the first {name} of each {2 * size}", _by(lambda n, of, s: n // s * s, 2 * size)
        size *= 2
    for size in (2, 4, 8, 16, 32, 64):
        yield (
            f"in reverse in each whole block of {size}: {name} n is {name} n ^ {size - 1}",
            _by(lambda n, of, s: torch.where(n // s * s + s <= of, n ^ (s - 1), n), size),
        )
    for size in range(2, min(count, _LARGEST)):
        yield f"{name} n is {name} n // {size}", _by(lambda n, of, s: n // s, size)
    for rows in range(2, count):
        if count % rows == 0:
            yield (
                f"transposed: {name} n is number n // {rows} of part n modulo {rows}",
                _by(lambda n, of, r: n % r * (of // r) + n // r, rows),
            )


def _listed(got: Tensor, want: Tensor, name: str) -> str:
    """A map that is no rule, if there is enough to tell that it is one map."""
    pairs = sorted(set(zip(want.tolist(), got.tolist(), strict=True)))
    if len(pairs) != len({a for a, _ in pairs}) or len(want) < 2 * len(pairs):
        return ""
    changed = [(a, b) for a, b in pairs if a != b]
    shown = ", ".join(f"{a} is {b}" for a, b in changed[:_MOST_LISTED])
    return f"{name} {shown}{', ...' if len(changed) > _MOST_LISTED else ''}"
