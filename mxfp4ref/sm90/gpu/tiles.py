"""How the GEMMs on a GPU are cut into programs. No bit depends on it; only speed does."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["OFFERED", "Tiles", "tiles_for"]


@dataclass(frozen=True)
class Tiles:
    """What one program computes, and what it may use.

    The columns divide every N: that is 2I or H, and I and H are both the K of a GEMM, so multiples of 128.
    """

    columns: int  # of the result, which are rows of the weights
    rows: int  # of the result, which are routed rows of one expert
    warps: int
    stages: int  # loads that are under way at once
    registers: int | None = None  # a thread may have, so that more programs find room on a multiprocessor


# The fastest of 20 shapes on an H100 at H 4096, I 2048, 256 experts, top 6: with 1, with 8 to 1024, and with 4096
# tokens. A trial runs each before its first use. By Triton 3.6 another shape, (32, 16, 2, 3), was wrong with logical
# weights: 72 % of the accumulators had other bits.
# Without a limit MIDDLE takes 132 registers, with which a multiprocessor has room for 3 programs, not for 4.
NARROW = Tiles(columns=64, rows=16, warps=4, stages=3)
MIDDLE = Tiles(columns=128, rows=32, warps=4, stages=3, registers=128)
WIDE = Tiles(columns=128, rows=128, warps=8, stages=3)
OFFERED = (NARROW, MIDDLE, WIDE)

_FEW_SLOTS = 12  # so few programs of 128 columns that they leave some of the 132 multiprocessors without work
_MANY_ROWS = 64  # of an expert, which would read its weights from memory twice and more in tiles of 32


def tiles_for(num_slots: int, num_experts: int) -> Tiles:
    """The tiles for the slots of some tokens, given the number of experts that they are spread over."""
    if num_slots <= _FEW_SLOTS:
        return NARROW
    return MIDDLE if num_slots < _MANY_ROWS * num_experts else WIDE
