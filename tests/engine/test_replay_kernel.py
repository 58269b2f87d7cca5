"""Recorded inputs, answered by a kernel under test; mode bounded; an interrupted replay."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from mxfp4ref.__main__ import commands
from mxfp4ref.conformance.kernels.adapters import KernelError
from mxfp4ref.engine import replaying
from mxfp4ref.engine.replaying import ReplayOptions, replay
from tests.helpers import recorded
from tests.helpers.drop_in import EXPECTED, SM90_CALL


@pytest.fixture
def wrong(tmp_path: Path) -> Path:
    """A call whose recorded output is wrong."""
    recorded.write_call(tmp_path / "calls", SM90_CALL, torch.zeros_like(EXPECTED))
    return tmp_path / "calls"


def test_the_output_is_the_kernels(wrong: Path) -> None:
    assert not replay(wrong, ReplayOptions(diagnosis="none")).ok
    report = replay(wrong, ReplayOptions(kernel="oracle"))
    assert report.ok
    assert report.verdict.startswith("oracle on 1 recorded call of 1 layer: 1 equal.")
    assert report.arguments == (str(wrong), "--kernel", "oracle")
    one = replay(report.results[0].why.split(": ")[0], ReplayOptions(kernel="oracle"))
    assert one.ok


@pytest.mark.usefixtures("copied_processes")
def test_a_kernel_of_ones_own(wrong: Path, tmp_path: Path) -> None:
    (tmp_path / "kernel.py").write_text(
        "from mxfp4ref import torch_ref_cutlass_fused_moe\n"
        "def f(**named):\n"
        "    return torch_ref_cutlass_fused_moe(**named)[0] * 2\n"
    )
    files = ("--json", str(tmp_path / "r.json"))
    arguments = ["replay", str(wrong), "--kernel", f"{tmp_path / 'kernel.py'}:f", "--mode", "bounded"]
    result = CliRunner().invoke(commands, [*arguments, "--diagnosis", "none", *files])
    assert result.exit_code == 1, result.output
    assert "1 outside bounds" in result.output
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["mode"] == "bounded"
    assert found["results"][0]["outside"] > 0
    assert found["results"][0]["kernel_seconds"] > 0
    assert re.search(r"^seconds: .* in all; kernel [0-9.]+, comparison ", result.output, re.MULTILINE)


def test_mode_bounded_of_what_was_recorded(tmp_path: Path) -> None:
    """A last bit that another order of sums may give, and another sign, which none does."""
    near, far = EXPECTED.clone(), EXPECTED.clone()
    near.view(torch.int16)[0, 0] ^= 1
    far[0, 0] *= -1
    for number, output in enumerate((near, far), 1):
        recorded.write_call(tmp_path, SM90_CALL, output, number=number)
    report = replay(tmp_path, ReplayOptions(mode="bounded", diagnosis="none"))
    assert [(r.status, r.differing, r.outside) for r in report.results] == [
        ("within bounds", 1, 0),
        ("outside bounds", 1, 1),
    ]


@pytest.mark.usefixtures("copied_processes")
def test_what_cannot_answer(wrong: Path) -> None:
    with pytest.raises(KernelError, match="expected one that runs whole calls, got 'stage:routing"):
        replay(wrong, ReplayOptions(kernel="stage:routing:math:sqrt"))
    with pytest.raises(ValueError, match="device: expected kernel with it, got 'cpu' alone"):
        ReplayOptions(device="cpu")


def test_an_interrupted_replay_tells_what_was_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 2):
        recorded.write_call(tmp_path / "calls", SM90_CALL, EXPECTED, number=number)
    original = replaying._Run.replay

    def interrupted(self: Any, recording: Any) -> Any:
        if recording.name.endswith("2"):
            signal.raise_signal(signal.SIGTERM)
        return original(self, recording)

    monkeypatch.setattr(replaying._Run, "replay", interrupted)
    arguments = ["replay", str(tmp_path / "calls"), "--json", str(tmp_path / "r.json")]
    result = CliRunner().invoke(commands, arguments)
    assert result.exit_code == 143, result.output
    assert "interrupted, no verdict; 1 recorded call of 1 layer: 1 equal." in result.output
    found = json.loads((tmp_path / "r.json").read_text())
    assert (found["interrupted"], found["left"], len(found["results"])) == (True, 1, 1)
