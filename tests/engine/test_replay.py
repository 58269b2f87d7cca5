"""Recorded calls, computed again: what is equal, what is wrong, what cannot be said."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor

from mxfp4ref import __version__
from mxfp4ref.__main__ import commands
from mxfp4ref._choices import Diagnosing
from mxfp4ref.conformance.cli import progress
from mxfp4ref.conformance.diagnosis import Located
from mxfp4ref.conformance.looking import SECONDS
from mxfp4ref.conformance.reports.html_report import to_html
from mxfp4ref.conformance.reports.report import to_junit
from mxfp4ref.defects import get_defect
from mxfp4ref.engine import estimating
from mxfp4ref.engine.recordings import Recording
from mxfp4ref.engine.replay_cli import _note
from mxfp4ref.engine.replaying import ReplayOptions, ReplayReport, ReplayResult, replay
from mxfp4ref.formats.generations import BYTEWISE
from mxfp4ref.goldens import open_goldens
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import forward, trace
from mxfp4ref.model.parallel import split_experts
from tests.helpers import drop_in, layers, recorded
from tests.helpers.drop_in import CALL, EXPECTED, SM90_CALL, arguments_of

POSITIONAL = tuple(arguments_of(SM90_CALL))[:7]
COMPARE_ONLY = ReplayOptions(diagnosis="none")


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(commands, [str(a) for a in arguments])


def only(report: ReplayReport) -> ReplayResult:
    (result,) = report.results
    assert isinstance(result, ReplayResult)
    return result


def flipped(output: Tensor, token: int, column: int, bit: int = 0) -> Tensor:
    changed = output.clone()
    changed.view(torch.int16)[token, column] ^= 1 << bit
    return changed


def statuses(report: ReplayReport) -> dict[str, str]:
    return {result.case: result.status for result in report.results}


@pytest.mark.parametrize("form", ["safetensors", "pt"])
@pytest.mark.parametrize("positional", [(), POSITIONAL])
def test_calls_of_both_formats_and_both_ways_of_passing_arguments(
    tmp_path: Path, form: str, positional: tuple[str, ...]
) -> None:
    arguments = arguments_of(SM90_CALL) | {
        "activation_type": drop_in.ActivationType.Swiglu,
        "output": torch.zeros_like(EXPECTED),
    }
    recorded.write_call(tmp_path, arguments, EXPECTED, form=form, positional=positional)
    result = only(replay(tmp_path))
    assert (result.status, result.layer, result.tokens, result.differing) == ("equal", 1, 7, 0)
    assert result.tiles == ("128x128", "256x128")  # K is 256 and 128, and no group is in another place
    assert result.case == "process1/call0001"


def test_several_processes_and_nested_folders_are_told_apart(tmp_path: Path) -> None:
    for folder, pid in ((tmp_path / "node0" / "rank0", 7), (tmp_path / "node1", 7), (tmp_path / "node1", 8)):
        recorded.write_call(folder, SM90_CALL, EXPECTED, pid=pid)
    report = replay(tmp_path)
    assert statuses(report) == dict.fromkeys(
        ["node0/rank0/process1/call0001", "node1/process1/call0001", "node1/process2/call0001"], "equal"
    )
    handed = "3 equal. So the kernel computed what it was handed; whether that is the layer's, "
    assert report.verdict == f"3 recorded calls of 1 layer: {handed}`mxfp4ref layer --served` tells."


def test_two_recordings_of_the_same_calls_compare(tmp_path: Path) -> None:
    """Processes have other ids each time, and reports without a common case say nothing."""
    for name, pids in (("before", (41, 7)), ("after", (99, 100)), ("other", (3,))):
        for pid in pids:
            recorded.write_call(tmp_path / name, SMALL_CALL, forward(SMALL), pid=pid, number=5 - len(pids))
        invoke("replay", tmp_path / name, "--diagnosis", "none", "--json", tmp_path / f"{name}.json")
    before, after, other = (tmp_path / f"{name}.json" for name in ("before", "after", "other"))
    result = invoke("compare", before, after)
    assert "no case got worse, 2 are as they were" in result.output
    result = invoke("compare", before, other)
    assert result.exit_code == 2
    assert "expected reports of the same cases, got process1/call0003, ..." in " ".join(result.output.split())


def test_restarts_with_the_same_process_id_are_told_apart(tmp_path: Path) -> None:
    first = recorded.write_call(tmp_path, SM90_CALL, EXPECTED)
    first.rename(first.with_name(first.name.replace("20261127", "20261126")))
    recorded.write_call(tmp_path, SM90_CALL, EXPECTED)
    cases = list(statuses(replay(tmp_path, COMPARE_ONLY)))
    assert cases == ["process1/20261126_101500_123 call0001", "process1/20261127_101500_123 call0001"]


def test_ranks_of_a_parallel_layer(tmp_path: Path) -> None:
    for rank, experts in enumerate(split_experts(CALL.experts, 2)):
        call = replace(CALL, experts=layers.to_sm90(experts), ep_size=2, ep_rank=rank)
        recorded.write_call(tmp_path, call, forward(call), pid=rank)
    report = replay(tmp_path)
    assert report.ok
    assert [f"ep rank {rank} of 2" in result.why for rank, result in enumerate(report.results)] == [True] * 2
    assert {result.layer for result in report.results if isinstance(result, ReplayResult)} == {1, 2}


def test_layers_are_numbered_by_their_weights(tmp_path: Path) -> None:
    other = replace(SM90_CALL, experts=layers.to_sm90(layers.random_experts(2, hidden=256, inner=128)))
    for number, call in enumerate((SM90_CALL, other, SM90_CALL, other), 1):
        recorded.write_call(tmp_path, call, forward(call), number=number)
    report = replay(tmp_path, COMPARE_ONLY)
    assert report.ok
    assert [r.layer for r in report.results if isinstance(r, ReplayResult)] == [1, 2, 1, 2]


def test_a_layer_with_other_limits_is_still_one(tmp_path: Path) -> None:
    limits = (torch.full((CALL.experts.num_experts,), limit) for limit in (2.0, 3.0, 2.0))
    for number, limit in enumerate((*limits, None), 1):
        call = replace(SM90_CALL, experts=replace(SM90_CALL.experts, swiglu_limit=limit))
        recorded.write_call(tmp_path, call, forward(call), number=number)
    report = replay(tmp_path, COMPARE_ONLY)
    assert report.ok
    assert report.verdict.startswith(
        "4 recorded calls of 1 layer: 4 equal. 2 calls have another swiglu_limit than the first of the layer. "
    )
    note = "another swiglu_limit than in the layer's first call"
    assert [result.message for result in report.results] == ["", note, "", note]


# Small enough to try all defects on.
SMALL = layers.random_call(9, layers.random_experts(9, num_experts=2), tokens=2)
SMALL_CALL = replace(SMALL, experts=layers.to_sm90(SMALL.experts))


def test_one_flipped_bit_is_found_and_located(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SECONDS, "full", 0.5)  # it has no name
    expected = forward(SMALL)
    recorded.write_call(tmp_path, SMALL_CALL, flipped(expected, 1, 77))
    recorded.write_call(tmp_path, SMALL_CALL, expected, number=2)
    files = {kind: tmp_path / f"r.{kind}" for kind in ("json", "junit", "html")}
    result = invoke("replay", tmp_path, *(x for kind, path in files.items() for x in (f"--{kind}", path)))
    assert result.exit_code == 1
    assert "process1/call0001: differs in 1 of 256 elements" in result.output
    assert "first: output at [1, 77]" in result.output
    assert "1 ulp" in result.output
    row = next(line for line in result.output.splitlines() if line.startswith("process1/call0001 "))
    assert row.split("differs")[1].strip()  # the note
    experts = [i for i in SMALL.token_selected_experts[1].tolist() if i >= 0]
    assert all(f"expert {expert}, weight" in result.output for expert in experts)
    assert "2 recorded calls of 1 layer: 1 differs, 1 equal." in result.output
    written = json.loads(files["json"].read_text())
    first, second = written["results"]
    assert (first["status"], first["differing"], first["layer"]) == ("differs", 1, 1)
    assert first["diagnosis"]["first"]["index"] == [1, 77]
    assert second["tiles"] == ["128x128"]
    suite = ElementTree.parse(files["junit"]).getroot().find("testsuite")
    assert suite is not None
    assert (suite.attrib["tests"], suite.attrib["failures"], suite.attrib["errors"]) == ("2", "1", "0")
    assert "data:image/png" in files["html"].read_text()


def test_how_long_it_takes_is_said_before_and_each_call_as_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And that it is at the first one, which may take long."""
    told: list[Any] = []
    monkeypatch.setattr(progress, "heartbeat", lambda say: nullcontext(told.append))
    for number in (1, 2, 3):
        recorded.write_call(tmp_path, SMALL_CALL, forward(SMALL), number=number)
    result = CliRunner().invoke(commands, ["replay", str(tmp_path), "--max-calls", "2"])
    assert told[0]() == "now the first call"
    first, *each = result.stderr.splitlines()
    assert re.fullmatch(
        r"2 recorded calls: about \d+ s to compare, after up to 10 s to load compiled loops; "
        "up to 80 s of the processor more if all differ",
        first,
    )
    assert [line.split(",")[0] for line in each] == [
        "[  1/2] process1/call0001: equal",
        "[  2/2] process1/call0002: equal",
    ]
    words = " ".join(result.stdout.split())
    assert "2 recorded calls of 1 layer: 2 equal. 1 more were not replayed." in words
    assert f"not run: 1 case; to run all: mxfp4ref replay {tmp_path}" in words


