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
left, right = np.left_shift, np.right_shift  # operators would make them 64 bits wide


@compiled()
def two_codes(word, code):
    """Codes `code` and `code` + 1 of the eight, each at the bottom of a half word."""
    moved = right(word, u32(4 * code))
    return u32(moved & u32(0xF) | left(moved, u32(12)) & u32(0xF0000))


@compiled()
def join(codes, code):
    """The inverse of `two_codes`, with zeros for the other codes."""
    return left(u32(codes & u32(0xF) | right(codes, u32(12)) & u32(0xF0)), u32(4 * code))


@compiled()
def bits(word, mask):
    """Of both halves of a word."""
    return u32(word & u32(mask << 16 | mask))


@compiled()
def move(word, wordwise):
    if not wordwise:  # codes 1 and 2 of a half change places
        up, down = left(word, u32(4)) & u32(0x0F000F00), right(word, u32(4)) & u32(0x00F000F0)
        return u32(word & u32(0xF00FF00F) | up | down)
    a, b, c, d = two_codes(word, 0), two_codes(word, 2), two_codes(word, 4), two_codes(word, 6)
    magnitudes = left(bits(a, 7), u32(6)) | left(bits(b, 7), u32(3)) | bits(c, 7)
    apart = left(bits(d, 1), u32(13)) | left(bits(d, 6), u32(9))
    signs = (
        left(bits(a, 8), u32(12))
        | left(bits(b, 8), u32(9))
        | left(bits(c, 8), u32(6))
        | left(bits(d, 8), u32(11))
    )
    return u32(magnitudes | apart | signs)


@compiled()
def move_back(word, wordwise):
    if not wordwise:
        return move(word, wordwise)
    a = u32(bits(right(word, u32(6)), 7) | bits(right(word, u32(12)), 8))
    b = u32(bits(right(word, u32(3)), 7) | bits(right(word, u32(9)), 8))
    c = u32(bits(word, 7) | bits(right(word, u32(6)), 8))
    d = u32(bits(right(word, u32(13)), 1) | bits(right(word, u32(9)), 6) | bits(right(word, u32(11)), 8))
    return u32(join(a, 0) | join(b, 2) | join(c, 4) | join(d, 6))


@compiled()
def transposed(a, b, c, d):
    """Byte i of word j as byte j of word i."""
    low_ab, high_ab = pairs(a, b)
    low_cd, high_cd = pairs(c, d)
    return (
        u32(low_ab & u32(0xFFFF) | left(low_cd, u32(16))),
        u32(right(low_ab, u32(16)) | low_cd & u32(0xFFFF0000)),
        u32(high_ab & u32(0xFFFF) | left(high_cd, u32(16))),
        u32(right(high_ab, u32(16)) | high_cd & u32(0xFFFF0000)),
    )


@compiled()
def pairs(a, b):
    """Bytes 0 of both words and bytes 1 of both, as halves of a word; and likewise bytes 2 and 3."""
    even = u32(a & u32(0x00FF00FF) | left(u32(b & u32(0x00FF00FF)), u32(8)))
    odd = u32(right(a, u32(8)) & u32(0x00FF00FF) | b & u32(0xFF00FF00))
    return u32(even & u32(0xFFFF) | left(odd, u32(16))), u32(right(even, u32(16)) | odd & u32(0xFFFF0000))


@compiled()
def load(rows, r, words):
    """Rows r and r + 8 of `[R, G, 4]` as `[2, 4, G]`, so that loops over G become vector instructions."""
    for half in range(2):
        for g in range(words.shape[2]):
            for i in range(4):
                words[half, i, g] = rows[r + 8 * half, g, i]


@compiled()
def store(words, rows, r):
    """The inverse of `load`."""
    for half in range(2):
        for g in range(words.shape[2]):
            for i in range(4):
                rows[r + 8 * half, g, i] = words[half, i, g]


@compiled("void(uint32[:,:,::1], uint32[:,:,::1], boolean)", shapes="logical[R, C, 4] stored[R, C, 4]")
def interleave(logical, stored, wordwise):
    """`[R, K/32, 4]` words of eight codes; R is a multiple of 16."""
    rows, words = np.empty((2, 4, logical.shape[1]), u32), np.empty((2, 4, logical.shape[1]), u32)
    for block in range(0, logical.shape[0], 16):
        for r in range(block, block + 8):
            load(logical, r, rows)
            for t in range(2):
                for g in range(rows.shape[2]):
                    words[t, 0, g], words[t, 1, g], words[t, 2, g], words[t, 3, g] = transposed(
                        rows[0, 2 * t, g], rows[1, 2 * t, g], rows[0, 2 * t + 1, g], rows[1, 2 * t + 1, g]
                    )
                for c in range(4):
                    for g in range(rows.shape[2]):
                        words[t, c, g] = move(words[t, c, g], wordwise)
            store(words, stored, r)


@compiled("void(uint32[:,:,::1], uint32[:,:,::1], boolean)", shapes="logical[R, C, 4] stored[R, C, 4]")
def deinterleave(stored, logical, wordwise):
    """The inverse of `interleave`."""
    rows, words = np.empty((2, 4, stored.shape[1]), u32), np.empty((2, 4, stored.shape[1]), u32)
    for block in range(0, stored.shape[0], 16):
        for r in range(block, block + 8):
            load(stored, r, words)
            for t in range(2):
                for c in range(4):
                    for g in range(rows.shape[2]):
                        words[t, c, g] = move_back(words[t, c, g], wordwise)
                for g in range(rows.shape[2]):
                    rows[0, 2 * t, g], rows[1, 2 * t, g], rows[0, 2 * t + 1, g], rows[1, 2 * t + 1, g] = (
                        transposed(words[t, 0, g], words[t, 1, g], words[t, 2, g], words[t, 3, g])
                    )
            store(rows, logical, r)
