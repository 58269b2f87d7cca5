"""Running kernels over goldens: what passes and what is reported."""

from __future__ import annotations

import itertools
import os
import sys
import threading
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from mxfp4ref import MoeCall, forward
from mxfp4ref.__main__ import commands
from mxfp4ref.conformance import (
    CaseResult,
    Kernel,
    Options,
    Report,
    Skip,
    load_kernel,
    run,
    run_case,
)
from mxfp4ref.conformance.isolation.execution import execute_within
from mxfp4ref.conformance.isolation.kernel_process import _same_experts
from mxfp4ref.conformance.kernels.adapters import KernelError, whole_arguments
from mxfp4ref.conformance.kernels.loading import load_kernel_here
from mxfp4ref.conformance.suite import InternalError
from mxfp4ref.defects import DEFECTS
from mxfp4ref.goldens import Case, GoldenError, open_goldens
from mxfp4ref.sm90.tactics import Sm90Kernel
from tests.helpers import kernels_under_test
from tests.helpers.usual import first

GOLDENS = open_goldens()
WHOLE_SIZE = GOLDENS.names("models")
SMALL = "finalize/slot_order"


@pytest.fixture(scope="module")
def case() -> Case:
    return GOLDENS.load(SMALL)


def result_of(spec: str, case: Case) -> CaseResult:
    return run_case(load_kernel(spec), case)


@pytest.mark.parametrize("part", first(1, range(3)))  # `tests/goldens/test_case.py` has the bits of all
def test_oracle_conforms_on_all_small_cases(part: int) -> None:
    names = [name for name in GOLDENS.names() if name not in WHOLE_SIZE][part::3]
    report = run("oracle", (GOLDENS.load(name) for name in names), Options(repeat=False))
    assert [r.case for r in report.results if r.status != "equal"] == []
    assert report.ok
    assert report.verdict == f"oracle conforms: it equals the expected bits in all {len(names)} cases."


def test_a_run_of_no_case_says_why() -> None:
    """A kernel that skips all is not said to be of another kind, nor are those cases said to be skipped by it."""
    names = (SMALL, "activation/alpha_alone", "layout/swap_halves", "tile_n/first_groups_overflow_16")
    cases = [GOLDENS.load(name) for name in names]

    def lacks_output(**named: Any) -> Any:
        raise Skip("no output")

    report = run(load_kernel(lacks_output), cases)
    assert "ran on no case: " in report.verdict
    assert report.skipped.startswith("2 skipped by the kernel: no output; 1 skipped: the output")
    assert report.skipped.endswith("; 1 skipped, of kinds that it does not run")
    assert report.skipped in report.verdict


def test_many_reasons_are_counted() -> None:
    results = [CaseResult(f"a/{n}", "moe", "", "skipped", message=f"no {n}") for n in range(7)]
    results.append(CaseResult("a/7", "moe", "", "skipped", message="no 3"))
    skipped = Report("kernel", "exact", tuple(results)).skipped
    assert skipped.startswith("2 skipped by the kernel: no 3; 1 skipped ")
    assert skipped.endswith("no 4; 2 for 2 other reasons")


@pytest.mark.usefixtures("copied_processes")
def test_cases_without_an_end(case: Case) -> None:
    """They are not run when enough have failed, and not all counted."""
    report = run(kernels_under_test.raises, itertools.repeat(case), Options(max_failures=2, diagnosis="none"))
    assert (len(report.results), report.left) == (2, 1000)


def test_what_lies_within_bounds_stops_no_run() -> None:
    """Zeros where a sum cancels but for its roundings: a correct kernel may give them, and they tell little."""

    def summed_to_one(kind: str, call: MoeCall) -> Tensor:
        weights = call.token_final_scales
        return forward(replace(call, token_final_scales=weights / weights.sum(1, keepdim=True)))

    kernel = Kernel("it", ("moe",), whole_arguments, summed_to_one)
    cases = [GOLDENS.load(name) for name in ("finalize/biases_cancel", *[SMALL] * 4)]
    report = run(kernel, cases, Options(max_failures=1, repeat=False, diagnosis="quick"))
    assert [r.within_bounds for r in report.results] == [True, False, False, False]
    assert report.left == 1


