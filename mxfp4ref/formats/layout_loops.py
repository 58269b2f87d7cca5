"""The kernel's byte orders as loops for a CPU: `wordwise.py` and `bytewise.py` say what they are.

Of each group of 16 bytes, both orders make words from rows r and r + 8 of a block of 16 rows: for t = 0, 1 and
c = 0 to 3, byte c of word 2t in row r, of the same in row r + 8, and of word 2t + 1 in both, are word c in row
8t + r. They differ only in how they move bits within that word.
"""

from __future__ import annotations

import numpy as np

from mxfp4ref._compiled import compiled

__all__ = ["deinterleave", "interleave"]

u32 = np.uint32


@compiled()
def two_codes(word, code):
    """Codes `code` and `code` + 1 of the eight, each at the bottom of a half word."""
    moved = u32(word >> u32(4 * code))
    return u32(moved & u32(0xF) | moved << u32(12) & u32(0xF0000))


@compiled()
def join(codes, code):
    """The inverse of `two_codes`, with zeros for the other codes."""
    return u32((codes & u32(0xF) | codes >> u32(12) & u32(0xF0)) << u32(4 * code))


@compiled()
def bits(word, mask):
    """Of both halves of a word."""
    return u32(word & u32(mask << 16 | mask))


@compiled()
def move(word, wordwise):
    if not wordwise:  # codes 1 and 2 of a half change places
        return u32(
            word & u32(0xF00FF00F) | word << u32(4) & u32(0x0F000F00) | word >> u32(4) & u32(0x00F000F0)
        )
    a, b, c, d = two_codes(word, 0), two_codes(word, 2), two_codes(word, 4), two_codes(word, 6)
    magnitudes = (
        bits(a, 7) << u32(6)
        | bits(b, 7) << u32(3)
        | bits(c, 7)
        | bits(d, 1) << u32(13)
        | bits(d, 6) << u32(9)
    )
    signs = bits(a, 8) << u32(12) | bits(b, 8) << u32(9) | bits(c, 8) << u32(6) | bits(d, 8) << u32(11)
    return u32(magnitudes | signs)


@compiled()
def move_back(word, wordwise):
    if not wordwise:
        return move(word, wordwise)
    a = bits(word >> u32(6), 7) | bits(word >> u32(12), 8)
    b = bits(word >> u32(3), 7) | bits(word >> u32(9), 8)
    c = bits(word, 7) | bits(word >> u32(6), 8)
    d = bits(word >> u32(13), 1) | bits(word >> u32(9), 6) | bits(word >> u32(11), 8)
    return u32(join(a, 0) | join(b, 2) | join(c, 4) | join(d, 6))


@compiled()
def byte(word, i, to):
    """Byte i of a word, at byte `to`."""
    return u32((word >> u32(8 * i) & u32(0xFF)) << u32(8 * to))


@compiled("void(uint32[:,:,::1], uint32[:,:,::1], boolean)")
def interleave(logical, stored, wordwise):
    """`[R, K/32, 4]` words of eight codes; R is a multiple of 16."""
    num_groups = logical.shape[1]
    words = np.empty((4, num_groups), u32)
    for block in range(0, logical.shape[0], 16):
        for r in range(block, block + 8):
            for t in range(2):
                for g in range(num_groups):
                    first, second = logical[r, g, 2 * t], logical[r, g, 2 * t + 1]
                    first8, second8 = logical[r + 8, g, 2 * t], logical[r + 8, g, 2 * t + 1]
                    for c in range(4):
                        words[c, g] = (
                            byte(first, c, 0) | byte(first8, c, 1) | byte(second, c, 2) | byte(second8, c, 3)
                        )
                for c in range(4):
                    for g in range(num_groups):
                        words[c, g] = move(words[c, g], wordwise)
                for g in range(num_groups):
                    for c in range(4):
                        stored[r + 8 * t, g, c] = words[c, g]


@compiled("void(uint32[:,:,::1], uint32[:,:,::1], boolean)")
def deinterleave(stored, logical, wordwise):
    """The inverse of `interleave`."""
    num_groups = logical.shape[1]
    words = np.empty((4, num_groups), u32)
    for block in range(0, logical.shape[0], 16):
        for r in range(block, block + 8):
            for t in range(2):
                for g in range(num_groups):
                    for c in range(4):
                        words[c, g] = stored[r + 8 * t, g, c]
                for c in range(4):
                    for g in range(num_groups):
                        words[c, g] = move_back(words[c, g], wordwise)
                for g in range(num_groups):
                    first = first8 = second = second8 = u32(0)
                    for c in range(4):
                        first, first8 = (
                            u32(first | byte(words[c, g], 0, c)),
                            u32(first8 | byte(words[c, g], 1, c)),
                        )
                        second, second8 = (
                            u32(second | byte(words[c, g], 2, c)),
                            u32(second8 | byte(words[c, g], 3, c)),
                        )
                    logical[r, g, 2 * t], logical[r, g, 2 * t + 1] = first, second
                    logical[r + 8, g, 2 * t], logical[r + 8, g, 2 * t + 1] = first8, second8