@pytest.mark.parametrize(
    ("tokens", "diagnosis", "words"),
    [
        (
            8,
            "none",
            "1 recorded call, 1 of real size: about 1 s to compare, after up to 10 s to load compiled loops",
        ),
        (
            512,
            "full",
            "1 recorded call, 1 of real size: about 7 s to compare, after up to 10 s to load compiled loops; "
            "up to 60 s of the processor more if all differ",
        ),
    ],
)
def test_an_estimate_grows_with_the_call(
    monkeypatch: pytest.MonkeyPatch, tokens: int, diagnosis: Diagnosing, words: str
) -> None:
    arguments = {
        "token_selected_experts": torch.zeros(tokens, 4, dtype=torch.int32),
        "fc1_expert_weights": torch.zeros(8, 4096, 2048, dtype=torch.uint8),
        "fc2_expert_weights": torch.zeros(8, 4096, 1024, dtype=torch.uint8),
        "ep_size": 1,
    }
    monkeypatch.setattr(estimating, "arguments_of", lambda recording: arguments)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert str(estimating.estimate([Recording(Path(), "", "")], diagnosis)) == words


def test_a_report_says_what_was_replayed_when_and_by_what(tmp_path: Path) -> None:
    for rank, experts in enumerate(split_experts(SMALL.experts, 2)):
        limits = torch.full((experts.num_experts,), 7.0)
        experts = replace(layers.to_sm90(experts), swiglu_limit=limits)
        call = replace(SMALL, experts=experts, ep_size=2, ep_rank=rank)
        recorded.write_call(tmp_path, call, forward(call), pid=rank)
    unmodelled = arguments_of(SM90_CALL) | {"use_deepseek_fp8_block_scale": True}
    recorded.write_call(tmp_path, unmodelled, EXPECTED, release="0.6.15", number=9)
    files = {kind: tmp_path / f"r.{kind}" for kind in ("json", "html")}
    given = [x for kind, path in files.items() for x in (f"--{kind}", path)]
    result = invoke("replay", tmp_path, "--diagnosis", "quick", *given)
    assert result.exit_code == 0
    words = " ".join(result.output.split())
    calls = (
        "recorded with flashinfer 0.6.15, 0.7.2.post1; ranks ep 0 of 2, ep 1 of 2; "
        "activation Swiglu with swiglu_limit 7"
    )
    assert f"tested: mxfp4ref {__version__}, torch" in words
    assert f"calls: {calls}" in words
    assert "1 skipped: use_deepseek_fp8_block_scale" in words  # by no kernel
    assert "in all; comparison" in words  # no kernel ran
    written = json.loads(files["json"].read_text())
    assert written["command"] == f"mxfp4ref replay {tmp_path} --diagnosis quick"
    assert written["date"].startswith("20")
    assert (written["environment"]["mxfp4ref"], written["left"]) == (__version__, 0)
    html = files["html"].read_text()
    assert all(text in html for text in (calls, written["command"], written["date"]))