def test_two_more_cases_may_fail_while_the_mistake_is_unknown() -> None:
    def unknown(kind: str, call: MoeCall) -> Tensor:
        return (forward(call).float().sin() * 3).to(torch.bfloat16).roll(7, 1)

    cases = [GOLDENS.load(SMALL)] * 5
    for name, diagnosis, count in (("unknown", "quick", 3), ("unknown", "none", 1), ("known", "quick", 1)):
        function = unknown if name == "unknown" else lambda kind, call: DEFECTS["last_slot_dropped"].run(call)
        kernel = Kernel("it", ("moe",), whole_arguments, function)
        options = Options(max_failures=1, repeat=False, diagnosis=diagnosis)
        assert len(run(kernel, cases, options).results) == count, (name, diagnosis)


@pytest.mark.usefixtures("copied_processes")
def test_a_kernel_may_skip_what_it_lacks() -> None:
    """When it is called; in a process of its own too, and only in a first run."""
    cases = [GOLDENS.load(name) for name in ("activation/alpha_alone", SMALL)]
    for isolate in (False, True):
        report = run("tests.helpers.kernels_under_test:without_alpha", cases, isolate=isolate)
        assert [(r.status, r.message) for r in report.results] == [("skipped", "no alpha"), ("equal", "")]
        assert report.ok
        assert report.skipped == "1 skipped by the kernel: no alpha"
        assert f"cases: 2 = 1 passed + 1 skipped; {report.skipped}" in str(report).splitlines()
    late = run(kernels_under_test.skips_later, cases[1:]).results[0]
    assert (late.status, late.message) == ("raised", "in a second run: Skip: later")
    refused = run(kernels_under_test.takes_no_alpha, cases[:1]).results[0]
    assert refused.status == "raised"
    assert 'raise mxfp4ref.conformance.Skip("no swiglu_alpha")' in refused.message


def test_report_tells_which_tiles_agree() -> None:
    case = GOLDENS.load("gemm/mirrored_hidden_1536")
    assert len(set(case.output_hashes.values())) == 3

    def other_tiles(**arguments: Any) -> Tensor:
        return kernels_under_test.good(**arguments, kernel=Sm90Kernel.of_tiles((512, 128)))

    assert run_case(load_kernel(other_tiles), case).tiles == ("512x128",)
    assert result_of("tests.helpers.kernels_under_test:good", case).tiles == ("128x128",)


def test_a_kernel_told_its_tiles_has_to_use_them() -> None:
    case = GOLDENS.load("gemm/mirrored_hidden_1536")

    def always_128(kind: str, call: Any) -> Any:
        return case.outputs[128, 128]

    kernel = Kernel("always_128", ("moe",), lambda kind, call: ((kind, call), {}), always_128, True)
    result = run_case(kernel, case, Options(diagnosis="none"))
    assert result.status == "differs"
    assert result.tiles == ("128x128",)


@pytest.mark.parametrize(
    ("name", "status", "message"),
    [
        ("raises", "raised", "RuntimeError: no kernel image is available"),
        ("other_shape", "wrong output", "expected bfloat16 [8, 128], got bfloat16 [8, 127]"),
        ("other_dtype", "wrong output", "got float32"),
        ("no_tensor", "wrong output", "got str"),
        ("writes_nothing", "not written", "wrote nothing"),
        (
            "writes_half",
            "not written",
            "all but 64 of 1,024 elements; the first element not written is [7, 0]",
        ),
        ("modifies_input", "input modified", "quant_scales[1] at"),
        ("unstable", "unstable", "1 other elements in output; at [0, 7]"),
    ],
)
def test_misbehaviour_is_reported_as_what_it_is(case: Case, name: str, status: str, message: str) -> None:
    assert list(case.outputs[128, 128].shape) == [8, 128]
    result = result_of(f"tests.helpers.kernels_under_test:{name}", case)
    assert (result.status, result.ok) == (status, False)
    assert message in result.message


def test_a_modified_input_does_not_spoil_the_next_case(case: Case) -> None:
    def spoiler(x: Tensor, *arguments: Any, **parameters: Any) -> Tensor:
        result = kernels_under_test.good_plain(x, *arguments, **parameters)
        x.zero_()
        return result

    prepare = load_kernel("plain:tests.helpers.kernels_under_test:good_plain").prepare
    plain = Kernel("spoiler", ("moe",), prepare, spoiler)
    assert run_case(plain, case).status == "input modified"
    assert result_of("oracle", case).status == "equal"


