"""Hold the compiled GEMM of the CPU against its transcription on random hard inputs.

Each problem mixes two kinds of rows (ordinary, cancelling, wide, any bits, subnormal, NaN, Inf, ...) with a kind of
scales, any tile, swapped rows, and weights in any byte order. A problem is a function of its seed. The transcription
takes nearly all of the time: a core checks some 50 thousand elements a second.

    python tools/random_gemms.py                          a million elements
    python tools/random_gemms.py --million 50 --jobs 16
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

from mxfp4ref._compiled import as_numpy
from mxfp4ref.formats.experts import StoredWeights
from mxfp4ref.formats.generations import GENERATIONS
from mxfp4ref.sm90.gemm.compiled import compiled_loops, grouped_gemm
from mxfp4ref.sm90.gemm.order import first_pair_swapped, group_order
from mxfp4ref.sm90.gemm.reference import gemm_in_order
from mxfp4ref.sm90.tactics import TILE_K, TILE_N, Tactic

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.helpers.gemm_inputs import KINDS, SCALES, problem


def differing(seed: int) -> tuple[int, int]:
    """How many elements of a problem were compared, and how many differ."""
    rng = np.random.default_rng(seed)
    kinds, scale_kind = rng.choice(KINDS, 2), str(rng.choice(SCALES))
    sizes = {"rows": int(rng.integers(1, 33)), "columns": 64 * int(rng.integers(1, 9)), "groups": 4}
    sizes["groups"] *= int(rng.integers(1, 4))
    x, packed, scales = problem(seed, str(kinds[0]), scale_kind, **sizes)
    x[:, 1::2] = problem(seed, str(kinds[1]), scale_kind, **sizes)[0][:, 1::2]
    tactic = Tactic((64, int(rng.choice(TILE_N)), int(rng.choice(TILE_K))))
    generation = GENERATIONS[rng.integers(len(GENERATIONS))]
    order = group_order(sizes["groups"], tactic.tile_k)
    swapped = first_pair_swapped(x, None, tactic, generation)
    layout = generation.layout
    stored = StoredWeights(packed, scales.flatten(1), (0, 0))
    if rng.random() < 0.7:
        stored = StoredWeights(layout.interleave(packed), layout.fold(scales).flatten(1), layout.ORDERS)
    rows = as_numpy(x[0], np.int16)
    out = grouped_gemm(compiled_loops(), rows, [len(rows)], stored, order, swapped[0].numpy())
    expected = gemm_in_order(x, packed, scales, order, swapped)[0]
    return out.size, int((torch.from_numpy(out) != expected.view(torch.int32)).sum())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--million", type=float, default=1, help="elements to compare")
    parser.add_argument("--first-seed", type=int, default=0, metavar="SEED")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), metavar="N")
    arguments = parser.parse_args()
    if compiled_loops() is None:
        sys.exit("random_gemms: the compiled loops cannot be used here")
    compared, wrong, seed, start = 0, [], arguments.first_seed, time.monotonic()
    with multiprocessing.get_context("spawn").Pool(arguments.jobs, torch.set_num_threads, (1,)) as pool:
        while compared < 1e6 * arguments.million:
            seeds = range(seed, seed + 16 * arguments.jobs)
            for of_seed, (elements, differ) in zip(
                seeds, pool.map(differing, seeds, chunksize=4), strict=True
            ):
                compared += elements
                if differ:
                    wrong.append(of_seed)
                    print(f"seed {of_seed}: {differ:,} of {elements:,} elements differ", flush=True)
            seed = seeds.stop
            if sys.stderr.isatty():
                print(f"\r{compared:,} elements compared", end="", file=sys.stderr)
    seconds = time.monotonic() - start
    print(f"{compared:,} elements, seeds {arguments.first_seed} to {seed - 1}, {seconds:.0f} s: ", end="")
    print(f"{len(wrong)} seeds differ" if wrong else "0 differ")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