def test_no_report_replaces_what_was_read(tmp_path: Path) -> None:
    folder = recorded.write_call(tmp_path / "calls", SMALL_CALL, forward(SMALL))
    cache = tmp_path / "cache.json"
    cache.write_text("{}")
    linked = tmp_path / "linked"
    linked.hardlink_to(folder / "outputs.safetensors")
    given = [*(path for path in folder.iterdir() if path.is_file()), cache, linked]
    before = {path: path.read_bytes() for path in given}
    for path in given:
        result = invoke("replay", tmp_path / "calls", "--autotune-cache", cache, "--json", path)
        assert result.exit_code == 2, result.output
        assert "expected another file than the input" in result.output
    assert {path: path.read_bytes() for path in given} == before


def test_a_report_that_cannot_be_written_costs_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(source: Path, target: Path) -> None:
        if target.name == "r.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.rename(source, target)

    recorded.write_call(tmp_path / "calls", SMALL_CALL, forward(SMALL))
    monkeypatch.setattr(os, "replace", full_disk)
    result = invoke("replay", tmp_path / "calls", "--json", tmp_path / "r.json")
    assert result.exit_code == 2
    assert result.output.index("1 recorded call of 1 layer: 1 equal.") < result.output.index("No space left")
    assert not (tmp_path / "r.json").exists()


def test_each_report_has_a_file_of_its_own(tmp_path: Path) -> None:
    recorded.write_call(tmp_path / "calls", SMALL_CALL, forward(SMALL))
    other = tmp_path / "calls" / ".." / "r"
    result = invoke("replay", tmp_path / "calls", "--json", tmp_path / "r", "--junit", other)
    assert result.exit_code == 2
    assert "expected a file of its own for each" in result.output


def test_a_pipe_among_the_metadata_is_not_waited_for(tmp_path: Path) -> None:
    folder = recorded.write_call(tmp_path, SMALL_CALL, forward(SMALL))
    (folder / "metadata.jsonl").unlink()
    os.mkfifo(folder / "metadata.jsonl")
    result = only(replay(tmp_path, COMPARE_ONLY))
    assert result.status == "unreadable"
    assert "expected a regular file" in result.message


def test_a_diagnosis_that_fails_costs_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> Any:
        raise ValueError("of the kit")

    monkeypatch.setattr(Located, "search", broken)
    recorded.write_call(tmp_path, SMALL_CALL, flipped(forward(SMALL), 1, 2))
    recorded.write_call(tmp_path, SMALL_CALL, forward(SMALL), number=2)
    first, second = replay(tmp_path).results
    assert (first.status, second.status) == ("differs", "equal")
    assert first.message.startswith("no diagnosis: ValueError: of the kit")


