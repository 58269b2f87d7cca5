"""What real GPUs gave for the golden cases: `goldens/hardware/*.jsonl`, written by the recording tool only.

A line is a JSON object for one run: `case` ("suite/name"), `tile_k` ([first, second]), `sha256` of the output's
bytes, `equal` (whether they were the model's), `repeatable` (whether a second launch gave them again), `generation`
(of the kernel, by `Generation.recorded_as`; the goldens are of the newest), `gpu`, and the versions `driver`, `cuda`,
`flashinfer`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

from mxfp4ref._files import mismatch, parse_json, read_file
from mxfp4ref.formats.generations import GENERATIONS, NEWEST, generation_named
from mxfp4ref.goldens.case import Case, tensor_bytes
from mxfp4ref.goldens.store import GoldenError, Goldens
from mxfp4ref.model.forward import forward
from mxfp4ref.sm90.tactics import Sm90Kernel

__all__ = ["compare", "in_words", "read"]

_RECORD = {
    "case": str,
    "tile_k": [int, int],
    "sha256": str,
    "equal": bool,
    "repeatable?": bool,
    "gpu": str,
    "flashinfer?": str,
    "generation?": tuple(name for g in GENERATIONS for name in (g.name, g.recorded_as)),
}


def read(goldens: Goldens) -> list[dict[str, Any]]:
    """All recorded runs; empty if nothing has been recorded.

    Raises:
        GoldenError: a file cannot be read, or a line is not of this format.
    """
    records = []
    for path in sorted((goldens.root / "hardware").glob("*.jsonl")):
        try:
            lines = read_file(path).decode().split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise GoldenError(f"{path}: cannot be read: {error}") from error
        for number, line in enumerate(lines, 1):
            if number == len(lines) and not line:
                break  # after the last line's end
            try:
                record = parse_json(line)
            except ValueError as error:
                raise GoldenError(f"{path}:{number}: not JSON: {error}") from error
            if wrong := mismatch(record, _RECORD, "record"):
                raise GoldenError(f"{path}:{number}: {wrong}")
            records.append(record)
    return records


def compare(goldens: Goldens) -> tuple[list[dict[str, Any]], list[str]]:
    """The records, and a line for each that does not agree with the golden's output.

    A kernel that is known for a race and did not repeat its own output agrees with none, which is not wrong.
    """
    records = read(goldens)
    by_case: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        by_case.setdefault(record["case"], []).append(record)
    problems = []
    for name, found in by_case.items():
        if name not in goldens.names():
            problems.append(f"{name}: recorded on {found[0]['gpu']}, but there is no such case")
            continue
        case = goldens.load(name)
        hashes = case.output_hashes
        for record in found:
            pair = (record["tile_k"][0], record["tile_k"][1])
            where = f"{name}, K tiles {pair[0]}x{pair[1]}, {record['gpu']}"
            if pair not in hashes:
                problems.append(f"{where}: the golden has no output for these tiles")
                continue
            same = record["sha256"] == hashes[pair] or record["sha256"] == _of_generation(case, pair, record)
            if not same and not _race_shows(record):
                problems.append(
                    f"{where}: recorded SHA-256 {record['sha256']}, the golden has {hashes[pair]}"
                )
            elif same and not record["equal"]:
                problems.append(f"{where}: recorded as different, but the hashes are equal")
    return records, problems


def in_words(records: Sequence[dict[str, Any]], contradictions: int) -> str:
    """How many runs gave the model's bits and how many, of which releases, others; and how many `compare` rejects."""
    if not records:
        return "none"
    other = Counter(str(r.get("flashinfer", "unknown")) for r in records if not r["equal"])
    gpus = ", ".join(sorted({str(r["gpu"]) for r in records}))
    equal = len(records) - other.total()
    words = f"{len(records)} runs of golden calls on {gpus}: {equal} equal, {other.total()} differ"
    if contradictions:
        return f"{words}; {contradictions} contradict the goldens"
    releases = ", ".join(f"{count} of {release}" for release, count in sorted(other.items()))
    race = "a known race of these releases, see docs/releases.md"
    return words + (f" (flashinfer: {releases}; {race})" if other else "")


def _race_shows(record: dict[str, Any]) -> bool:
    generation = generation_named(record.get("generation", NEWEST.name))
    return bool(generation.known_faults) and not record.get("repeatable", True) and not record["equal"]


def _of_generation(case: Case, tile_k: tuple[int, int], record: dict[str, Any]) -> str:
    """The hash of the model's output for the record's generation; "" if that is the goldens' own."""
    generation = generation_named(record.get("generation", NEWEST.name))
    if generation is NEWEST:
        return ""
    output = forward(case.call(Sm90Kernel.of_tiles(tile_k, generation=generation)))
    return hashlib.sha256(tensor_bytes(output)).hexdigest()
