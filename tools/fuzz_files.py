"""Damage files at random and run the commands on them, until the time is over; print how often each ended how.

    python tools/fuzz_files.py --seconds 600

A run is wrong that ends with a traceback, hangs, prints control characters, exits with 2 without a word, or changes a
file that is not its own. Each wrong one is printed with its seed: `--seed SEED --seconds 0` runs it again.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.helpers import file_fuzz, hostile_files


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seconds", type=float, default=600, help="how long (default: 600); one run at least"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the first run; the others follow (default: 0)"
    )
    arguments = parser.parse_args()
    counts: Counter[tuple[str, int | None]] = Counter()
    wrong = 0
    end = time.monotonic() + arguments.seconds
    with tempfile.TemporaryDirectory() as place:
        hostile_files.make_folder(Path(place, "whole"))
        seed = arguments.seed
        while True:
            found = file_fuzz.one(seed, Path(place, "whole"), Path(place))
            counts[found.command, found.code] += 1
            if found.problem:
                wrong += 1
                print(
                    f"seed {seed}: {found.command} after {found.damage}: {found.problem[:2000]}", flush=True
                )
            seed += 1
            if time.monotonic() >= end:
                break
    print(f"{'command':18}{'0':>8}{'1':>8}{'2':>8}")
    for command in hostile_files.COMMANDS:
        print(f"{command:18}" + "".join(f"{counts[command, code]:8,}" for code in (0, 1, 2)))
    print(f"{counts.total():,} damaged folders, seeds {arguments.seed} to {seed - 1}: {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
