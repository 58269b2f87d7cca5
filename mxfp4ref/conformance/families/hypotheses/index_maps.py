"""Ways in which an index along an axis is taken for another one, each with its words."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["IndexMap", "block_maps", "expert_maps", "neighbour_maps", "padded_maps", "shifted", "taken"]


@dataclass(frozen=True)
class IndexMap:
    """For each place along an axis the place that is read instead.

    Attributes:
        words: to be put behind "those of", with `{}` for what the axis counts.
        index: the size to the places, `[n] int64`.
        cost: how unusual it is.
    """

    words: str
    index: Callable[[int], Tensor]
    cost: float = 1.0

    def of(self, noun: str) -> str:
        return self.words.format(noun)

    @property
    def of_up_and_gate(self) -> str:
        """What it comes to along fc1's rows, in words to be added."""
        if self.words.endswith("other half (halves swapped)"):
            return ": up and gate change places"
        if "for both halves" in self.words:
            return ": gate has up's" if "first half" in self.words else ": up has gate's"
        return ""


def _maps(*rows: tuple[str, Callable[[Tensor, int], Tensor], float]) -> Iterator[IndexMap]:
    for words, change, cost in rows:
        yield IndexMap(words, lambda n, change=change: change(torch.arange(n), n), cost)


def shifted(size: int, by: int) -> Tensor:
    """The place so far on, where there is one; else the own, `[n] int64`."""
    at = torch.arange(size)
    other = at + by
    return torch.where((other >= 0) & (other < size), other, at)


