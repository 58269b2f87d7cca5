"""A server's W4A8 calls: recorded ones compared, and what differs named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from mxfp4ref.__main__ import commands
from mxfp4ref.conformance.bounds import bound
from mxfp4ref.conformance.diagnosis import diagnose
from mxfp4ref.defects import DEFECTS
from mxfp4ref.model.forward import forward
from mxfp4ref.model.parallel import split_intermediate
from tests.helpers.recorded import write_call
from tests.model.test_humming import CALL, EXPERTS, SM90_ARGUMENTS


def test_recorded_calls(tmp_path: Path) -> None:
    output = forward(CALL)
    write_call(tmp_path, SM90_ARGUMENTS, output)
    assert CliRunner().invoke(commands, ["replay", str(tmp_path)]).exit_code == 0
    write_call(tmp_path, SM90_ARGUMENTS, (output.float() * 1.5).to(torch.bfloat16), number=2)
    result = CliRunner().invoke(commands, ["replay", str(tmp_path)])
    assert result.exit_code == 1
    assert "1 passed, 1 FAILED" in result.output


@pytest.mark.parametrize("name", ["fp8_activation_bf16", "fp8_rounded_before_factor", "fp8_k_descending"])
def test_a_wrong_output_is_named(name: str) -> None:
    wrong, expected = {"output": DEFECTS[name].run(CALL)}, {"output": forward(CALL)}
    found = diagnose("moe", CALL, wrong, expected)
    assert [prediction.name for prediction in found.predictions if prediction.exact] == [name]
    assert found.stage == ""


def test_what_there_is_not() -> None:
    with pytest.raises(ValueError, match="W4A8 experts"):
        bound(CALL)
    with pytest.raises(TypeError, match="prepare the shard of each rank"):
        split_intermediate(EXPERTS, 2)
    assert not any(d.applies(CALL) for d in DEFECTS.values() if d.target == "moe")
