"""The pytest plugin, run in pytest sessions of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mxfp4ref.conformance import diagnosing, memory
from mxfp4ref.conformance.cli import selecting
from mxfp4ref.conformance.isolation import worker
from mxfp4ref.conformance.kernels.adapters import KernelError
from mxfp4ref.conformance.reports import html_report
from mxfp4ref.goldens import Case, GoldenError, Goldens

pytest_plugins = ["pytester"]

ARGUMENTS = (
    "-p",
    "no:cacheprovider",
    "--mxfp4-case",
    "finalize/slot_order",
    "--mxfp4-case",
    "layout/swap_halves",
)

COPIED = ("-W", "ignore:Module already imported")  # a process that is a copy has imported the plugin


@pytest.fixture(autouse=True)
def _settings(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all sessions in here, whatever ini file a test writes: pytest-benchmark warns under pytest-xdist."""
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p no:benchmark")
    pytester.makeini("[pytest]\nfilterwarnings = error\n")


def test_collects_a_test_for_each_case(pytester: pytest.Pytester) -> None:
    result = pytester.runpytest("--mxfp4-kernel=oracle", "-v", *ARGUMENTS)
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["mxfp4::finalize/slot_order PASSED*", "mxfp4::layout/swap_halves PASSED*"])


@pytest.mark.usefixtures("patient")
def test_failure_is_the_diagnosis_and_other_kinds_are_skipped(pytester: pytest.Pytester) -> None:
    kernel = "--mxfp4-kernel=defect:last_slot_dropped"
    result = pytester.runpytest(kernel, "--mxfp4-diagnosis=quick", *ARGUMENTS)
    result.assert_outcomes(failed=1, skipped=1)
    result.stdout.fnmatch_lines(
        ["*slot_order: differs in *", "*last_slot_dropped predicts exactly these bits*"]
    )
    result.stdout.fnmatch_lines(
        [
            "  finding (every wrong bit): last_slot_dropped: *",
            "  first: output at [[]0, 0]: *",
            "  feeds it: input[[]0[]]: *",
            "  feeds it: slot 0: *",
            "  again: mxfp4ref conform defect:last_slot_dropped --case finalize/slot_order *",
            "*= mxfp4ref =*",
            "defect:last_slot_dropped does not conform: 1 of 1 case fails, of the goldens' *",
            "1 skipped, of kinds that it does not run.",
            "FAILED mxfp4::finalize/slot_order - differs in * of 1,024 elements*",
        ]
    )
    result.stdout.no_fnmatch_line("*Traceback*")


