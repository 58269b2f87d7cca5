"""A server's W4A8 calls: recorded ones compared, and what differs named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from mxfp4ref.__main__ import commands
from mxfp4ref.conformance.bounds.call_bounds import bound
from mxfp4ref.conformance.diagnosis import diagnose
from mxfp4ref.defects import DEFECTS
from mxfp4ref.engine import replay
from mxfp4ref.formats.humming_experts import HummingExperts
from mxfp4ref.model.forward import forward
from mxfp4ref.model.parallel import split_intermediate
from tests.helpers.recorded import write_call
from tests.model.test_humming import CALL, EXPERTS, SM90_ARGUMENTS, arguments_of, in_fp16, to_sm90


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


def test_calls_in_fp16_are_compared(tmp_path: Path) -> None:
    call = in_fp16(CALL)
    assert isinstance(call.experts, HummingExperts)
    arguments = arguments_of(replace(call, experts=to_sm90(call.experts)))
    write_call(tmp_path, arguments, forward(call))
    write_call(tmp_path, arguments, forward(call).to(torch.bfloat16), number=2)
    statuses = [result.status for result in replay(tmp_path).results]
    assert statuses == ["equal", "wrong output"]


def test_all_to_all_without_weights_is_compared_where_it_wrote(tmp_path: Path) -> None:
    """Rows of foreign tokens hold whatever memory held; the recorded weights are None."""
    call = replace(CALL, experts=EXPERTS.slice(0, 1), ep_size=4, ep_rank=1, enable_alltoall=True)
    assert isinstance(call.experts, HummingExperts)
    ones = replace(call, token_final_scales=torch.ones_like(call.token_final_scales))
    output = torch.where(call.written[:, None], forward(ones), 7.0)
    assert not bool(call.written.all())
    arguments = arguments_of(replace(call, experts=to_sm90(call.experts)))
    arguments |= {"token_final_scales": None, "enable_alltoall": True}
    write_call(tmp_path, arguments, output)
    assert [result.status for result in replay(tmp_path).results] == ["equal"]