def test_a_hang_is_reported_and_the_rest_runs(case: Case) -> None:
    def hangs_once(**arguments: Any) -> Tensor:
        if torch.equal(arguments["input"], case.tensors["input"]):
            return kernels_under_test.hangs()
        return kernels_under_test.good(**arguments)

    other = GOLDENS.load("formats/every_code_by_row")
    report = run(hangs_once, [case, other], Options(timeout=0.5))
    assert [r.status for r in report.results] == ["timed out", "equal"]
    assert "no result within 0.5 s" in report.results[0].message


def test_an_abandoned_run_leaves_the_settings_alone(case: Case) -> None:
    """What the process has set since a run was given up stays as it is when that run's kernel returns after all."""
    go_on, runs = threading.Event(), []

    def late(**arguments: Any) -> Tensor:
        runs.append(threading.current_thread())
        go_on.wait()
        return kernels_under_test.good(**arguments)

    kernel = Kernel("late", ("moe",), load_kernel("tests.helpers.kernels_under_test:good").prepare, late)
    outcome = execute_within(0.1, kernel, ("moe", case.call(), {"output": case.outputs[128, 128]}))
    assert outcome.problem == "timed out"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        now = list(warnings.filters)
        torch.manual_seed(1)
        number = torch.get_rng_state()
        go_on.set()
        runs[0].join()
        assert warnings.filters == now
        assert torch.equal(torch.get_rng_state(), number)
    assert len(runs) == 1  # no second run


@pytest.mark.usefixtures("copied_processes")
def test_isolation_survives_a_hang(case: Case) -> None:
    report = run("tests.helpers.kernels_under_test:hangs", [case], Options(timeout=0.5), isolate=True)
    assert report.results[0].status == "timed out"
    assert "killed" in report.results[0].message


@pytest.mark.usefixtures("copied_processes")
def test_isolation_survives_a_crash(case: Case) -> None:
    other = GOLDENS.load("formats/every_code_by_row")
    report = run("tests.helpers.kernels_under_test:dies_once", [case, other], isolate=True)
    assert [r.status for r in report.results] == ["crashed", "equal"]
    assert "SIGABRT" in report.results[0].message


def test_torch_reference_fails_exact_and_passes_bounded() -> None:
    names = ["gemm/mirrored_hidden_384", "gemm/ordinary", "gemm/wide_exponents", "finalize/biases_cancel"]
    cases = [GOLDENS.load(name) for name in names]
    exact = run("torch-bf16", cases, Options(diagnosis="none"))
    assert not exact.ok
    bounded = run("torch-bf16", cases, Options(mode="bounded"))
    assert bounded.ok
    assert "within bounds" in {r.status for r in bounded.results}
    assert all(r.outside == 0 for r in bounded.results)


@pytest.mark.usefixtures("patient")
def test_bounded_catches_a_mistake(case: Case) -> None:
    report = run("defect:last_slot_dropped", [case], Options(mode="bounded", diagnosis="quick"))
    assert report.results[0].status == "outside bounds"
    assert report.defects == ("last_slot_dropped",)


def test_nothing_run_does_not_conform() -> None:
    report = run("torch-bf16", [GOLDENS.load("layout/swap_halves")])
    assert not report.ok
    assert report.verdict == "torch-bf16 ran on no case: 1 skipped, of kinds that it does not run."


@pytest.mark.parametrize("mode", ["exact", "bounded"])
def test_nothing_to_compare_does_not_conform(mode: Any, case: Case) -> None:
    """Cases of no tokens, and cases that hold no output at all."""
    stage = GOLDENS.load("activation/stage_plain")
    empty = {n: t[:0] if n in ("fc1_output", "activation") else t for n, t in stage.tensors.items()}
    report = run("oracle", [replace(stage, tensors=empty)], Options(mode=mode))
    assert not report.ok
    assert report.verdict == "oracle ran on 1 case without an element to compare: no verdict."
    assert run("oracle", [replace(stage, tensors=empty), stage], Options(mode=mode)).ok
    gemm = GOLDENS.load("gemm/every_tile_k")
    inputs = {n: t for n, t in gemm.tensors.items() if not n.startswith("accumulators")}
    for other in (replace(GOLDENS.load("gemm/ordinary"), output_tensors={}), replace(gemm, tensors=inputs)):
        with pytest.raises(
            GoldenError, match=f"{other.id}: expected an output of kind {other.kind} to compare"
        ):
            run("oracle", [other], Options(mode=mode))


