"""Bring the H100 recordings into the repository, compactly, or check the package against all of them.

The recordings come as a folder of .npz files, described in `tests/recordings/README.md`. What the tests need is
written to `tests/recordings/`; `--check-all` instead compares the package with every element of the source.

    python tools/hardware/import_recordings.py SOURCE             # write tests/recordings/
    python tools/hardware/import_recordings.py SOURCE --check-all # compare, write nothing
"""

from __future__ import annotations

import argparse
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from recorded import Arrays, compare_all

from mxfp4ref._files import replacing

ROOT = Path(__file__).resolve().parents[2]

TARGET = ROOT / "tests" / "recordings"
# Weights are random and do not compress, so a case keeps the tokens that some of its experts serve and those
# experts only. Cases that are not named are kept whole.
EXPERTS_KEPT = {
    "act_dsv4": 2,
    "bias": 2,
    "bias_gptoss": 4,
    "bias_tp1": 2,
    "duplicate": 2,
    "limit_only": 2,
    "mirror1_s6": 1,
    "nonfinite": 2,
    "nonfinite_limit": 2,
    "overflow": 2,
    "per_expert": 4,
    "plain_t128_128": 2,
    "scale_extremes": 2,
    "scale_extremes_limit": 2,
    "sentinel": 3,
    "underflow": 3,
    "wide_t128": 2,
}
PER_EXPERT = ("w1", "s1", "w2", "s2", "b1", "b2", "alpha", "beta", "limit")
SCALAR_KEPT = 8192  # elements of each scalar operation
BLOCKS_KEPT = {"wgmma": 16, "fp8_wgmma": 4}  # blocks of each tensor-core set


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="the folder of recordings")
    parser.add_argument("--check-all", action="store_true", help="compare the package with the whole source")
    arguments = parser.parse_args()
    if not (arguments.source / "moe").is_dir():
        parser.error(f"{arguments.source}: expected a folder of recordings with a subfolder moe")
    if arguments.check_all:
        return compare_all(arguments.source)
    for path in sorted(arguments.source.rglob("*.npz")):
        if path.stem == "mufu":
            continue  # tools/tables/fit_mufu.py derives the package's constants from it and keeps what tests need
        name = path.relative_to(arguments.source)
        arrays = _compact(path.stem, dict(np.load(path)))
        _write(TARGET / name, arrays)
        print(f"{name}: {(TARGET / name).stat().st_size / 2**20:.2f} MiB")
    total = sum(path.stat().st_size for path in TARGET.rglob("*") if path.is_file())
    print(f"{TARGET.relative_to(ROOT)}: {total / 2**20:.1f} MiB")
    return 0


def _compact(name: str, arrays: Arrays) -> Arrays:
    if name == "scalar":
        return {key: value[:SCALAR_KEPT] for key, value in arrays.items()}
    if name in BLOCKS_KEPT:
        return {key: value[: BLOCKS_KEPT[name]] for key, value in arrays.items()}
    if "tile" in arrays:
        # Most tiles gave the same bits: each distinct output once, and which one a tile gave.
        distinct, which = np.unique(arrays["out"], axis=0, return_inverse=True)
        return arrays | {"out": distinct, "which": which.astype(np.int64)}
    if "ep" in arrays and arrays["ep"][0] > 1:
        return _one_rank(arrays)
    if name in EXPERTS_KEPT:
        return _some_experts(arrays, EXPERTS_KEPT[name])
    return arrays


def _one_rank(arrays: Arrays) -> Arrays:
    """Only the recorded rank's experts; `first_expert` says which is the first."""
    size, rank = arrays["ep"].tolist()
    count = len(arrays["w1"]) // size
    kept = slice(rank * count, (rank + 1) * count)
    out = {key: value[kept] if key in PER_EXPERT else value for key, value in arrays.items()}
    return out | {"first_expert": np.array(rank * count)}


def _some_experts(arrays: Arrays, count: int) -> Arrays:
    """The `count` experts that serve the most tokens completely, and those tokens; experts are renumbered."""
    ids = arrays["ids"]
    num_experts = len(arrays["w1"])
    skipped = (ids < 0) | (ids >= num_experts)

    def served(experts: tuple[int, ...]) -> NDArray[np.bool_]:
        return (np.isin(ids, experts) | skipped).all(1)

    best = max(combinations(range(num_experts), count), key=lambda experts: served(experts).sum())
    tokens = served(best)
    new_ids = np.searchsorted(best, ids).astype(np.int32)
    # An id that no rank owns stays one: it moves with the number of experts.
    new_ids = np.where(skipped, np.where(ids < 0, ids, ids - num_experts + count), new_ids)
    out = {key: value[list(best)] if key in PER_EXPERT else value for key, value in arrays.items()}
    out |= {key: arrays[key][tokens] for key in ("x", "scales")}
    return out | {"ids": new_ids[tokens].astype(np.int32), "out": arrays["out"][:, tokens]}


def _write(path: Path, arrays: Arrays) -> None:
    with replacing(path, TARGET) as partial, partial.open("wb") as file:
        np.savez_compressed(file, **arrays)


if __name__ == "__main__":
    sys.exit(main())