def expert_maps() -> Iterator[IndexMap]:
    """Of experts, or anything else that is counted."""
    yield from _maps(
        ("the next {}", lambda i, n: (i + 1) % n, 1),
        ("the previous {}", lambda i, n: (i - 1) % n, 1),
        (
            "the first {}",
            lambda i, n: i * 0,
            0.99,
        ),  # likelier, of one expert, than to come next after the last
        ("the next {}, the last one keeping its own", lambda i, n: (i + 1).clamp(max=n - 1), 1.2),
        ("the previous {}, the first one keeping its own", lambda i, n: (i - 1).clamp(min=0), 1.2),
        ("the last {}", lambda i, n: i * 0 + n - 1, 1.3),
        ("the other {} of its pair (2i and 2i+1 swapped)", lambda i, n: (i ^ 1).clamp(max=n - 1), 1.4),
        ("the {} counted from the end (order reversed)", lambda i, n: n - 1 - i, 1.5),
        ("the {} at its place in the first half, for both halves", lambda i, n: i % max(n // 2, 1), 1.5),
        ("the {} in the other half (halves swapped)", lambda i, n: (i + n // 2) % n, 1.6),
        ("the first {} of its pair", lambda i, n: i & ~1, 1.7),
        ("the {} with half its number", lambda i, n: i // 2, 1.8),
    )
    for modulus in (2, 4, 8, 16, 32, 64, 128, 256):
        yield from _maps(
            (f"the {{}} with its number modulo {modulus}", lambda i, n, m=modulus: i % m % n, 1.8)
        )
    for shift in (2, 3, 4, 8):
        yield from _maps(
            (f"the {{}} {shift} further on", lambda i, n, s=shift: (i + s) % n, 2),
            (f"the {{}} {shift} before it", lambda i, n, s=shift: (i - s) % n, 2),
        )
    yield from _maps(
        ("the {} one before the last at most (numbers cut off)", lambda i, n: i.clamp(max=n - 2), 2)
    )


def neighbour_maps() -> Iterator[IndexMap]:
    """Along rows, columns or K groups, by single places."""
    yield from _maps(
        ("the next {}", lambda i, n: (i + 1) % n, 1),
        ("the previous {}", lambda i, n: (i - 1) % n, 1),
        ("the next {}, the last one keeping its own", lambda i, n: (i + 1).clamp(max=n - 1), 1.2),
        ("the previous {}, the first one keeping its own", lambda i, n: (i - 1).clamp(min=0), 1.2),
        ("the first {}", lambda i, n: i * 0, 1.2),
        ("the last {}", lambda i, n: i * 0 + n - 1, 1.5),
        ("the other {} of its pair (2i and 2i+1 swapped)", lambda i, n: (i ^ 1).clamp(max=n - 1), 1.3),
        ("the {} counted from the end (order reversed)", lambda i, n: n - 1 - i, 1.4),
        ("the {} in the other half (halves swapped)", lambda i, n: (i + n // 2) % n, 1.3),
        (
            "the {}s of both halves interleaved (0, n/2, 1, ...)",
            lambda i, n: (i % 2) * (n // 2) + i // 2,
            1.4,
        ),
        (
            "the {}s of both halves interleaved, the second half's first (n/2, 0, n/2 + 1, ...: gpt-oss stores "
            "gate and up so)",
            lambda i, n: (1 - i % 2) * (n // 2) + i // 2,
            1.4,
        ),
        ("the {}s taken apart, all odd ones first", lambda i, n: torch.cat((i[1::2], i[::2])), 1.5),
        ("the {} at its place in the first half, for both halves", lambda i, n: i % max(n // 2, 1), 1.2),
        ("the {} at its place in the second half, for both halves", _second_half, 1.3),
        ("the {}s taken apart (all even ones, then all odd ones)", lambda i, n: _apart(i, n), 1.4),
        ("the first {} of its pair", lambda i, n: i & ~1, 1.5),
        ("the second {} of its pair", lambda i, n: (i | 1).clamp(max=n - 1), 1.5),
        ("the {} with half its number", lambda i, n: i // 2, 1.6),
        ("the {} with twice its number, modulo the size", lambda i, n: 2 * i % n, 1.8),
    )
    for shift in (2, 3):
        yield from _maps(
            (f"the {{}} {shift} further on", lambda i, n, s=shift: (i + s) % n, 1.8),
            (f"the {{}} {shift} before it", lambda i, n, s=shift: (i - s) % n, 1.8),
        )


def block_maps(sizes: tuple[int, ...] = (4, 8, 16, 32, 64, 128)) -> Iterator[IndexMap]:
    """Along rows or columns, by blocks."""
    for size in sizes:
        yield from _maps(
            (f"the {{}} {size} further on (shifted)", lambda i, n, s=size: (i + s) % n, 1.6),
            (f"the {{}} {size} before it (shifted)", lambda i, n, s=size: (i - s) % n, 1.6),
            (f"the neighbouring block of {size} (blocks of {size} {{}}s swapped in pairs)", _swap(size), 1.6),
            (f"the first {{}} of each {size}", lambda i, n, s=size: i // s * s, 1.6),
            (
                f"the last {{}} of each {size}",
                lambda i, n, s=size: (i // s * s + s - 1).clamp(max=n - 1),
                1.9,
            ),
            (f"the {{}} with its number modulo {size}", lambda i, n, s=size: i % s, 1.7),
            (f"the {{}}s of each block of {size} in reverse", _reverse(size), 1.8),
            (f"the {{}} in the previous block of {size}, the first block keeping its own", _back(size), 1.8),
            (f"the {{}}s of each block of {size} rotated by one", _rotate(size), 1.9),
            (f"each block of {size} {{}}s with its halves swapped", _swap_inside(size), 1.8),
        )
        yield IndexMap(f"a {size}-wide transposition of the {{}}s", _transposed(size), 1.9)
        yield from _repeats(size)


def _repeats(size: int) -> Iterator[IndexMap]:
    """Some of a block for the others of it, too; of one element there are words already."""
    for part, times in ((size // 2, "twice"), (size // 4, "four times"), (size // 8, "eight times")):
        if part < 2:
            break
        yield from _maps(
            (
                f"the first {part} {{}}s of each {size}, {times}",
                lambda i, n, s=size, p=part: i // s * s + i % p,
                1.65,
            )
        )
    if size >= 4:
        yield from _maps(
            (f"the last {size // 2} {{}}s of each {size}, twice", _last_half(size), 1.7),
            (
                f"the first {size // 2} {{}}s of each {size}, each for two neighbours",
                lambda i, n, s=size: i // s * s + i % s // 2,
                1.85,
            ),
        )


def padded_maps() -> Iterator[IndexMap]:
    """Along rows or columns, shifted by so many, as by padding in between; -1 where nothing is left, see `taken`."""
    for size in (8, 16, 32, 64, 128, 1, 2):
        yield from _maps(
            (
                f"the {{}} {size} further on, as behind padding, and nothing in the last {size}",
                lambda i, n, s=size: torch.where(i + s < n, i + s, -1),
                1.5,
            ),
            (
                f"the {{}} {size} before it, as behind padding, and nothing in the first {size}",
                lambda i, n, s=size: torch.where(i >= s, i - s, -1),
                1.5,
            ),
        )


def taken(tensor: Tensor, dim: int, places: Tensor) -> Tensor:
    """The places along a dimension, zeros where one is -1."""
    places = places.to(tensor.device)
    found = tensor.index_select(dim, places.clamp(min=0))
    return found.index_fill(dim, (places < 0).nonzero().flatten(), 0)


def _second_half(i: Tensor, n: int) -> Tensor:
    return i % (n // 2) + n // 2 if n % 2 == 0 else i


def _apart(i: Tensor, n: int) -> Tensor:
    return torch.cat((i[::2], i[1::2]))


def _swap(size: int) -> Callable[[Tensor, int], Tensor]:
    return lambda i, n: i ^ size if n % (2 * size) == 0 else i


def _reverse(size: int) -> Callable[[Tensor, int], Tensor]:
    return lambda i, n: i // size * size + size - 1 - i % size if n % size == 0 else i


def _back(size: int) -> Callable[[Tensor, int], Tensor]:
    return lambda i, n: torch.where(i >= size, i - size, i)


def _rotate(size: int) -> Callable[[Tensor, int], Tensor]:
    return lambda i, n: i // size * size + (i + 1) % size if n % size == 0 else i


def _swap_inside(size: int) -> Callable[[Tensor, int], Tensor]:
    return lambda i, n: i ^ (size // 2) if n % size == 0 else i


def _last_half(size: int) -> Callable[[Tensor, int], Tensor]:
    return lambda i, n: i | (size // 2) if n % size == 0 else i


def _transposed(size: int) -> Callable[[int], Tensor]:
    def index(n: int) -> Tensor:
        i = torch.arange(n)
        return i.view(size, -1).t().reshape(-1) if n % size == 0 else i

    return index
