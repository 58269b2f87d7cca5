"""The benchmark runs on tiny sizes and says what it should; times are not looked at."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "bench"))

import benchmark
import peers
import torch

from mxfp4ref import dequantize, forward


def test_quick(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.json"
    arguments = ["--quick", "--json", str(file)]
    for section in ("dequantize", "forward", "hard"):
        arguments += ["--only", section]
    assert benchmark.main(arguments) == 0
    content = json.loads(file.read_text())
    assert {row["section"] for row in content["rows"]} == {"dequantize", "forward", "hard inputs"}
    assert all(row["milliseconds"] > 0 for row in content["rows"])
    printed = capsys.readouterr().out
    assert all(f"| {row['case']} |" in printed for row in content["rows"])


def test_peers_compute_the_same_layer() -> None:
    experts = peers.random_experts(2, 128, 128)
    assert experts.fc1_scales is not None
    pair = experts.fc1_weights, experts.fc1_scales
    assert torch.equal(peers.dequantize(*pair), dequantize(*pair))
    call = peers.random_call(experts, 3, 2)
    exact, approximate = forward(call).float(), peers.moe(call).float()
    assert (exact - approximate).abs().max() < 0.05 * exact.abs().max()