@pytest.mark.slow
@pytest.mark.usefixtures("patient")
def test_the_verdict_is_of_all_failures_together_as_in_conform(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no vote of what was found for each case by itself: here that is nothing."""
    monkeypatch.setattr(diagnosing, "diagnosed", lambda result, failed, diagnosis: result)
    cases = ("mxfp4::finalize/slot_order", "mxfp4::finalize/cancelling_experts")
    kernel = "--mxfp4-kernel=defect:bf16_finalize"
    result = pytester.runpytest(kernel, *cases)
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(["*2 of 2 cases fail*", "Every wrong bit is that of bf16_finalize: *"])
    result = pytester.runpytest(kernel, *cases, "--mxfp4-diagnosis=none")
    result.stdout.no_fnmatch_line("*Every wrong bit*")


@pytest.mark.usefixtures("copied_processes")
def test_a_kernel_that_cannot_be_loaded_is_told_and_nothing_else(pytester: pytest.Pytester) -> None:
    result = pytester.runpytest("--mxfp4-kernel=plain:nowhere:f", *ARGUMENTS)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "cannot import 'nowhere'" in (said := result.stdout.str() + result.stderr.str())
    assert "deselected" not in said


def test_ids_can_be_pasted_back(pytester: pytest.Pytester) -> None:
    """And then select that test and nothing else; as can those of the fixture, with brackets and slashes."""
    pytester.makepyfile(
        test_own="def test_other(): pass\n\ndef test_case(mxfp4_case): assert mxfp4_case.id\n"
    )
    kernel = "--mxfp4-kernel=oracle"
    result = pytester.runpytest("-v", kernel, "mxfp4::finalize/slot_order")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["*collected 1 item", "mxfp4::finalize/slot_order PASSED*"])
    result = pytester.runpytest("-v", "test_own.py::test_case[finalize/slot_order]")
    result.assert_outcomes(passed=1)
    result = pytester.runpytest(
        kernel, "mxfp4", "test_own.py::test_other", "--collect-only", "-q", *ARGUMENTS
    )
    assert [line for line in result.outlines if "::" in line] == [
        "test_own.py::test_other",
        "mxfp4::finalize/slot_order",
        "mxfp4::layout/swap_halves",
    ]
    wrong = {
        ("mxfp4::finalize/slot_ordr", kernel): "*slot_ordr: none of the * cases has that name; did you mean*",
        ("mxfp4::gemm/ordinary", kernel, *ARGUMENTS): "*none of the 2 cases of --mxfp4-case has that name*",
        ("mxfp4::gemm/ordinary",): "*mxfp4::...: expected --mxfp4-kernel=*",
    }
    for arguments, message in wrong.items():
        result = pytester.runpytest(*arguments)
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        result.stderr.fnmatch_lines([message])


def test_layers_that_may_not_fit_are_left_out_as_by_conform(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told with what runs them, which is their name."""
    monkeypatch.setattr(memory, "free", lambda: 1 << 20)
    pytester.makepyfile(where="def f(**arguments): raise ValueError\n")
    pytester.syspathinsert()
    kernel = ("--mxfp4-kernel=where:f", "--mxfp4-no-isolate", "--mxfp4-diagnosis=none")
    result = pytester.runpytest(*kernel, "-k", "slot_order or models", *ARGUMENTS[:2])
    assert result.parseoutcomes()["failed"] == 1
    left = "mxfp4::models/deepseek_v4_flash is left out: it may need * GiB and 0.0 GiB are free; that name runs it"
    result.stdout.fnmatch_lines([left])
    for named in ("mxfp4::models/deepseek_v4_flash", "--mxfp4-case=models/deepseek_v4_flash"):
        result = pytester.runpytest(*kernel, named, "--collect-only", "-q")
        assert "mxfp4::models/deepseek_v4_flash" in result.outlines


def test_how_long_it_takes_is_said_in_advance(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selecting, "_LONG", 0.01)
    result = pytester.runpytest("--mxfp4-kernel=oracle", *ARGUMENTS)
    result.stdout.fnmatch_lines(["collected 2 items", "2 cases take about 1 s"])


def test_last_failed(pytester: pytest.Pytester) -> None:
    arguments = ("--mxfp4-kernel=defect:last_slot_dropped", "--mxfp4-diagnosis=none", *ARGUMENTS[2:])
    pytester.runpytest(*arguments).assert_outcomes(failed=1, skipped=1)
    result = pytester.runpytest(*arguments, "--lf")
    result.assert_outcomes(failed=1, deselected=1)
    result.stdout.no_fnmatch_line("*finding*")


def test_a_kernel_that_ran_no_case_has_not_passed(pytester: pytest.Pytester) -> None:
    """As from `mxfp4ref conform`, also beside tests that pass."""
    pytester.makepyfile("def test_other(): pass")
    case = ("--mxfp4-case", "layout/swap_halves")
    result = pytester.runpytest("--mxfp4-kernel=defect:last_slot_dropped", *case)
    result.assert_outcomes(passed=1, skipped=1)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stdout.fnmatch_lines(
        [
            "defect:last_slot_dropped ran on no case: 1 skipped, of kinds that it does not run.",
            "ERROR: --mxfp4-kernel: none of the 1 cases of defect:last_slot_dropped ran on any element",
        ]
    )


@pytest.mark.parametrize("arguments", [("-k", "test_own"), ("--deselect=mxfp4",)])
def test_a_kernel_whose_cases_are_all_deselected_has_not_passed(
    pytester: pytest.Pytester, arguments: tuple[str, ...]
) -> None:
    """Another test passed, and so did the session; where the kernel is in the settings, it may be about others."""
    pytester.makepyfile("def test_own(): pass")
    kernel = "--mxfp4-kernel=defect:limit_ignored"
    result = pytester.runpytest(kernel, *arguments, *ARGUMENTS)
    result.assert_outcomes(passed=1, deselected=2)
    result.stdout.fnmatch_lines(["ERROR: --mxfp4-kernel: none ran, all were deselected"])
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    pytester.makeini(f"[pytest]\naddopts = {kernel} -p no:cacheprovider")
    result = pytester.runpytest(*arguments, *ARGUMENTS)
    assert result.ret == pytest.ExitCode.OK
    result.stdout.fnmatch_lines(["--mxfp4-kernel: none ran, all were deselected: no verdict on it"])
    pytester.makeini(f"[pytest]\naddopts = {kernel} {' '.join(arguments)} -p no:cacheprovider")
    result = pytester.runpytest(*ARGUMENTS)
    result.stdout.fnmatch_lines(["ERROR: --mxfp4-kernel: none ran, all were deselected"])
    assert result.ret == pytest.ExitCode.USAGE_ERROR


@pytest.mark.parametrize(
    ("hook", "code"),
    [
        ("pytest_runtest_call(item):\n    try:\n        yield\n    except Exception:\n        pass", 1),
        (
            "pytest_runtest_makereport(item, call):\n"
            "    report = yield\n    report.outcome = 'passed'\n    return report",
            1,
        ),
        ("pytest_runtest_setup(item):\n    item.add_marker(pytest.mark.xfail)\n    yield", 0),
        ("pytest_sessionfinish(session):\n    session.exitstatus = 0\n    yield", 1),
    ],
    ids=["swallowed", "passed", "expected", "exit code"],
)
def test_a_failure_that_another_plugin_overrules_is_one(
    pytester: pytest.Pytester, hook: str, code: int
) -> None:
    """As one does that runs a failing test until it passes; that a mark expects a failure is the user's word."""
    pytester.makeconftest(f"import pytest\n@pytest.hookimpl(wrapper=True)\ndef {hook}\n")
    result = pytester.runpytest(
        "--mxfp4-kernel=defect:last_slot_dropped",
        "--mxfp4-case=finalize/slot_order",
        "--mxfp4-diagnosis=none",
    )
    result.stdout.fnmatch_lines(["defect:last_slot_dropped does not conform: *"])
    assert result.ret == code


def test_cases_that_another_plugin_repeats_are_counted_once(pytester: pytest.Pytester) -> None:
    """As xdist's `--dist each` does; the verdict spoke of more cases than there are."""
    pytester.makeconftest("def pytest_collection_modifyitems(items): items *= 2\n")
    result = pytester.runpytest("--mxfp4-kernel=oracle", *ARGUMENTS)
    result.assert_outcomes(passed=4)
    result.stdout.fnmatch_lines(["oracle conforms: * in all 2 cases, *"])


def test_a_kernel_without_a_name_is_told(pytester: pytest.Pytester) -> None:
    """As of a variable that is not set, in CI; nothing was checked, with exit code 0."""
    pytester.makepyfile("def test(): ...")
    result = pytester.runpytest("--mxfp4-kernel=")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--mxfp4-kernel: expected a kernel, got nothing*"])


def test_a_damaged_golden_is_no_failure_of_the_kernel(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(goldens: Goldens, name: str) -> Case:
        raise GoldenError(f"{name}: damaged")

    monkeypatch.setattr(Goldens, "load", damaged)
    result = pytester.runpytest("--mxfp4-kernel=oracle", *ARGUMENTS)
    result.assert_outcomes(failed=2)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    pytester.makepyfile("def test_own(): assert False")
    assert pytester.runpytest("--mxfp4-kernel=oracle", *ARGUMENTS).ret == pytest.ExitCode.TESTS_FAILED


@pytest.mark.parametrize("marked", [1, 2])
def test_a_kernel_whose_cases_a_mark_skips_has_not_passed(pytester: pytest.Pytester, marked: int) -> None:
    pytester.makeconftest(
        "import pytest\n"
        "def pytest_collection_modifyitems(items):\n"
        f"    for item in items[:{marked}]: item.add_marker(pytest.mark.skip(reason='not today'))\n"
    )
    result = pytester.runpytest(
        "--mxfp4-kernel=oracle", "--mxfp4-case=finalize/slot_order", "--mxfp4-case=layout/swap_halves"
    )
    result.assert_outcomes(skipped=marked, passed=2 - marked)
    if marked == 1:
        assert result.ret == pytest.ExitCode.OK
        result.stdout.fnmatch_lines(
            ["oracle conforms: * in the one case that ran*", "1 skipped before they ran."]
        )
    else:
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        result.stdout.fnmatch_lines(["ERROR: --mxfp4-kernel: none ran, 2 were skipped before"])


def test_keyword_expression_and_junit(pytester: pytest.Pytester) -> None:
    result = pytester.runpytest("--mxfp4-kernel=oracle", "-k", "swap", "--junitxml=junit.xml", *ARGUMENTS)
    result.assert_outcomes(passed=1, deselected=1)
    result.stdout.fnmatch_lines(
        ["collected 2 items / 1 deselected / 1 selected", "*in the one case that ran, of*"]
    )
    assert 'name="layout/swap_halves"' in (pytester.path / "junit.xml").read_text()


def test_xdist_with_ids_and_a_report(pytester: pytest.Pytester) -> None:
    pytest.importorskip("xdist")
    ids = ("mxfp4::routing/mixtral_ties", "mxfp4::layout/swap_halves")
    kernel = ("--mxfp4-kernel=defect:renorm_missing", "--mxfp4-diagnosis=quick")
    arguments = (*kernel, "-n", "1", "--mxfp4-html=r.html", *ids)
    result = pytester.runpytest_inprocess(*arguments)
    result.assert_outcomes(failed=1, skipped=1)
    result.stdout.fnmatch_lines(["*Every wrong bit is that of renorm_missing*", "report: *r.html"])
    result.stdout.fnmatch_lines(["FAILED mxfp4::routing/mixtral_ties - differs in *"])
    html = (pytester.path / "r.html").read_text()
    assert "Every wrong bit is that of renorm_missing" in html
    assert "Map of routing/mixtral_ties" in html
    assert re.search(rf">pytest .*{re.escape(' '.join(arguments))}<", html)


def test_the_report_says_how_pytest_ran(pytester: pytest.Pytester) -> None:
    """By all that it was given, and how the command runs one case so."""
    arguments = ("--mxfp4-kernel=defect:last_slot_dropped", "--mxfp4-diagnosis=quick", "--mxfp4-html=r.html")
    pytester.runpytest(*arguments, "--mxfp4-case=finalize/slot_*")
    html = (pytester.path / "r.html").read_text()
    assert f" {' '.join(arguments)} &#39;--mxfp4-case=finalize/slot_*&#39;" in html
    case = "--case finalize/slot_order --dump reproducers"
    assert f"mxfp4ref conform defect:last_slot_dropped {case}" in html


@pytest.mark.parametrize("name", ["kernel.py", "test_of_mine.py", ""])
def test_a_report_in_place_of_an_input(pytester: pytest.Pytester, name: str) -> None:
    pytester.makepyfile(kernel="def f(**arguments): ...", test_of_mine="def test(): ...")
    before = {path: path.read_bytes() for path in pytester.path.glob("*.py")}
    pytester.syspathinsert()
    arguments = ("--mxfp4-kernel=kernel:f", f"--mxfp4-html={name}", "test_of_mine.py::test", *ARGUMENTS)
    result = pytester.runpytest(*arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*--mxfp4-html: *{name}: expected *"])
    assert before == {path: path.read_bytes() for path in pytester.path.glob("*.py")}


def test_a_report_that_cannot_be_written(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is told before the kernel runs, or else costs neither the verdict nor the others' results."""
    result = pytester.runpytest("--mxfp4-kernel=oracle", "--mxfp4-html=none/r.html", *ARGUMENTS)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--mxfp4-html: *there is no folder*"])

    def broken(*arguments: object) -> None:
        raise OSError("No space left")

    monkeypatch.setattr(html_report, "to_html", broken)
    result = pytester.runpytest("--mxfp4-kernel=oracle", "--mxfp4-html=r.html", *ARGUMENTS)
    result.assert_outcomes(passed=2)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stdout.fnmatch_lines(
        ["oracle conforms*", "ERROR: *r.html could not be written: OSError: No space*"]
    )


def test_isolation(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in can be isolated, and a kernel can be run here, whose process is then pytest's."""
    pytester.makepyfile(where="import os\n\ndef f(**arguments): raise ValueError(f'in {os.getpid()}')\n")
    pytester.syspathinsert()
    result = pytester.runpytest("--mxfp4-kernel=where:f", "--mxfp4-no-isolate", *ARGUMENTS)
    result.assert_outcomes(failed=1, skipped=1)
    result.stdout.fnmatch_lines([f"*slot_order: raised: ValueError: in {os.getpid()} (*"])

    def isolated(*arguments: object) -> None:
        raise KernelError(f"isolated {arguments[0]}")

    monkeypatch.setattr(worker, "Worker", isolated)
    result = pytester.runpytest("--mxfp4-kernel=oracle", "--mxfp4-isolate", *ARGUMENTS)
    result.stderr.fnmatch_lines(["ERROR: isolated oracle"])


def test_exit_first_stops_at_the_first_failure(pytester: pytest.Pytester) -> None:
    """What was chosen and not run is counted as that, and the verdict says what it was judged from."""
    cases = ("finalize/slot_order", "finalize/unusual_weights", "layout/swap_halves")
    chosen = [f"--mxfp4-case={name}" for name in cases]
    arguments = (
        "--mxfp4-kernel=defect:last_slot_dropped",
        "--mxfp4-diagnosis=none",
        "--mxfp4-html=r.html",
        "-x",
    )
    result = pytester.runpytest("-p", "no:cacheprovider", *arguments, *chosen)
    assert result.parseoutcomes()["failed"] == 1
    result.stdout.fnmatch_lines(["Judged from the one case that failed; 1 other case not run may tell more."])
    html = (pytester.path / "r.html").read_text()
    assert " = 1 failed + 1 not run + 1 not run, of other kinds + " in html


def test_fixtures(pytester: pytest.Pytester) -> None:
    """As docs/ci.md shows them, over a case of a call and one of another kind; and what a difference says."""
    page = (Path(__file__).parents[2] / "docs" / "ci.md").read_text(encoding="utf-8")
    (example,) = (
        code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "mxfp4_oracle" in code
    )
    difference = """
def test_difference(assert_bits_equal):
    assert_bits_equal(torch.tensor([1.0, 0.0]), torch.tensor([1.0, -0.0]))
"""
    pytester.makepyfile(example + difference)
    result = pytester.runpytest(*ARGUMENTS)
    result.assert_outcomes(passed=2, skipped=1, failed=1)
    result.stdout.fnmatch_lines(
        ["*1 of 2 elements differ; first at *1*: got 0x00000000*expected 0x80000000*0 ulp*"]
    )
    wrong = example.replace("[0]", "[0].neg()", 1)
    assert wrong != example
    pytester.makepyfile(wrong)
    pytester.runpytest(*ARGUMENTS).assert_outcomes(passed=1, skipped=1, failed=1)


@pytest.mark.usefixtures("copied_processes")
def test_a_kernel_that_ends_its_process_fails(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(ends="import os\n\ndef f(**arguments): os._exit(0)\n")
    pytester.syspathinsert()
    result = pytester.runpytest("--mxfp4-kernel=ends:f", *ARGUMENTS)
    result.assert_outcomes(failed=1, skipped=1)
    result.stdout.fnmatch_lines(["*slot_order: crashed: *ended without a result: exit code 0*"])


@pytest.mark.usefixtures("copied_processes")
def test_a_kernel_that_ends_pytests_own_process_fails(
    pytester: pytest.Pytester, capfd: pytest.CaptureFixture[str]
) -> None:
    pytester.makepyfile(ends="import os\n\ndef f(**arguments): os._exit(0)\n")
    arguments = ["--mxfp4-kernel=ends:f", *COPIED, "--mxfp4-no-isolate", *ARGUMENTS]
    assert pytest.main(arguments) == pytest.ExitCode.TESTS_FAILED
    words = "The kernel does not conform: it ended its process (exit code 0) before"
    assert capfd.readouterr().err.startswith(words)


@pytest.mark.slow
@pytest.mark.usefixtures("copied_processes")
def test_a_session_that_is_watched_ends_as_one_that_is_not(pytester: pytest.Pytester) -> None:
    """With its exit code and its output."""
    pytester.makepyfile(raises="import os\n\ndef f(**arguments): raise ValueError(os.getppid())\n")
    arguments = (*COPIED, "--mxfp4-no-isolate", *ARGUMENTS)
    result = pytester.runpytest_subprocess("--mxfp4-kernel=raises:f", *arguments)
    result.assert_outcomes(failed=1, skipped=1)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert "ended its process" not in result.stderr.str()


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


@pytest.mark.parametrize("how", ["lost", "interrupted"])
def test_no_verdict_without_every_result(pytester: pytest.Pytester, how: str) -> None:
    """The other cases conform, which says nothing of one that pytest has no result of."""
    pytester.makeconftest(
        "import os, pytest\n"
        "def pytest_runtest_setup(item):\n"
        "    if item.name == 'sizes/eight_slots':\n"
        + ("        raise RuntimeError\n" if how == "lost" else "        raise KeyboardInterrupt\n")
    )
    chosen = ("--mxfp4-case=finalize/slot_order", "--mxfp4-case=sizes/eight_slots")
    arguments = ("--mxfp4-kernel=oracle", *chosen, "--mxfp4-html=report.html")
    result = pytester.runpytest_inprocess(*arguments, no_reraise_ctrlc=True)
    assert result.ret == (
        pytest.ExitCode.INTERRUPTED if how == "interrupted" else pytest.ExitCode.TESTS_FAILED
    )
    result.stdout.fnmatch_lines(["oracle: interrupted, no verdict; 0 of 1 case failed, of the goldens' *"])
    assert "conforms" not in (pytester.path / "report.html").read_text()


@pytest.mark.parametrize("skipped", ["mxfp4", "gemm/ordinary"])
@pytest.mark.parametrize("hook", ["protocol", "call"])
def test_tests_that_another_plugin_takes_over_have_no_result(
    pytester: pytest.Pytester, skipped: str, hook: str
) -> None:
    pytester.makeconftest(
        "import pytest\n"
        "@pytest.hookimpl(tryfirst=True)\n"
        "def pytest_runtest_protocol(item):\n"
        f"    if {skipped!r} in item.nodeid:\n"
        + ("        return True\n" if hook == "protocol" else "        item.runtest = lambda: None\n")
    )
    chosen = ("--mxfp4-case=finalize/slot_order", "--mxfp4-case=gemm/ordinary")
    result = pytester.runpytest("--mxfp4-kernel=oracle", *chosen)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    if skipped == "mxfp4":
        result.stdout.fnmatch_lines(["ERROR: --mxfp4-kernel: 2 without a result, none with one"])
    else:
        result.stdout.fnmatch_lines(
            ["oracle: interrupted, no verdict; 0 of 1 case failed*", "1 without a result."]
        )
    result.stdout.no_fnmatch_line("oracle conforms*")


def test_a_session_that_is_ended_by_sigterm_has_a_verdict_and_a_report(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(
        "import signal\n"
        "def pytest_runtest_logfinish(nodeid):\n"
        "    if nodeid.startswith('mxfp4::'):\n"
        "        signal.raise_signal(signal.SIGTERM)\n"
    )
    before = signal.getsignal(signal.SIGTERM)
    result = pytester.runpytest("--mxfp4-kernel=oracle", "--mxfp4-html=r.html", *ARGUMENTS)
    assert signal.getsignal(signal.SIGTERM) is before
    assert result.ret == 128 + signal.SIGTERM
    result.stdout.fnmatch_lines(["*oracle: interrupted, no verdict; 0 of 1 case failed*"])
    assert "interrupted, no verdict" in (pytester.path / "r.html").read_text()


@pytest.mark.usefixtures("copied_processes")
def test_a_long_case_is_told_on_stderr(pytester: pytest.Pytester) -> None:
    """Past pytest's capture; the silence is made short, the case is as long as it is."""
    pytester.makeconftest("from mxfp4ref.conformance import heartbeat\nheartbeat.SILENCE = 0.001\n")
    result = pytester.runpytest_subprocess("--mxfp4-kernel=oracle", *COPIED, *ARGUMENTS)
    result.assert_outcomes(passed=2)
    assert "s] mxfp4::finalize/slot_order" in result.stderr.str()