def test_rows_that_no_kernel_writes_are_not_compared() -> None:
    case = GOLDENS.load("options/alltoall_foreign_tokens")
    written = int(case.call().written.sum())
    assert written < case.call().num_tokens
    (result,) = run("oracle", [case]).results
    assert result.elements == result.runs * written * case.call().experts.hidden_size


@pytest.mark.parametrize("error", [TypeError("argument is not iterable"), ValueError("b")])
@pytest.mark.parametrize("where", ["compare_case", "Failing.take", "Failing.verdict"])
def test_an_error_of_the_kit_is_not_the_callers(
    where: str, error: Exception, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any, **named: Any) -> Any:
        raise error

    monkeypatch.setattr(f"mxfp4ref.conformance.suite.{where}", broken)
    with pytest.raises(InternalError, match=f"{type(error).__name__}: {error}") as raised:
        run("oracle", [case])
    assert raised.value.__cause__ is error
    if type(error) is TypeError:
        result = CliRunner().invoke(commands, ["conform", "oracle", "--case", case.id])
        assert result.exit_code == 2
        assert "an error of mxfp4ref itself, no verdict; please report what stands above" in result.output


def test_arguments_are_checked(case: Case) -> None:
    with pytest.raises(ValueError, match="mode: expected one of"):
        Options(mode="loose")
    for number in (float("nan"), float("inf"), 0, -1, 1e10):  # a queue raises at the last
        with pytest.raises(ValueError, match="timeout: expected"):
            Options(timeout=number)
        with pytest.raises(ValueError, match="confidence: expected"):
            Options(confidence=number)
    for bounds in ({"storage": "bf16"}, {"confidence": 0.5}):  # would be ignored
        with pytest.raises(ValueError, match=f"{next(iter(bounds))}: expected mode bounded"):
            Options(**bounds)
        Options(mode="bounded", **bounds)
    with pytest.raises(ValueError, match="isolate: expected a kernel given by its name"):
        run(kernels_under_test.good, [case], isolate=True)


@pytest.mark.parametrize("mode", ["_Function", "_Dispatch"])
def test_an_import_that_leaves_a_mode_of_torch_is_refused(mode: str, tmp_path: Path) -> None:
    base = {"_Function": "torch.overrides.TorchFunctionMode"}.get(
        mode, "torch.utils._python_dispatch.TorchDispatchMode"
    )
    path = tmp_path / f"leaves{mode}.py"
    path.write_text(
        "import torch.overrides, torch.utils._python_dispatch\n"
        f"class {mode}({base}): pass\n"
        f"MODE = {mode}()\nMODE.__enter__()\ndef kernel(x, ids, scales, w1, s1, w2, s2): pass\n"
    )
    try:
        with pytest.raises(KernelError, match=f"left torch's mode {mode} switched on"):
            load_kernel_here(f"plain:{path}:kernel")
    finally:
        sys.modules[f"leaves{mode}"].MODE.__exit__(None, None, None)


def test_what_the_kit_writes_with_is_as_before_an_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else reports go elsewhere, maybe over other files, and nothing is printed."""
    path = tmp_path / "moves.py"
    path.write_text(
        "import io, os, sys\nos.chdir('/')\nos.umask(0o777)\nsys.stdout = io.StringIO()\n"
        "def kernel(x, ids, scales, w1, s1, w2, s2): pass\n"
    )
    monkeypatch.chdir(tmp_path)
    mask, stdout = os.umask(0o022), sys.stdout
    try:
        load_kernel_here(f"plain:{path}:kernel")
        assert (Path.cwd(), os.umask(0o022), sys.stdout) == (tmp_path, 0o022, stdout)
    finally:
        sys.stdout = stdout
        os.umask(mask)


def test_weights_are_not_taken_from_another_case_of_one_name() -> None:
    """The kernel's process generates those of a large case once for all of its runs."""
    large = GOLDENS.load(WHOLE_SIZE[0])
    name, recipe = next(iter(large.derived.items()))
    other = replace(large, derived={**large.derived, name: {**recipe, "seed": recipe["seed"] + 1}})
    biased = replace(large, tensors={**large.tensors, "fc2_biases": torch.zeros(1, 1)})
    assert _same_experts(large, replace(large, output_tensors={}))
    assert not _same_experts(large, other)
    assert not _same_experts(large, biased)


def test_progress_sees_each_result(case: Case) -> None:
    seen: list[CaseResult] = []
    run("oracle", [case], progress=seen.append)
    assert [r.case for r in seen] == [SMALL]
