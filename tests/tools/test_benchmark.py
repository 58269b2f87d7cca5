"""The benchmark runs on tiny sizes and says what it should; times are not looked at."""

from __future__ import annotations

import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "bench"))

import benchmark
import peers
import torch

from mxfp4ref import dequantize, forward


def test_quick_measures_every_line_that_has_a_target(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["--quick"]) == 0
    cases: dict[str, list[str]] = {}
    for section in capsys.readouterr().out.split("\n## ")[1:]:
        table, *lines = section.splitlines()
        rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")][1:]
        cases[table] = [row[0] for row in rows]
        assert all(float(row[1]) > 0 for row in rows)
    assert set(cases) == set(benchmark.TABLES)
    for device, table, pattern, _ in benchmark.TARGETS:
        if device == "cpu":
            assert any(fnmatchcase(case, pattern) for case in cases[table]), pattern


def test_targets_are_met_or_missed() -> None:
    row = benchmark.Row("M = 1, drop-in", ms=2.0, ratio=None, MiB=100.0)
    assert benchmark.verdicts(row, "ms <= 3, MiB <= 99, ratio >= 2") == ["met", "MISSED", "not measured"]
    assert benchmark.verdicts(row, "ms >= 3, MiB >= 100") == ["MISSED", "met"]
    assert benchmark.verdicts(row, "") == []
    assert benchmark.target_of("cpu", "layer", f"M = 64, {peers.FASTEST}") == "ratio >= 1"
    assert benchmark.target_of("cpu", "layer", f"M = 8, {peers.FASTEST}") == "ratio >= 1.5"
    assert benchmark.target_of("cuda", "small", "M = 1, drop-in") == ""


def test_ratios_are_to_the_first_and_memory_is_what_a_run_adds() -> None:
    sizes = benchmark.Sizes(turns=1)
    first, second = benchmark.measured(
        sizes, {"a": lambda: None, "b": lambda: torch.ones(8 << 20)}, "M = 1, "
    )
    assert (first.case, first.ratio, second.case) == ("M = 1, a", None, "M = 1, b")
    assert second.ratio == second.ms / first.ms
    assert second.MiB is None or 28 < second.MiB < 40


def test_peers_compute_the_same_layer() -> None:
    experts = peers.random_experts(2, 128, 128)
    assert experts.fc1_scales is not None
    pair = experts.fc1_weights, experts.fc1_scales
    assert torch.equal(peers.dequantize(*pair), dequantize(*pair))
    call = peers.random_call(experts, 3, 2)
    exact = forward(call)
    assert torch.equal(peers.drop_in(call, peers.interleaved(experts))(), exact)
    tests, fastest = (run() for run in peers.approximations(call).values())
    assert torch.equal(tests, fastest)
    assert (exact.float() - tests.float()).abs().max() < 0.05 * exact.float().abs().max()