@pytest.mark.usefixtures("patient")
def test_a_known_defect_is_named(tmp_path: Path) -> None:
    recorded.write_call(tmp_path, SMALL_CALL, get_defect("bf16_finalize").run(SMALL))
    result = only(report := replay(tmp_path, ReplayOptions(diagnosis="quick")))
    assert result.diagnosis is not None
    assert "bf16_finalize" in result.diagnosis.exact
    assert "bf16_finalize" in report.verdict


@pytest.mark.slow
def test_what_explained_one_call_is_tried_first_on_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hypotheses that have no name, too: a search of the same again takes as long as the first."""
    scaled = (forward(SMALL).to(torch.float32) * 0.9).to(torch.bfloat16)
    for number in (1, 2):
        recorded.write_call(tmp_path, SMALL_CALL, scaled, number=number)
    given, search = [], Located.search

    def noted(self: Located, suspects: tuple[Any, ...], diagnosis: str, **limits: float) -> Any:
        given.append((len(suspects) > 0, diagnosis, sorted(limits)))
        return search(self, suspects, diagnosis, **limits)

    monkeypatch.setattr(Located, "search", noted)
    report = replay(tmp_path, ReplayOptions())
    assert given == [(False, "full", []), (True, "quick", ["limit", "seconds"])]
    sentences = {r.diagnosis.finding.sentence for r in report.results if r.diagnosis}
    assert len(sentences) == 1
    assert "a factor of 0.9" in sentences.pop()


def test_what_all_calls_show_is_the_verdict(tmp_path: Path) -> None:
    scaled = (forward(SMALL).to(torch.float32) * 0.9).to(torch.bfloat16)
    for number in (1, 2, 3):
        recorded.write_call(tmp_path, SMALL_CALL, scaled, number=number)
    report = replay(tmp_path, ReplayOptions(diagnosis="quick"))
    words = "3 recorded calls of 1 layer: 3 differ. Every wrong bit is predicted by this: a factor of 0.9"
    assert report.verdict.startswith(words)
    assert report.finding.exact


def test_bits_are_compared_not_values(tmp_path: Path) -> None:
    call = replace(SM90_CALL, token_final_scales=torch.full_like(CALL.token_final_scales, float("nan")))
    output = forward(call)
    assert bool(output.isnan().any())
    recorded.write_call(tmp_path, call, output)
    assert replay(tmp_path).ok
    other = output.clone()
    token, column = output.isnan().nonzero()[0].tolist()
    other.view(torch.int16)[token, column] = 0x7FC0
    recorded.write_call(tmp_path / "other", call, other)
    assert only(replay(tmp_path / "other", COMPARE_ONLY)).status == "differs"


def test_a_call_that_is_not_modelled_is_listed_with_the_argument(tmp_path: Path) -> None:
    arguments = arguments_of(SM90_CALL)
    recorded.write_call(tmp_path, arguments | {"use_packed_weights": True}, EXPECTED)
    recorded.write_call(tmp_path, arguments | {"a_new_argument": 1}, EXPECTED, number=2)
    result = invoke("replay", tmp_path)
    assert result.exit_code == 2
    assert "use_packed_weights: not modelled, expected False" in result.output
    assert "a_new_argument" in result.output
    assert "none of the 2 recorded calls could be compared" in result.output
    recorded.write_call(tmp_path, SM90_CALL, EXPECTED, number=3)
    assert invoke("replay", tmp_path).exit_code == 0


def test_a_call_that_did_not_return_is_listed(tmp_path: Path) -> None:
    recorded.write_call(tmp_path, SM90_CALL, EXPECTED)
    recorded.write_call(tmp_path, SM90_CALL, None, number=2)
    recorded.write_flushes(tmp_path, [], number=3)
    report = replay(tmp_path)
    assert report.ok
    messages = [result.message for result in report.results]
    assert "the call raised, or the process died in it" in messages[1]
    assert "CUDA graph that was not replayed" in messages[2]


def test_a_line_of_metadata_that_was_not_finished_is_passed_over(tmp_path: Path) -> None:
    path = recorded.write_call(tmp_path, SM90_CALL, EXPECTED) / "metadata.jsonl"
    path.write_text(path.read_text() + '{"function_name": "cutl')
    assert replay(tmp_path).ok


def test_scales_of_another_release_are_refused(tmp_path: Path) -> None:
    old = replace(CALL, experts=layers.to_sm90(CALL.experts, BYTEWISE, torch.uint8))
    recorded.write_call(tmp_path, old, EXPECTED)
    recorded.write_call(tmp_path, old, EXPECTED, release="0.6.15", number=2)
    wrong, right = replay(tmp_path, COMPARE_ONLY).results
    assert wrong.status == "refused"
    assert "expected scales as flashinfer 0.7.2.post1 takes them" in wrong.message
    assert (right.status, right.tiles) == ("equal", ("128x128",))


def test_releases_before_0_6_10_take_logical_weights(tmp_path: Path) -> None:
    folded = layers.to_sm90(CALL.experts, BYTEWISE, torch.uint8)
    experts = replace(folded, fc1_weights=CALL.experts.fc1_weights, fc2_weights=CALL.experts.fc2_weights)
    arguments = arguments_of(replace(CALL, experts=experts))
    output = drop_in.oracle(replace(CALL, experts=experts), weight_layout="logical_weights_folded_scales")
    recorded.write_call(tmp_path, arguments, output, release="0.6.9")
    assert only(replay(tmp_path)).status == "equal"


def test_forced_tactics_have_to_be_those_of_the_bits(tmp_path: Path) -> None:
    call = open_goldens().load("gemm/mirrored_hidden_1536").call()
    sm90 = replace(call, experts=layers.to_sm90(call.experts))
    arguments = arguments_of(sm90)
    for number, ids in enumerate(([-1, -1], [4, -1]), 1):
        output = drop_in.oracle(sm90, profile_ids=ids)
        recorded.write_call(tmp_path, arguments | {"profile_ids": ids}, output, number=number)
    recorded.write_call(tmp_path, arguments | {"profile_ids": [4, -1]}, forward(sm90), number=3)
    results = replay(tmp_path).results
    assert [(r.status, r.tiles) for r in results] == [
        ("equal", ("128x128",)),
        ("equal", ("256x128",)),
        ("wrong tactic", ("128x128",)),
    ]
    assert "by profile_ids; the bits are those of K tiles 128x128" in results[2].message
    result = invoke("replay", tmp_path)
    assert "2 equal, 1 wrong tactic. 2 of 3 predictions of tactics held." in " ".join(result.output.split())
    assert "in 0 of" not in result.output


def test_a_limit_that_nothing_reaches_is_not_tested(tmp_path: Path) -> None:
    largest = trace(SMALL_CALL).fc1_output.abs().max().to(torch.float32)
    for number, (limit, tested) in enumerate([(2 * largest, False), (largest / 2, True)], 1):
        limits = torch.full((SMALL.experts.num_experts,), float(limit))
        call = replace(SMALL_CALL, experts=replace(SMALL_CALL.experts, swiglu_limit=limits))
        recorded.write_call(tmp_path, call, forward(call), number=number)
        report = replay(tmp_path, COMPARE_ONLY)
        assert report.ok
        assert ("reaches swiglu_limit: this does not show" in report.verdict) != tested


def test_local_ids_are_doubted_in_each_report(tmp_path: Path) -> None:
    """Zeros are equal to what such ids give, but nothing is proved: once a green check, without a word."""
    ids = torch.arange(SMALL.top_k, dtype=torch.int32).repeat(SMALL.num_tokens, 1)
    local = replace(SMALL_CALL, token_selected_experts=ids, ep_size=2, ep_rank=1)
    recorded.write_call(tmp_path / "calls", local, forward(local))
    files = {kind: tmp_path / f"r.{kind}" for kind in ("junit", "html")}
    given = [text for kind, path in files.items() for text in (f"--{kind}", path)]
    result = invoke("replay", tmp_path / "calls", *given)
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[-1].endswith(
        "ids of 1 call local already? The kernel takes global ones."
    )
    html = files["html"].read_text()
    assert "equal, but this proves nothing" in html
    assert "are these local ids already?" in html
    assert not any(green in html for green in ("✓", "conforms", 'class="good"', "verdict ok"))
    suite = ElementTree.parse(files["junit"]).getroot().find("testsuite")
    assert suite is not None
    assert suite.attrib["skipped"] == "1"
    skipped = suite.find("testcase/skipped")
    assert skipped is not None
    assert "are these local ids already?" in skipped.attrib["message"]


def test_notes_of_calls_that_are_equal_are_in_each_report(tmp_path: Path) -> None:
    noted = ReplayResult("a", "recording", "", "equal", elements=1, message="no prediction: of a cache")
    raised = replace(noted, status="raised", message="RuntimeError: no (k.py:3 in f; k.py:9 in g); of 2")
    assert _note(raised) == raised.message
    zeros = replace(noted, case="b", message="zeros prove nothing", all_zero=True)
    report = ReplayReport("calls", "exact", (noted, zeros))
    html = to_html(report)
    assert "conforms, but 1 of 2 prove nothing" in html
    assert "no prediction: of a cache" in html
    assert "<system-out>no prediction: of a cache</system-out>" in to_junit(report)


def test_an_output_of_zeros_proves_nothing(tmp_path: Path) -> None:
    zeros = replace(SMALL_CALL, token_final_scales=torch.zeros_like(SMALL.token_final_scales))
    recorded.write_call(tmp_path, zeros, forward(zeros))
    recorded.write_call(tmp_path, SMALL_CALL, forward(SMALL), number=2)
    report = replay(tmp_path, COMPARE_ONLY)
    first, second = report.results
    assert isinstance(first, ReplayResult)
    assert first.all_zero
    assert "all of the output is zero" in first.message
    assert second.message == ""
    assert "2 recorded calls of 1 layer: 2 equal. 1 gave zeros only, which proves nothing." in report.verdict


@pytest.mark.parametrize("release", ["9.9", "x.y"])
def test_a_release_in_no_record(tmp_path: Path, release: str) -> None:
    """The scales tell the layout, or nothing does; the same that swap and shadow do."""
    recorded.write_call(tmp_path, SM90_CALL, EXPECTED, release=release)
    old = replace(CALL, experts=layers.to_sm90(CALL.experts, BYTEWISE, torch.uint8))
    recorded.write_call(tmp_path, old, EXPECTED, release=release, number=2)
    told, untold = replay(tmp_path).results
    assert told.status == "equal"
    assert ("flashinfer 9.9 is in no record: by its scales, the wordwise kernel" in told.message) == (
        release == "9.9"
    )
    assert untold.status == "skipped"
    assert "quant_scales: 3-D scales belong to two layouts, and" in untold.message


# Where a call lies, and how it is then called.


@pytest.mark.parametrize("what", ["a call", "a folder above", "the flushes", "one flush", "a cycle"])
def test_links_are_followed(tmp_path: Path, what: str) -> None:
    root, elsewhere = tmp_path / "calls", tmp_path / "elsewhere"
    call = recorded.write_call(root / "node", SMALL_CALL, forward(SMALL))
    graph = recorded.write_flushes(root / "node", [(SMALL_CALL, forward(SMALL))], number=2)
    moved = {"a call": call, "a folder above": call.parent, "the flushes": graph / "graph_flushes"}
    moved["one flush"] = graph / "graph_flushes" / "flush_0001"
    if what == "a cycle":
        (call.parent / "again").symlink_to(root)
        (root / "zz").symlink_to(call)
    else:
        moved[what].rename(elsewhere)
        moved[what].symlink_to(elsewhere)
        outputs = next(elsewhere.rglob("outputs.safetensors"))
        assert "than the input" in invoke("replay", root, "--json", outputs).output
    assert statuses(replay(root, COMPARE_ONLY)) == {
        "node/process1/call0001": "equal",
        "node/process1/call0002 flush_0001": "equal",
    }


@pytest.mark.parametrize("name", ["node1", "latest", "{call}/graph_flushes"])
def test_a_link_that_leads_nowhere_is_not_passed_over(tmp_path: Path, name: str) -> None:
    call = recorded.write_call(tmp_path, SMALL_CALL, forward(SMALL))
    link = tmp_path / name.format(call=call.name)
    link.symlink_to(tmp_path / "unmounted")
    result = invoke("replay", tmp_path)
    assert result.exit_code == 2
    assert f"{link}: expected a file or folder, got a link to {tmp_path / 'unmounted'}" in result.output


def test_calls_without_tokens_prove_nothing(tmp_path: Path) -> None:
    call = SM90_CALL.select(torch.arange(0))
    recorded.write_call(tmp_path, call, forward(call))
    result = invoke("replay", tmp_path)
    assert result.exit_code == 2
    assert "the one recorded call could not be compared" in result.output


def test_rows_that_the_kernel_does_not_write_prove_nothing(tmp_path: Path) -> None:
    """With enable_alltoall tokens without an expert of the rank keep what was there."""
    ids = torch.full_like(SM90_CALL.token_selected_experts, 5)
    call = replace(SM90_CALL, token_selected_experts=ids, ep_size=2, enable_alltoall=True, strict=False)
    recorded.write_call(
        tmp_path, arguments_of(call) | {"enable_alltoall": True}, torch.full_like(EXPECTED, 7.0)
    )
    report = replay(tmp_path, COMPARE_ONLY)
    assert not report.ok
    assert only(report).elements == 0
    assert "with enable_alltoall the kernel writes nothing" in only(report).message
    result = invoke("replay", tmp_path)
    assert result.exit_code == 2
    assert "the one recorded call could not be compared" in result.output


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded.write_call(tmp_path, SMALL_CALL, forward(SMALL))
    (tmp_path / "node1").mkdir()
    scandir = os.scandir

    def refusing(path: Any) -> Any:
        if str(path).endswith("node1"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    result = invoke("replay", tmp_path)
    assert result.exit_code == 2
    assert f"Permission denied: '{tmp_path / 'node1'}'" in result.output


def test_here_is_a_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = recorded.write_call(tmp_path, SMALL_CALL, forward(SMALL))
    graph = recorded.write_flushes(tmp_path, [(SMALL_CALL, forward(SMALL))], number=2)
    for place, name in (
        (call, "process1/call0001"),
        (graph, "process1/call0002 flush_0001"),
        (graph / "graph_flushes" / "flush_0001", "process1/call0002 flush_0001"),
    ):
        monkeypatch.chdir(place)
        assert statuses(replay(".", COMPARE_ONLY)) == {name: "equal"}
    call.rename(tmp_path / "renamed")
    assert list(statuses(replay(tmp_path / "renamed", COMPARE_ONLY))) == ["renamed"]


def in_graph(form: str, root: Path, *flushes: tuple[MoeCall, Tensor], **options: Any) -> None:
    recorded.write_flushes(root, list(flushes), form=form, **options)


OTHER_CALL = replace(SM90_CALL, input=SM90_CALL.input.flip(0).contiguous())
OTHER_EXPECTED = forward(OTHER_CALL)


@pytest.mark.parametrize("form", ["safetensors", "pt"])
def test_each_replay_of_a_graph_is_a_call(tmp_path: Path, form: str) -> None:
    in_graph(form, tmp_path, (SM90_CALL, EXPECTED), (OTHER_CALL, OTHER_EXPECTED))
    assert statuses(replay(tmp_path)) == {
        "process1/call0001 flush_0001": "equal",
        "process1/call0001 flush_0002": "equal",
    }


def test_one_output_buffer_of_all_layers_is_not_the_kernels_fault(tmp_path: Path) -> None:
    in_graph("safetensors", tmp_path, (SM90_CALL, OTHER_EXPECTED))
    in_graph("safetensors", tmp_path, (OTHER_CALL, OTHER_EXPECTED), number=2)
    first, second = replay(tmp_path).results
    assert (first.status, second.status) == ("skipped", "equal")
    assert (
        "overwritten its output: what was recorded of it are the bits of process1/call0002 flush_0001"
        in first.message
    )


def test_an_output_written_over_the_input_is_not_the_kernels_fault(tmp_path: Path) -> None:
    in_graph("safetensors", tmp_path, (replace(SM90_CALL, input=EXPECTED), EXPECTED))
    result = only(replay(tmp_path))
    assert result.status == "skipped"
    assert "overwritten its input" in result.message


def test_what_is_read_as_the_process_ends_is_not_the_kernels_fault(tmp_path: Path) -> None:
    in_graph("safetensors", tmp_path, (SM90_CALL, EXPECTED), (OTHER_CALL, EXPECTED))
    first, second = replay(tmp_path).results
    assert (first.status, second.status) == ("equal", "skipped")
    assert "as the process ended" in second.message


def test_a_graph_whose_whole_tokens_differ_says_that_it_cannot_tell(tmp_path: Path) -> None:
    changed = torch.cat([OTHER_EXPECTED[:2], EXPECTED[2:]])
    in_graph("safetensors", tmp_path, (SM90_CALL, changed))
    result = only(replay(tmp_path, COMPARE_ONLY))
    assert result.status == "unclear"
    assert "Record the same call without graphs" in result.message
    recorded.write_call(tmp_path / "eager", SM90_CALL, changed)
    assert only(replay(tmp_path / "eager", COMPARE_ONLY)).status == "differs"


@pytest.mark.usefixtures("patient")
def test_a_wrong_kernel_in_a_graph_is_still_wrong(tmp_path: Path) -> None:
    in_graph("safetensors", tmp_path, (SM90_CALL, flipped(EXPECTED, 2, 3)))
    assert only(replay(tmp_path, COMPARE_ONLY)).status == "differs"
    in_graph("safetensors", tmp_path / "named", (SMALL_CALL, get_defect("gate_up_swapped").run(SMALL)))
    assert only(replay(tmp_path / "named", ReplayOptions(diagnosis="quick"))).status == "differs"


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def damage(kind: str, path: Path) -> None:
    """Make one recorded call what a hostile or a broken machine makes of it."""
    metadata, inputs = path / "metadata.jsonl", path / "inputs.safetensors"
    if kind == "no metadata":
        metadata.unlink()
    elif kind == "empty metadata":
        metadata.write_text("")
    elif kind == "metadata no text":
        metadata.write_bytes(b"\xff\xfe\x00")
    elif kind == "metadata no object":
        metadata.write_text("[1, 2]\n17\n")
    elif kind == "deep metadata":
        metadata.write_text("[" * 100_000)
    elif kind == "truncated safetensors":
        inputs.write_bytes(inputs.read_bytes()[:-100])
    elif kind == "no safetensors":
        inputs.write_bytes(b"nonsense")
    elif kind == "empty outputs":
        (path / "outputs.safetensors").write_bytes(b"")
    elif kind == "pickle with code":
        (path / "inputs.pt").write_bytes(pickle.dumps({"kwarg_input": Trap(path / "sprung")}))
    elif kind == "pt with code":
        torch.save({"kwarg_input": Trap(path / "sprung")}, path / "inputs.pt")
    elif kind == "pt of something else":
        torch.save([1, 2], path / "inputs.pt")
    elif kind == "truncated pt":
        torch.save({"kwarg_input": EXPECTED}, path / "inputs.pt")
        (path / "inputs.pt").write_bytes((path / "inputs.pt").read_bytes()[:-200])
    elif kind == "foreign tensors":
        torch.save({"weights": EXPECTED}, path / "inputs.pt")
    elif kind == "no input metadata":
        metadata.write_text(json.dumps({"function_name": "cutlass_fused_moe", "input_metadata": 3}))
    else:
        raise AssertionError(kind)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("no metadata", "metadata.jsonl: missing"),
        ("empty metadata", "expected a JSON object a line"),
        ("metadata no text", "metadata.jsonl: cannot be read"),
        ("metadata no object", "expected a JSON object a line"),
        ("deep metadata", "expected a JSON object a line"),
        ("truncated safetensors", "inputs.safetensors: cannot be read"),
        ("no safetensors", "inputs.safetensors: cannot be read"),
        ("empty outputs", "outputs.safetensors: cannot be read"),
        ("pickle with code", "inputs.pt: cannot be read"),
        ("pt with code", "inputs.pt: cannot be read"),
        ("pt of something else", "inputs.pt: expected tensors by name"),
        ("truncated pt", "inputs.pt: cannot be read"),
        ("foreign tensors", "expected a tensor kwarg_quant_scales__0, which metadata.jsonl names"),
        ("no input metadata", "expected an object under input_metadata"),
    ],
)
def test_a_damaged_call_is_one_row(tmp_path: Path, kind: str, words: str) -> None:
    path = recorded.write_call(tmp_path, SM90_CALL, EXPECTED)
    recorded.write_call(tmp_path, SM90_CALL, EXPECTED, number=2)
    damage(kind, path)
    result = invoke("replay", tmp_path, "--any-tile", "--diagnosis=none")
    assert result.exit_code == 1, result.output
    assert words in " ".join(result.output.split())
    assert "2 recorded calls of 1 layer: 1 unreadable, 1 equal." in result.output
    assert not (path / "sprung").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"input": None}, "input: expected a bfloat16 tensor"),
        (
            {"token_selected_experts": CALL.token_selected_experts.long()},
            "token_selected_experts.to(torch.int32)",
        ),
        ({"quant_scales": []}, "quant_scales: expected the scales of fc1 and fc2"),
        (
            {"input": torch.ones(7, 128, dtype=torch.bfloat16)},
            "fc1_expert_weights: expected a uint8 tensor of shape [E, 2I, 64]",
        ),
        ({"ep_size": "two"}, "ep_size"),
        ({"output_dtype": None}, "output_dtype: not modelled"),
    ],
)
def test_wrong_arguments_are_one_row(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    recorded.write_call(tmp_path, arguments_of(SM90_CALL) | changes, EXPECTED)
    result = only(replay(tmp_path))
    assert result.status in ("refused", "skipped")
    assert words in result.message


def test_an_output_of_another_shape_is_one_row(tmp_path: Path) -> None:
    recorded.write_call(tmp_path, SM90_CALL, EXPECTED[:3])
    result = only(replay(tmp_path))
    assert result.status == "wrong output"
    assert "expected a bfloat16 [7, 256] output" in result.message


def test_tensors_that_torch_saves_unresolved(tmp_path: Path) -> None:
    """What is lazily negated in the file is compared, and costs no other call its result."""
    lazy = torch._neg_view(-EXPECTED)
    recorded.write_call(tmp_path, SM90_CALL, lazy, form="pt")
    recorded.write_call(tmp_path, SM90_CALL, -lazy, form="pt", number=2)
    report = replay(tmp_path, COMPARE_ONLY)
    assert [result.status for result in report.results] == ["equal", "differs"]


def test_lists_that_an_older_recorder_did_not_keep(tmp_path: Path) -> None:
    path = recorded.write_call(tmp_path, SM90_CALL, None, release="0.6.9") / "metadata.jsonl"
    stored = json.loads(path.read_text())
    stored["input_metadata"]["kwarg_quant_scales"] = {"type": "list", "value": "[tensor([[[...]]])]"}
    path.write_text(json.dumps(stored))
    result = only(replay(tmp_path))
    assert result.status == "skipped"
    assert "quant_scales: recorded as text only" in result.message


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "no recorded call of cutlass_fused_moe in it"),
        (lambda path: (path / "20261127_101500_123_pid7_mm_fp4_call0001").mkdir(), "no recorded call"),
    ],
)
def test_nothing_to_replay_is_wrong_usage(tmp_path: Path, make: Any, words: str) -> None:
    make(tmp_path)
    result = invoke("replay", tmp_path)
    assert result.exit_code == 2
    assert words in result.output
    assert "FLASHINFER_LOGLEVEL=10" in result.output
    assert invoke("replay", tmp_path / "absent").exit_code == 2


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (lambda: ReplayOptions(autotune_cache="cache.json"), "autotune_cache: expected Path, got str"),  # type: ignore[arg-type]
        (lambda: ReplayOptions(any_tile=1), "any_tile: expected a bool, got int 1"),  # type: ignore[arg-type]
        (lambda: ReplayOptions(kernel=print), "kernel: expected str, got builtin_function"),  # type: ignore[arg-type]
        (lambda: ReplayOptions(kernel="oracle", device=0), "device: expected str, got int"),  # type: ignore[arg-type]
        (lambda: ReplayOptions(timeout=float("nan")), "timeout: expected a finite"),
        (lambda: replay(5), "folder: expected a path, got int"),  # type: ignore[arg-type]
        (lambda: replay(".", {}), "options: expected ReplayOptions, got dict"),  # type: ignore[arg-type]
        (lambda: replay(".", progress=3), "progress: expected a function, got 3"),  # type: ignore[arg-type]
        (lambda: replay("a\nb\x1b[2J"), r"folder: expected one of recorded calls, got 'a\\nb\\x1b\[2J'"),
    ],
)
def test_arguments_of_another_type_are_named(work: Callable[[], object], message: str) -> None:
    with pytest.raises((TypeError, ValueError, FileNotFoundError), match=f"^{message}"):
        work()
