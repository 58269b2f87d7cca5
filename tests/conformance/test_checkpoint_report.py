"""`mxfp4ref checkpoint-report`: what W4A8 loses of a checkpoint's weights."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from mxfp4ref.__main__ import commands
from mxfp4ref.checkpoint import read_layer
from mxfp4ref.formats.humming import preparation_loss
from tests.helpers.checkpoints import Tensors, make_checkpoint


def report(*arguments: object) -> Result:
    return CliRunner().invoke(commands, ["checkpoint-report", *map(str, arguments)])


@pytest.mark.parametrize("kind", ["deepseek_v4", "gpt_oss"])
def test_every_layer_and_their_sum(tmp_path: Path, kind: str) -> None:
    make_checkpoint(tmp_path, kind)
    found = json.loads(report(tmp_path, "--json").output)
    assert list(found) == [*(f"{layer} {gemm}" for layer in range(3) for gemm in ("fc1", "fc2")), "all"]
    experts = read_layer(tmp_path, 1, limit=math.inf, multiple=32).experts
    assert experts.fc2_scales is not None
    loss = preparation_loss(experts.fc2_weights, experts.fc2_scales)
    assert found["1 fc2"]["weights_changed"] == loss.weights_changed > 0
    assert found["1 fc2"]["worst_error"] == loss.worst_error
    parts = [values for name, values in found.items() if name != "all"]
    for name in ("groups", "groups_rewritten", "weights_changed", "weights_zeroed"):
        assert found["all"][name] == sum(values[name] for values in parts)
    table = report(tmp_path, "--layer", 1, "--layer", 2).output.splitlines()
    assert [line.split()[:2] for line in table[1:5]] == [[str(n), f"fc{g}"] for n in (1, 2) for g in (1, 2)]
    assert f"{loss.groups_rewritten:,} (" in table[2]


def test_nothing_is_lost_of_near_scales(tmp_path: Path) -> None:
    def near(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            if ".experts." in name and name.endswith("scale"):
                tensors[name] = (tensor.view(torch.uint8) % 12 + 110).view(tensor.dtype)

    make_checkpoint(tmp_path, "deepseek_v4", near)  # which changes layer 1
    result = report(tmp_path, "--layer", 1)
    assert result.exit_code == 0
    assert "nothing is lost" in result.output


def test_wrong_usage(tmp_path: Path) -> None:
    assert report(tmp_path / "none").exit_code == 2
    make_checkpoint(tmp_path, "deepseek_v4")
    result = report(tmp_path, "--layer", 9)
    assert result.exit_code == 2
    assert "layer: expected one of" in result.output
