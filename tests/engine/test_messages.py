"""Messages that name what to do, and say nothing that the records contradict."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from click.testing import CliRunner, Result

from mxfp4ref.__main__ import commands
from mxfp4ref.conformance.findings.finding import in_words
from mxfp4ref.conformance.reports.report import to_json
from mxfp4ref.conformance.results import CaseResult, Report
from mxfp4ref.defects import get_defect
from mxfp4ref.engine.describing import described
from mxfp4ref.engine.replaying import ReplayOptions, replay
from mxfp4ref.formats.generations import BYTEWISE, GENERATIONS, PLAIN, WORDWISE
from tests.helpers import recorded
from tests.helpers.checkpoints import DEEPSEEK_H, make_checkpoint
from tests.helpers.drop_in import CALL, EXPECTED, SM90_CALL


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(commands, [str(a) for a in arguments])


def test_releases_in_words_are_those_of_the_record() -> None:
    assert BYTEWISE.spans == "0.6.10 to 0.6.15.post1, 0.6.16.post3 to 0.6.17"
    assert WORDWISE.spans == "0.6.16 to 0.6.16.post2, 0.6.18 to 0.7.2.post1"
    assert PLAIN.spans == "0.6.4 to 0.6.9"
    assert replace(PLAIN, releases=("0.6.7",)).spans == "0.6.7"
    for name in ("scales_folded_old", "weights_interleaved_old"):
        assert f"the bytewise kernel (flashinfer {BYTEWISE.spans})" in get_defect(name).summary
    assert f"the wordwise kernel (flashinfer {WORDWISE.spans})" in get_defect("scales_folded_new").summary


def test_scales_of_another_release_are_refused_with_what_folds_them(tmp_path: Path) -> None:
    recorded.write_call(tmp_path, SM90_CALL, EXPECTED, release="0.6.12")
    (result,) = replay(tmp_path, ReplayOptions(diagnosis="none")).results
    assert result.status == "refused"
    assert f"of the wordwise kernel (flashinfer {WORDWISE.spans})" in result.message
    assert "fold_scales_sm90(scales, BYTEWISE)" in result.message
    assert len(GENERATIONS) == 2


def test_a_rank_without_the_number_of_ranks(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    make_checkpoint(tmp_path / "model", "deepseek_v4")
    save_file({"hidden": torch.zeros(2, DEEPSEEK_H, dtype=torch.bfloat16)}, tmp_path / "x")
    layer = ("layer", "--checkpoint", tmp_path / "model", "--layer", "1", "--input", tmp_path / "x")
    for kind in ("ep", "tp"):
        for rank in ("1", "2"):
            result = invoke(*layer, f"--{kind}-rank", rank)
            assert result.exit_code == 2
            assert f"--{kind}-rank: expected --{kind}-size with it" in result.output


def test_the_activation_is_the_one_that_was_asked_for() -> None:
    limit = torch.full((CALL.experts.num_experts,), 7.0)
    only = {"swiglu_alpha": None, "swiglu_beta": None, "swiglu_limit": limit}
    limited = replace(CALL, experts=replace(CALL.experts, **only))
    assert described(limited).endswith(", Swiglu with swiglu_limit 7")


def test_a_report_has_no_number_of_what_was_not_asked() -> None:
    result = CaseResult("a", "moe", "why", "differs", elements=8, differing=8)
    for mode, there in (("exact", False), ("bounded", True)):
        assert ("outside" in json.loads(to_json(Report("k", mode, (result,))))["results"][0]) is there


def test_kinds_are_listed() -> None:
    result = invoke("list", "quantize", "--json")
    assert {row["kind"] for row in json.loads(result.output)} == {"quantize"}


def test_what_is_the_same_in_other_words_is_not_told_again() -> None:
    alike = "cut to bf16 instead of rounded, in every second column, from 1 on"
    told = in_words([f"output_truncated: the output {alike}", f"the output is {alike}"])
    assert told == f"output_truncated: the output {alike}"
    told = in_words([f"output_truncated: the output {alike}", f"the sum is {alike}"])
    assert told.endswith(f"would come from: the sum is {alike}")
