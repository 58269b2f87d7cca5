"""Ways to number the 16 values of E2M1."""

from __future__ import annotations

__all__ = ["NUMBERINGS"]

# In words, and from the right code to the other one.
NUMBERINGS = {
    "negated in two's complement: a negative one is 16 less its magnitude, not its magnitude with the sign bit (8 to "
    "15), and -0 is 0": [*range(8), *(16 - m & 15 for m in range(8))],
    "negated in one's complement: a negative one is 15 less its magnitude, not its magnitude with the sign bit": [
        *range(8),
        *(15 - m for m in range(8)),
    ],
    "numbered from the least value up (an offset instead of sign and magnitude), 8 for 0": [
        *(8 + m for m in range(8)),
        *(8 - m for m in range(8)),
    ],
    "numbered from the least value up (in the order of the values instead of sign and magnitude), 7 for -0": [
        *(8 + m for m in range(8)),
        *(7 - m for m in range(8)),
    ],
    "rotated: the sign is the lowest bit instead of the highest": [c << 1 & 15 | c >> 3 for c in range(16)],
    "of which the bits are in reverse": [int(f"{c:04b}"[::-1], 2) for c in range(16)],
}
