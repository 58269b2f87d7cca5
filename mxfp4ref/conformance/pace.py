"""How long the cases of a run that are left will take: a few layers of whole size take most of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = ["Pace"]

# Measured on the goldens with one core: a right kernel, handed all experts in a process of its own, and a stand-in,
# which reads only the experts that are used.
_CASE = 0.05  # seconds of a case, not of whole size
_BYTE = 5e-9  # and of a byte of the tensors of one that is
_BYTE_OF_STAND_IN = 5e-10
_WHOLE_SIZE = 64 << 20  # bytes


class Pace:
    """What is expected of the cases left, by those that are done.

    Args:
        names: the cases, in their order.
        sizes: bytes of the tensors of those that are known; others are taken for small.
        stand_in: whether the kernel is one of this package's own.
    """

    def __init__(self, names: Sequence[str], sizes: Mapping[str, int], *, stand_in: bool = False) -> None:
        self._large = {name: sizes[name] for name in names if sizes.get(name, 0) >= _WHOLE_SIZE}
        self._small = [name for name in names if name not in self._large]
        self._left = dict.fromkeys(names)
        self._byte = _BYTE_OF_STAND_IN if stand_in else _BYTE
        self._seconds: list[float] = []  # of small cases
        self._large_seconds = self._large_bytes = 0.0

    def done(self, name: str, seconds: float, *, ran: bool = True) -> None:
        """A case is done, after so many seconds; one that was skipped says nothing of the others."""
        self._left.pop(name, None)
        if not ran:
            return
        if name in self._large:
            self._large_seconds += seconds
            self._large_bytes += self._large[name]
        else:
            self._seconds.append(seconds)

    @property
    def count(self) -> int:
        """How many cases are left."""
        return len(self._left)

    @property
    def largest(self) -> str:
        """The case left that takes longest, if it is of whole size; else ""."""
        return max(
            (name for name in self._left if name in self._large), key=self._large.__getitem__, default=""
        )

    @property
    def left(self) -> float:
        """Seconds, roughly.

        Small cases are expected to take as long as the last quarter of them, once so many are done beside the first:
        that one waits for what is imported and compiled, and the diagnoses of the first that fail are longer.
        """
        ground = -(-len(self._small) // 4)
        latest = self._seconds[-ground:] if len(self._seconds) > ground else []
        case = sum(latest) / len(latest) if latest else _CASE
        byte = self._large_seconds / self._large_bytes if self._large_bytes else self._byte
        small = sum(name not in self._large for name in self._left)
        return small * case + byte * sum(self._large.get(name, 0) for name in self._left)
