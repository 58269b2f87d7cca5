"""The model against what the records say that real GPUs gave for the goldens."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mxfp4ref.formats.generations import BYTEWISE
from mxfp4ref.goldens import Goldens, open_goldens
from mxfp4ref.goldens.cases import DEFINITIONS
from mxfp4ref.goldens.cases.definition import define
from mxfp4ref.goldens.hardware_record import compare, in_words, read
from mxfp4ref.goldens.manifest import entries, manifest_bytes
from mxfp4ref.goldens.writing import case_files

GOLDENS = open_goldens(Path(__file__).resolve().parents[2] / "goldens")
COUNTS = sorted((GOLDENS.root / "hardware").glob("*.json"))
NEWEST_RECORD = "0.7.2.post1"  # the release of flashinfer that every kernel call was recorded with


def unrecorded(goldens: Goldens, records: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """The kernel calls that are to be recorded and are not; and those that are recorded but still called pending."""
    recorded = {(r["case"], tuple(r["tile_k"])) for r in records if r["flashinfer"] == NEWEST_RECORD}
    compared = {key.partition(", ")[2] for path in COUNTS for key in json.loads(path.read_text())}
    missing, no_longer_pending = [], []
    for case in (goldens.load(name) for name in goldens.names()):
        complete = (
            case.id in compared
            if case.kind == "w4a8"
            else all((case.id, tile_k) in recorded for tile_k in case.output_tensors)
        )
        if case.kind in ("moe", "w4a8") and complete == case.pending:
            (no_longer_pending if case.pending else missing).append(case.id)
    return missing, no_longer_pending


def test_every_kernel_call_was_recorded() -> None:
    assert unrecorded(GOLDENS, read(GOLDENS)) == ([], [])
    pending = [name for name in GOLDENS.names() if GOLDENS.load(name).pending]
    if pending:  # no failure, because a contributor may have no GPU, but to be seen
        pytest.skip(f"no GPU has confirmed these cases yet: {', '.join(pending)}")


@pytest.mark.parametrize("pending", [False, True])
def test_a_case_without_a_record_has_to_be_pending(tmp_path: Path, pending: bool) -> None:
    definition = replace(DEFINITIONS["finalize/slot_order"], pending=pending)
    files = case_files(definition, definition.content())
    assert (b'"pending"' in files["json"]) == pending
    (tmp_path / "finalize").mkdir()
    for kind, data in files.items():
        (tmp_path / f"{definition.id}.{kind}").write_bytes(data)
    (tmp_path / "manifest.json").write_bytes(manifest_bytes(entries({definition.id: files})))
    goldens = Goldens(tmp_path)
    assert goldens.load(definition.id).pending == pending
    missing, no_longer_pending = [definition.id], [definition.id]
    assert unrecorded(goldens, []) == (([], []) if pending else (missing, []))
    assert unrecorded(goldens, read(GOLDENS)) == (([], no_longer_pending) if pending else ([], []))


def test_only_kernel_calls_can_be_pending() -> None:
    with pytest.raises(ValueError, match="pending: expected a case of kind 'moe' or 'w4a8'"):
        define("layout", why="why", pending=True)


def test_records_agree_with_the_goldens() -> None:
    records, problems = compare(GOLDENS)
    assert {r["gpu"] for r in records} == {"NVIDIA H100 80GB HBM3", "NVIDIA H200"}
    assert {r["flashinfer"] for r in records} == {
        *("0.7.2.post1", "0.6.18", "0.6.17", "0.6.16.post3", "0.6.15.post1")
    }
    racing = [r for r in records if not (r["equal"] and r["repeatable"])]
    assert {(r["case"], r["flashinfer"]) for r in racing} == {
        (f"sizes/{case}", release)
        for case in ("tokens_520", "experts_384_with_a_row_each")
        for release in ("0.6.16.post3", "0.6.17")
    }
    assert problems == []
    assert ": 957 equal, 4 differ (flashinfer: 2 of 0.6.16.post3, 2 of 0.6.17; " in in_words(records, 0)


@pytest.mark.parametrize(
    ("generation", "altered", "noticed"),
    [
        ("0.6.16", {}, True),
        ("0.6.16", {"repeatable": False, "equal": False}, True),  # a kernel without a known race
        ("0.6.9", {"equal": False}, True),
        ("0.6.9", {"repeatable": False}, True),  # it cannot have been the model's
        ("0.6.9", {"repeatable": False, "equal": False}, False),
    ],
)
def test_an_altered_record_is_noticed(
    tmp_path: Path, generation: str, altered: dict[str, Any], noticed: bool
) -> None:
    (tmp_path / "hardware").mkdir()
    record = next(r for r in read(GOLDENS) if r["generation"] == generation)
    line = record | {"sha256": record["sha256"][::-1]} | altered
    (tmp_path / "hardware" / "x.jsonl").write_text(json.dumps(line) + "\n")
    goldens = Goldens.__new__(Goldens)
    goldens.__dict__.update(vars(GOLDENS))
    goldens.load = GOLDENS.load  # type: ignore[method-assign]
    goldens.root = tmp_path
    assert len(compare(goldens)[1]) == noticed


@pytest.mark.parametrize("path", COUNTS, ids=lambda path: path.stem)
def test_counts(path: Path) -> None:
    """Of the present kernel not one element differs; the older one has a race that random calls meet."""
    record = json.loads(path.read_text())
    counts = (
        [record]
        if "seeds" in record
        else [v for v in record.values() if isinstance(v, dict) and "compared" in v]
    )
    compared = sum(entry.get("elements", entry.get("compared", 0)) for entry in counts)
    assert compared > 1_000_000
    racing = record["provenance"]["flashinfer"] in BYTEWISE.releases and "seeds" in record
    assert (sum(entry["differing"] for entry in counts) == 0) == (not racing)
