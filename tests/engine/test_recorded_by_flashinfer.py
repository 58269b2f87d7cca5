"""Calls of the real kernel on an H100 that flashinfer recorded itself, replayed: `tools/hardware/record_calls.py`."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mxfp4ref.conformance.looking import REAL_SECONDS, SECONDS
from mxfp4ref.engine import ReplayOptions, ReplayReport, ReplayResult, replay

ARCHIVE = Path(__file__).parents[1] / "recordings" / "server_calls.tar.xz"


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calls")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    for path in folder.rglob("outputs.safetensors"):  # an output of zeros is no evidence
        assert (load_file(path)["result__0"] != 0).float().mean() > 0.25
    return folder


def statuses(report: ReplayReport) -> list[str]:
    return [result.status for result in report.results]


@pytest.mark.parametrize(
    ("way", "count"), [("0.7.2.post1/eager", 2), ("0.7.2.post1/graph", 6), ("0.6.17/eager", 1)]
)
def test_every_call_is_equal(calls: Path, way: str, count: int) -> None:
    assert statuses(replay(calls / way)) == ["equal"] * count


@pytest.mark.parametrize(("inputs", "count"), [("0.7.2.post1", 2), ("cancelling", 1)])
@pytest.mark.parametrize(("way", "cache"), [("autotuned", "autotune.json"), ("autotuned_v2", "autotune_v2")])
def test_tactics_are_those_of_the_autotuners_cache(
    calls: Path, inputs: str, count: int, way: str, cache: str
) -> None:
    report = replay(calls / inputs / way, ReplayOptions(autotune_cache=calls / inputs / cache))
    assert statuses(report) == ["equal"] * count
    assert f"{count} of {count} prediction" in report.verdict
    assert all(isinstance(result, ReplayResult) and result.predicted for result in report.results)
    if inputs == "cancelling":  # no other tiles fit there
        assert report.results[0].tiles == ("128x128",)


def test_a_flipped_bit_is_found_and_located(calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REAL_SECONDS, "full", 0.5)  # it has no name
    monkeypatch.setitem(SECONDS, "full", 0.5)
    (*_, path) = sorted((calls / "0.7.2.post1" / "eager").glob("*/outputs.safetensors"))
    tensors = load_file(path)
    tensors["result__0"].view(torch.int16)[5, 700] ^= 1
    save_file(tensors, path)
    report = replay(calls / "0.7.2.post1" / "eager")
    equal, differs = report.results
    assert (equal.status, differs.status, differs.differing) == ("equal", "differs", 1)
    assert differs.diagnosis is not None
    assert differs.diagnosis.first.index == (5, 700)
