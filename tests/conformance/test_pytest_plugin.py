"""The pytest plugin, run in pytest sessions of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest_plugins = ["pytester"]

ARGUMENTS = (
    "-p",
    "no:cacheprovider",
    "--mxfp4-case",
    "finalize/slot_order",
    "--mxfp4-case",
    "layout/swap_halves",
)


@pytest.fixture(autouse=True)
def _ini(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\nfilterwarnings = error\n")


def test_collects_a_test_for_each_case(pytester: pytest.Pytester) -> None:
    result = pytester.runpytest("--mxfp4-kernel=oracle", "-v", *ARGUMENTS)
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["mxfp4::finalize/slot_order PASSED*", "mxfp4::layout/swap_halves PASSED*"])


def test_failure_is_the_diagnosis_and_other_kinds_are_skipped(pytester: pytest.Pytester) -> None:
    result = pytester.runpytest("--mxfp4-kernel=defect:last_slot_dropped", *ARGUMENTS)
    result.assert_outcomes(failed=1, skipped=1)
    result.stdout.fnmatch_lines(
        ["*slot_order: differs in *", "*last_slot_dropped predicts exactly these bits*"]
    )
    result.stdout.no_fnmatch_line("*Traceback*")


@pytest.mark.parametrize("where", [(), ("-n", "1")])
def test_a_kernel_that_ran_no_case_has_not_passed(pytester: pytest.Pytester, where: tuple[str, ...]) -> None:
    """As from `mxfp4ref conform`, also beside tests that pass."""
    if where:
        pytest.importorskip("xdist")
    pytester.makepyfile("def test_other(): pass")
    case = ("--mxfp4-case", "layout/swap_halves")
    result = pytester.runpytest("--mxfp4-kernel=defect:last_slot_dropped", *case, *where)
    result.assert_outcomes(passed=1, skipped=1)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stdout.fnmatch_lines(["*none of the 1 cases is of a kind that defect:last_slot_dropped runs"])


def test_keyword_expression_and_junit(pytester: pytest.Pytester) -> None:
    result = pytester.runpytest("--mxfp4-kernel=oracle", "-k", "swap", "--junitxml=junit.xml", *ARGUMENTS)
    result.assert_outcomes(passed=1, deselected=1)
    assert 'name="layout/swap_halves"' in (pytester.path / "junit.xml").read_text()


def test_xdist(pytester: pytest.Pytester) -> None:
    pytest.importorskip("xdist")
    result = pytester.runpytest("--mxfp4-kernel=oracle", "-n", "2", *ARGUMENTS)
    result.assert_outcomes(passed=2)


def test_exit_first_stops_at_the_first_failure(pytester: pytest.Pytester) -> None:
    arguments = ("--mxfp4-kernel=defect:last_slot_dropped", "-x", "--mxfp4-case", "finalize/*")
    result = pytester.runpytest("-p", "no:cacheprovider", *arguments)
    assert result.parseoutcomes()["failed"] == 1


def test_fixtures(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import torch

        def test_case(mxfp4_case, mxfp4_oracle, assert_bits_equal):
            if mxfp4_case.kind != "moe":
                return
            call = mxfp4_case.call()
            got = mxfp4_oracle(
                call.input, call.token_selected_experts, call.token_final_scales,
                mxfp4_case.tensors["fc1_weights_sm90"], mxfp4_case.tensors["fc2_weights_sm90"], torch.bfloat16,
                [mxfp4_case.tensors["fc1_scales_sm90"], mxfp4_case.tensors["fc2_scales_sm90"]],
                use_w4_group_scaling=True,
            )[0]
            assert_bits_equal(got, mxfp4_case.outputs[128, 128])

        def test_difference(assert_bits_equal):
            assert_bits_equal(torch.tensor([1.0, 0.0]), torch.tensor([1.0, -0.0]))
        """
    )
    result = pytester.runpytest(*ARGUMENTS)
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(
        ["*1 of 2 elements differ; first at *1*: got 0x00000000*expected 0x80000000*0 ulp*"]
    )


@pytest.mark.usefixtures("copied_processes")
def test_a_kernel_that_ends_its_process_fails(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(ends="import os\n\ndef f(**arguments): os._exit(0)\n")
    pytester.syspathinsert()
    result = pytester.runpytest("--mxfp4-kernel=ends:f", *ARGUMENTS)
    result.assert_outcomes(failed=1, skipped=1)
    result.stdout.fnmatch_lines(["*slot_order: crashed: *ended without a result: exit code 0*"])


@pytest.mark.usefixtures("copied_processes")
def test_wrong_usage_is_an_error_in_words(pytester: pytest.Pytester) -> None:
    result = pytester.runpytest("--mxfp4-kernel=oracle", "--mxfp4-case", "nosuch/*")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*nosuch/* matches none of*"])
    result = pytester.runpytest("--mxfp4-kernel=oracle", "--mxfp4-goldens", str(pytester.path))
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result = pytester.runpytest("--mxfp4-kernel=no.such:kernel", *ARGUMENTS)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*cannot import 'no.such'*"])
    result = pytester.runpytest("--mxfp4-kernel=no.such:kernel", *ARGUMENTS, "--mxfp4-timeout=inf")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*timeout: expected*"])


def test_plugin_does_not_import_torch() -> None:
    code = "import sys, mxfp4ref.conformance.pytest_plugin; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
