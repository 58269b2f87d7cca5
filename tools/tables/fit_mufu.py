"""Derive the constants of `mxfp4ref/sm90/mufu.py` from the recorded mantissa tables, and prove them.

    python tools/tables/fit_mufu.py            print the constants as Python source
    python tools/tables/fit_mufu.py --check    derive them, and exit 1 unless the package holds the same

The published form of the unit (Oberman and Siu, "A High-Performance Area-Efficient Multifunction
Interpolator", ARITH 2005) is a piecewise quadratic: the leading bits of the fraction choose a row
(C0, C1, C2), and the other bits x give (C0 * 2^13 + C1 * x + C2 * square(x) + bias) >> 15.

How the squarer was found: least squares with an exact x^2 leaves residuals whose correlation with the
products of two bits x_i x_j is that of a missing product for every column i + j + 1 (2i on the diagonal)
below 19, and none from there on. With those columns dropped C1 and C2 come out as integers.

How a row is proved: given C1 and C2 each of the recorded results is two inequalities on C0 * 2^13 + bias.
They leave an interval a few units of 2^-15 ulp wide, and one bias, in [0, 2^13), meets the intervals of
all rows: the whole table follows, and no other (C0, bias) with these C1 and C2 gives it. Everything after
the least squares is done in integers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mxfp4ref.sm90 import mufu

RECORDING = Path(__file__).parents[2] / "tests" / "recordings" / "mufu.npz"

Row = tuple[int, int, int]


def recorded(path: Path, name: str) -> np.ndarray:
    """The float32 bits [2^23] of the results for the arguments in [1, 2)."""
    with np.load(path) as file:
        steps = np.concatenate([file[f"{name}_1_2_first"], file[f"{name}_1_2_diff"].astype(np.int64)])
    return np.cumsum(steps)


def squares(bits: int) -> np.ndarray:
    """square(x) for all x of so many bits: the partial products of a 17-bit squarer from column 19 on."""
    x = np.arange(1 << bits, dtype=np.int64) << (17 - bits)
    total = np.zeros_like(x)
    for i in range(17):
        for j in range(i, 17):
            column = 2 * i if i == j else i + j + 1
            if column >= 19:
                total += ((x >> i) & (x >> j) & 1) << column
    return total >> 19


def fit(results: np.ndarray, segments: int) -> tuple[list[Row], int]:
    """The rows and the bias that give results [2^23] exactly.

    Raises:
        ValueError: there are none of this form, or more than one bias would do.
    """
    results = results.reshape(segments, -1)
    x = np.arange(results.shape[1], dtype=np.int64)
    square = squares(x.size.bit_length() - 1)
    basis = np.stack([np.ones_like(x), x, square], axis=1).astype(np.float64)
    # pinv keeps its accuracy when the columns are brought to one magnitude.
    scale = basis.max(axis=0)
    coefficients = (results + 0.5) @ np.linalg.pinv(basis / scale).T / scale * 2**15
    c1, c2 = np.rint(coefficients[:, 1:]).astype(np.int64).T
    product = c1[:, None] * x + c2[:, None] * square
    lowest = ((results << 15) - product).max(axis=1)
    highest = ((results + 1 << 15) - 1 - product).min(axis=1)
    c0 = lowest >> 13
    bias = (lowest - (c0 << 13)).max()
    if bias != (highest - (c0 << 13)).min():
        raise ValueError("the recorded results do not leave exactly one bias")
    return [(int(a), int(b), int(c)) for a, b, c in zip(c0, c1, c2, strict=True)], int(bias)


def source(name: str, rows: list[Row], bias: int) -> str:
    """The constants as they stand in the package, four rows a line."""
    cells = [f"({c0}, {c1}, {c2})," for c0, c1, c2 in rows]
    lines = ["    " + " ".join(cells[i : i + 4]) for i in range(0, len(cells), 4)]
    return "\n".join([f"_{name}_BIAS = {bias}", f"_{name}_ROWS = (", *lines, ")"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print or check the constants; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--recording", type=Path, default=RECORDING, help="the .npz with the recorded tables")
    parser.add_argument("--check", action="store_true", help="compare with the package instead of printing")
    options = parser.parse_args(arguments)
    failed = False
    # What the rows interpolate: the results' bits above those of 2.0, and above those of 0.5.
    for name, segments, origin in (("EX2", 64, 0x40000000), ("RCP", 128, 0x3F000000)):
        rows, bias = fit(recorded(options.recording, name.lower()) - origin, segments)
        if not options.check:
            print(source(name, rows, bias))
            continue
        held = (list(getattr(mufu, f"_{name}_ROWS")), getattr(mufu, f"_{name}_BIAS"))
        failed |= held != (rows, bias)
        verdict = "DIFFERENT from the package" if held != (rows, bias) else "as in the package"
        print(f"{name}: {segments} rows and the bias {bias} give all 2^23 recorded results, {verdict}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
