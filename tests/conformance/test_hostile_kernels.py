"""Kernels that do what no kernel should: what has to be reported of each, isolated and in this process.

They share a process as long as they leave it alive, and run on the smallest golden case.
"""

from __future__ import annotations

import ctypes
import errno
import io
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext, redirect_stderr
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from mxfp4ref import forward
from mxfp4ref.conformance import (
    CaseResult,
    Kernel,
    KernelError,
    Options,
    Report,
    load_kernel,
    memory,
    run,
    run_case,
    running,
)
from mxfp4ref.conformance.cli.conform import _Selection
from mxfp4ref.conformance.isolation import crash_dumps, kernel_process
from mxfp4ref.conformance.isolation import worker as worker_module
from mxfp4ref.conformance.isolation.alone import Alone
from mxfp4ref.conformance.isolation.execution import Outcome, execute
from mxfp4ref.conformance.isolation.interference import interference
from mxfp4ref.conformance.isolation.surroundings import surroundings
from mxfp4ref.conformance.isolation.worker import Worker
from mxfp4ref.conformance.kernels.adapters import whole_arguments
from mxfp4ref.conformance.reports.html_report import to_html
from mxfp4ref.conformance.reports.report import to_json, to_junit
from mxfp4ref.conformance.reports.report_text import to_text
from mxfp4ref.goldens import Case, GoldenError, open_goldens
from mxfp4ref.goldens.runs import Run
from tests.helpers import forked, hostile_kernels, usual
from tests.helpers.commands import exit_code
from tests.helpers.hostile_files import CHECKOUT, copy_goldens

GOLDENS = open_goldens()
SPEC = "tests.helpers.hostile_kernels:chosen"
OPTIONS = Options(timeout=30, diagnosis="none")
QUICK = Options(timeout=1, diagnosis="none")
ONCE = Options(timeout=30, diagnosis="none", repeat=False)

PUT_BACK = "which was put back"
# What a kernel does; the status; words of the message. The same, isolated or not.
EVERYWHERE = [
    ("right", "equal", ""),
    ("wrong", "differs", ""),
    # What is returned
    ("output_and_none", "equal", ""),
    ("list_as_flashinfer", "equal", ""),
    ("pair_of_tensors", "wrong output", "output: expected it alone or first, with nothing but None"),
    ("output_and_text", "wrong output", "got str after it"),
    ("empty_list", "wrong output", "output: expected a tensor, got an empty list"),
    ("generator", "wrong output", "got generator"),
    ("meta", "wrong output", "got a meta bfloat16 [8, 128] tensor"),
    ("sparse", "wrong output", "got a sparse_coo bfloat16 [8, 128] tensor"),
    ("nested", "wrong output", "got a nested tensor"),
    ("quantized", "wrong output", "got a quantized qint8 [8, 128] tensor"),
    ("fake", "wrong output", "got a"),
    ("without_memory", "wrong output", "got a bfloat16 [8, 128] tensor without the memory for it"),
    ("beyond_its_memory", "wrong output", "without the memory for it"),
    ("negated", "wrong output", "got a lazily negated"),
    ("wrapper", "wrong output", "without the memory for it"),
    ("pretender", "wrong output", "got _Pretender"),
    ("lying_mapping", "raised", "KeyboardInterrupt"),
    ("mapping_with_more", "equal", ""),
    ("mapping_without_output", "wrong output", "expected the key output, got a mapping with out"),
    ("integers", "wrong output", "expected bfloat16 [8, 128], got int16 [8, 128]"),
    ("vast", "wrong output", "got bfloat16 [1048576, 1048576]"),
    ("no_elements", "wrong output", "got bfloat16 [0, 128]"),
    ("meta_intermediates", "wrong output", "activation: expected a tensor, got a meta float32 [3] tensor"),
    ("odd_intermediates", "differs", ""),
    (
        "vast_intermediates",
        "wrong output",
        "activation: expected at most 1,073,741,824 bytes, got float32 [1048576, 4096] of 17,179,869,184",
    ),
    ("parameter", "equal", ""),
    ("transposed", "equal", ""),
    ("of_inference_mode", "equal", ""),
    ("resized_output", "wrong output", "got bfloat16 [2, 128]"),
    ("writes_other_bits_into_output", "wrong output", "wrote other bits into that one"),
    ("writes_a_row_into_output", "wrong output", "wrote other bits into that one"),
    ("copies_into_output_and_returns_its_own", "equal", ""),
    ("puts_output_elsewhere", "wrong output", "views of it see nothing of the result"),
    (
        "wants_gradient_of_output",
        "wrong output",
        "to bfloat16 [8, 128], strides [128, 1], requires a gradient",
    ),
    (
        "clears_what_it_returned_before",
        "unstable",
        "output, of run 1 of 2, was changed after it had been returned",
    ),
    ("returns_a_buffer_of_its_own", "equal", ""),
    ("writes_whole_tiles", "wrong output", "wrote behind the end of the tensor that it was given"),
    ("poison", "not written", "wrote nothing"),
    ("not_a_number", "differs", ""),
    # What lies
    ("lying_subclass", "differs", ""),
    ("leaves_function_mode", "differs", ""),
    ("leaves_dispatch_mode", "differs", ""),
    ("overwrites_every_tensor", "differs", ""),
    # What becomes of the inputs
    (
        "writes_second_time",
        "input modified",
        "in a second run: the kernel changed fc1_expert_weights at [0, 0",
    ),
    (
        "reshapes_input",
        "input modified",
        "input from bfloat16 [8, 128], strides [128, 1] to bfloat16 [4, 256]",
    ),
    (
        "turns_input",
        "input modified",
        "token_final_scales from float32 [8, 4], strides [4, 1] to float32 [4, 8]",
    ),
    ("puts_an_input_elsewhere", "input modified", "changed input, which lies elsewhere in memory now"),
    ("shrinks_memory_of_input", "input modified", "without the memory for it"),
    ("swaps_data_of_input", "input modified", "token_final_scales at [0, 0]"),
    ("wants_gradient_of_input", "input modified", "requires a gradient"),
    (
        "clears_list_of_scales",
        "input modified",
        "quant_scales[0], which is gone; quant_scales[1], which is gone",
    ),
    ("adds_scales", "input modified", "the kernel changed quant_scales[2], which is new"),
    ("returns_overwritten_input", "input modified", "input at [0, 0]"),
    ("nan_of_another_payload", "input modified", "token_final_scales at [0, 0]"),
    # What is raised
    ("mute_exception", "raised", "_Mute: (its text cannot be had)"),
    ("system_exit", "raised", "SystemExit: 0"),
    ("keyboard_interrupt", "raised", "KeyboardInterrupt"),
    ("generator_exit", "raised", "GeneratorExit"),
    ("exception_without_traceback", "raised", "_WithoutTraceback: its own words"),
    ("nameless_exception", "raised", "_Nameless: nothing"),
    ("self_raising", "raised", "RuntimeError: its own cause"),
    ("raises_from", "raised", "; its cause: ValueError: what it came from"),
    ("raises_a_group", "raised", "; the first of them: ValueError: the first"),
    ("recursion", "raised", "RecursionError"),
    ("out_of_memory", "raised", "MemoryError"),
    ("kit_skip", "skipped", "this one is not for me"),
    ("long_text", "raised", "[... 49,998,000 characters ...]"),
    ("odd_text", "raised", r"\x1b[2J\x1b]0;t\x07 \ud800 \u202e \x00 \x9b31m \ufffe"),
    ("raises_second_time", "raised", "in a second run: RuntimeError: only now"),
    ("wrong_second_time", "unstable", "1 other elements in output; at [3, 5]"),
    # What is left behind
    ("default_dtype", "equal", f"torch's default dtype, {PUT_BACK}"),
    ("default_device", "equal", ""),
    ("grad_and_inference_mode", "equal", ""),
    ("deterministic", "equal", "the kernel changed torch's deterministic mode"),
    ("prints_and_logs_its_way", "equal", f"torch's print options, torch's repeated warnings, {PUT_BACK}"),
    ("working_directory", "equal", f"the working directory, {PUT_BACK}"),
    ("environment", "equal", f"the environment, {PUT_BACK}"),
    ("modules", "equal", "sys.modules['"),
    ("standard_streams", "equal", f"sys.stdout, sys.stderr, {PUT_BACK}"),
    ("redirected_streams", "equal", f"the file of stdout, the file of stderr, {PUT_BACK}"),
    ("replaced_builtins", "equal", f"Python's builtins, {PUT_BACK}"),
    ("recursion_limit", "equal", f"the recursion limit, {PUT_BACK}"),
    ("strict_warnings", "equal", ""),
    ("random_numbers", "equal", ""),
    ("rounding_mode", "equal", ""),
    (
        "rounding_mode_for_good",
        "raised",
        "in a second run: RuntimeError: rounding mode: expected the CPU to round",
    ),
    ("trace_function", "equal", ""),
    (
        "functions_of_threads",
        "equal",
        f"threads' trace function, threads' profile function, {PUT_BACK}",
    ),
    ("imports_and_warnings", "equal", ""),
    ("tiny_threads", "equal", f"threads' stack size, sys.executable, {PUT_BACK}"),
    ("clocks", "equal", f"time.time, time.monotonic, time.perf_counter, {PUT_BACK}"),
    ("alarm", "equal", f"the timers, {PUT_BACK}"),
    (
        "functions_of_python",
        "equal",
        "json.dumps, os.write, pickle.load and ",
    ),
    (
        "methods_of_json_and_functions_of_re",
        "equal",
        f"JSONDecoder.decode, re.search, re.compile, {PUT_BACK}",
    ),
    ("folder_of_temporary_files", "equal", ""),
    ("replaces_what_reads_goldens", "differs", f"safetensors.torch.load, {PUT_BACK}"),
    (
        "garbage_collection",
        "equal",
        "garbage collection's thresholds, garbage collection's callbacks, sys.unraisablehook",
    ),
    ("settings_of_arithmetic", "equal", "the digits of an int"),
    ("slow_switches", "equal", f"the switch interval, garbage collection's debugging, {PUT_BACK}"),
    ("least_of_memory_and_files", "equal", f"the limits of resources, {PUT_BACK}"),
    ("thread_that_goes_on", "equal", ""),
    ("forks_and_both_return", "equal", ""),
]
# What replaces functions of this process, which is not where an isolated kernel runs.
REPLACING = [
    ("replaces_not_equal", "Tensor.__ne__"),
    ("replaces_differing", "mxfp4ref.conformance.running.differing"),
    ("replaces_what_is_remembered", "mxfp4ref.conformance.running.differing"),
    ("replaces_code_of_differing", "mxfp4ref.conformance.comparison.differing"),
    ("replaces_comparison_of_bytes", "mxfp4ref.conformance.isolation.plain.raw_bytes"),
    ("replaces_what_passes", "mxfp4ref.conformance.results.PASSING"),
    ("replaces_what_is_held_by_a_constant", "mxfp4ref.conformance.comparison._INTEGERS"),
    ("empties_a_module_of_the_kit", "mxfp4ref.conformance.running.__name__"),
    ("replaces_an_operator_of_torch", "torch's operator aten/cosh/CPU"),
    ("replaces_expected_outputs", "Case.outputs"),
    ("hides_a_field", "CaseResult.status"),
    ("hides_a_builtin", "mxfp4ref.conformance.running.max"),
]
# What ends or blocks the process that it runs in.
ENDING = [
    ("exits", "crashed", "ended without a result: exit code 0"),
    ("exits_in_c", "crashed", "ended without a result: exit code 0"),
    ("killed_by_real_time_signal", "crashed", "signal 44"),
    (
        "segmentation_fault",
        "crashed",
        "signal SIGSEGV (",
    ),
    ("never_gives_up_the_lock", "timed out", "no result within 1 s; its process was killed"),
    ("stops_itself", "timed out", "no result within 1 s; its process was killed"),
    ("floods_and_dies", "crashed", "in floods_and_dies); the last it printed: "),
    ("waits_for_no_pipe", "equal", ""),
    ("closes_everything", "crashed", "ended without a result"),
    ("puts_a_file_in_place_of_the_pipe", "crashed", "ended without a result: exit code 1"),
    ("writes_into_every_pipe", "crashed", "wrote something else into the pipe to the kit"),
    ("forges_a_result", "crashed", "wrote something else into the pipe to the kit"),
    ("forks_and_the_copy_returns", "crashed", "ended without a result: exit code 0"),
    ("hangs_when_deleted", "timed out", "no result within 1 s"),
]
SAFE_CONTROLS = "\n\t"


@pytest.fixture
def case() -> Case:
    return GOLDENS.load("finalize/slot_order")


@pytest.fixture(scope="module")
def choice(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The file that names the kernel to run."""
    with pytest.MonkeyPatch.context() as patch:
        file = tmp_path_factory.mktemp("hostile") / "chosen"
        patch.setenv(hostile_kernels.CHOSEN, str(file))
        yield file


@pytest.fixture(scope="module")
def worker(choice: Path) -> Iterator[Worker]:
    with pytest.MonkeyPatch.context() as patch:  # for this process only: some tests need fresh ones
        patch.setattr(subprocess, "Popen", forked.ForkingPopen)
        process = Worker(SPEC)
    with process:
        yield process


def isolated(name: str, case: Case, choice: Path, worker: Worker, options: Options = OPTIONS) -> CaseResult:
    choice.write_text(name)
    return run_case(worker.kernel, case, options, worker=worker)


def assert_reported(result: CaseResult, status: str, message: str) -> None:
    assert (result.status, message in result.message) == (status, True), f"{result.status}: {result.message}"
    assert bool(result.message) == bool(message), result.message
    assert len(result.message) < 5000
    assert result.message.isprintable()


def assert_renders(result: CaseResult) -> None:
    """Every format holds it, as one that can be read back, and without what a terminal would obey."""
    report = Report("kernel", "exact", (result,))
    texts = [to_text(report, verbose=True), to_json(report), to_junit(report), to_html(report)]
    for text in texts:
        text.encode("utf-8")
        assert [c for c in text if not c.isprintable() and c not in SAFE_CONTROLS] == []
    assert json.loads(texts[1])["results"][0]["message"] == result.message
    ElementTree.fromstring(texts[2].encode())
    assert "evil conforms: it equals all" not in texts[0].splitlines()


@pytest.mark.usefixtures("copied_processes")
@pytest.mark.parametrize(("name", "status", "message"), EVERYWHERE)
def test_isolated(name: str, status: str, message: str, case: Case, choice: Path, worker: Worker) -> None:
    result = isolated(name, case, choice, worker)
    assert_reported(result, status, message)
    if status not in ("equal", "differs"):
        assert_renders(result)
    assert isolated("wrong", case, choice, worker, ONCE).differing == 1  # nothing is left behind


def in_this_process() -> Iterator[Any]:
    """Without isolation as well; what is returned and raised is looked at by the same code, and three of each do."""
    seen: Counter[str] = Counter()
    for one in EVERYWHERE:
        seen[one[1]] += 1
        often = one[1] in ("wrong output", "raised") and seen[one[1]] > 3
        yield pytest.param(*one, marks=pytest.mark.slow if often else ())


@pytest.mark.parametrize(("name", "status", "message"), [*in_this_process()])
def test_in_this_process(name: str, status: str, message: str, case: Case) -> None:
    before = torch.get_default_dtype(), os.environ.copy(), os.getcwd(), torch.get_rng_state().tolist()
    importing = (*sys.meta_path, *sys.path_hooks, warnings.showwarning)
    result = run_case(load_kernel(getattr(hostile_kernels, name)), case, OPTIONS)
    assert_reported(result, status, message)
    case = GOLDENS.load(case.id)
    assert before == (
        torch.get_default_dtype(),
        os.environ.copy(),
        os.getcwd(),
        torch.get_rng_state().tolist(),
    )
    assert importing == (*sys.meta_path, *sys.path_hooks, warnings.showwarning)
    assert tempfile.tempdir != "/nowhere"
    assert run_case(load_kernel(hostile_kernels.wrong), case, ONCE).differing == 1


@pytest.mark.usefixtures("copied_processes")
@pytest.mark.parametrize(("name", "replaced"), REPLACING)
def test_replacing_what_compares(name: str, replaced: str, case: Case, choice: Path, worker: Worker) -> None:
    result = isolated(name, case, choice, worker)
    here = (
        "interfered" if ".isolation." in replaced else "differs"
    )  # what reads the outputs, of those of its process
    assert (result.status, " for good" in result.message) == (here, True), result.message
    kernel = load_kernel(getattr(hostile_kernels, name))
    result = run_case(kernel, case, OPTIONS)
    assert_reported(result, "interfered", replaced)
    assert run_case(load_kernel(hostile_kernels.wrong), case, OPTIONS).status == "differs"


@pytest.mark.parametrize(
    ("name", "replaced"),
    [("hides_how_outcomes_are_made", "Outcome.__new__"), ("replaces_as_if_by_torch", "torch.frombuffer")],
)
def test_replacing_in_this_process(name: str, replaced: str, case: Case) -> None:
    result = run_case(load_kernel(getattr(hostile_kernels, name)), case, ONCE)
    assert_reported(result, "interfered", replaced)
    assert run_case(load_kernel(hostile_kernels.wrong), case, ONCE).status == "differs"


@pytest.mark.usefixtures("copied_processes")
def test_what_a_kernel_replaced_spoils_no_later_case(case: Case, choice: Path, worker: Worker) -> None:
    result = isolated("replaces_methods_of_tensors", case, choice, worker, ONCE)
    assert_reported(result, "differs", "the kernel changed Tensor.")
    assert isolated("right", case, choice, worker, ONCE).status == "equal"


@pytest.mark.usefixtures("copied_processes")
def test_a_replaced_method_of_c_is_told(case: Case, choice: Path, worker: Worker) -> None:
    """In its own process, too: there it could hand over other bits than it returned."""
    told = "mxfp4ref.conformance.isolation.plain._data_ptr"
    result = run_case(load_kernel(hostile_kernels.replaces_what_finds_memory), case, OPTIONS)
    assert_reported(result, "interfered", f"the kernel replaced {told}")
    result = isolated("replaces_what_finds_memory", case, choice, worker)
    assert_reported(result, "interfered", f"the kernel replaced {told}: what it returned cannot be known")
    for kernel in ("wrong", "right"):
        assert isolated(kernel, case, choice, worker, ONCE).ok == (kernel == "right")


def test_replaced_dtypes_are_told_in_this_process(case: Case) -> None:
    """They were an error of the kit, in which these stand for what they are called."""
    result = run_case(load_kernel(hostile_kernels.replaces_dtypes), case, ONCE)
    assert_reported(result, "interfered", "the kernel replaced torch.int16, torch.bool")
    assert (torch.int16.itemsize, torch.bool.itemsize) == (2, 1)
    assert run_case(load_kernel(hostile_kernels.wrong), case, OPTIONS).status == "differs"


def test_logging_is_put_back() -> None:
    root = logging.getLogger()
    before = root.level, list(root.handlers), logging.getLogRecordFactory()
    restore = surroundings()
    logging.basicConfig(level=1, force=True)
    logging.setLogRecordFactory(dict)
    assert restore() == ""
    assert (root.level, root.handlers, logging.getLogRecordFactory()) == before


def test_what_cannot_be_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the kernel's doing, and no error of what puts it back."""
    folder = tmp_path / "removed"
    folder.mkdir()
    monkeypatch.chdir(folder)
    restore = surroundings()
    os.chdir(tmp_path)
    folder.rmdir()
    assert restore() == "the working directory for good"


@pytest.mark.usefixtures("copied_processes")
def test_state_between_cases(choice: Path) -> None:
    """Right alone, and wrong after another case: that is seen, and said."""
    goldens = open_goldens()
    cases = [goldens.load(name) for name in ("finalize/slot_order", "finalize/cancelling_experts")]
    choice.write_text("keeps_a_buffer")
    first, second = run(SPEC, cases, OPTIONS).results
    assert (first.status, second.status) == ("equal", "differs")
    assert (
        "right when run alone, twice in a new process, and not after 1 other run in one: the"
        in second.message
    )


def test_no_case_waits_for_a_process_of_its_own() -> None:
    """The first that failed after others took as long as a process takes to start, and import the kernel."""
    ran: list[str] = []

    def work(case: str, words: str = "", error: type[Exception] | None = None) -> Callable[[], str]:
        def run() -> str:
            ran.append(case)
            if error is not None:
                raise error(case)
            return words

        return run

    alone = Alone()
    for case in "abcd":
        alone.add(case, work(case, f"{case} is right"))
    assert ran == []
    assert [alone.words(case) for case in "dbca"] == ["", "b is right", "c is right", "a is right"]
    assert ran == ["a", "b", "c"]  # three at most
    for first in (work("a"), work("a", error=OSError)):  # the last, if it is wrong alone, too
        ran.clear()
        alone = Alone()
        alone.add("a", first)
        alone.add("b", work("b", "right"))
        assert [alone.words(case) for case in "abc"] == ["", "", ""]
        alone.add("c", work("c", "right"))
        assert (alone.words("c"), ran) == ("", ["a"])
    alone = Alone()
    alone.add("a", work("a", error=ValueError))
    with pytest.raises(ValueError, match="a"):  # a mistake of ours is told as one
        alone.words("a")


@pytest.mark.usefixtures("copied_processes")
def test_a_second_process_begins_after_the_last_case(choice: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel is not to share the machine with a copy of itself: it may run out of time or memory."""
    events: list[str] = []
    original = Alone.begin

    def begin(alone: Alone) -> None:
        events.append("alone")
        original(alone)

    monkeypatch.setattr(Alone, "begin", begin)
    goldens = open_goldens()
    cases = [
        goldens.load(f"finalize/{name}") for name in ("slot_order", "cancelling_experts", "missing_experts")
    ]
    choice.write_text("keeps_a_buffer")
    report = run(SPEC, cases, OPTIONS, progress=lambda result: events.append(result.status))
    assert events[:4] == ["equal", "differs", "differs", "alone"]
    assert "right when run alone" in report.results[1].message
    state = "finalize/cancelling_experts is right when run alone: the kernel keeps state between calls, or"
    assert report.sentences[1].startswith(state)


def test_arguments_that_an_earlier_run_spoils(case: Case) -> None:
    """As by a method of torch's that it replaced: where nothing ran before, they are right."""
    kernel = load_kernel(hostile_kernels.right)

    class Spoilt:
        runs, alone = 2, Alone()

        def execute(self, seconds: float, case: Case, one: Run, **options: Any) -> Outcome:
            return Outcome(problem="layout differs", message="no shape")

        def another(self) -> Any:
            return nullcontext(Fresh())

    class Fresh:
        def execute(self, seconds: float, case: Case, one: Run) -> Outcome:
            return execute(kernel, case.kind, one.inputs, one.expected)

    result = run_case(kernel, case, OPTIONS, worker=Spoilt())  # type: ignore[arg-type]
    assert_reported(result, "layout differs", "no shape; right when run alone")


@pytest.mark.usefixtures("copied_processes")
def test_the_need_of_memory_is_told(case: Case, choice: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system has killed the process, and of layers of whole size before that."""
    supplies = iter(memory.Supply(3 << 28, kills) for kills in (5, 5, 5, 6))
    monkeypatch.setattr(memory, "supply", lambda: next(supplies))
    monkeypatch.setattr(running, "supply", lambda: next(supplies))
    choice.write_text("kills_itself")
    with Worker(SPEC) as process:
        first, result = (run_case(process.kernel, case, OPTIONS, worker=process) for _ in range(2))
    assert first.status == result.status == "crashed"
    assert first.message.endswith(
        "SIGKILL, which it or another program sent: the system was not short of memory"
    )
    assert "signal SIGKILL, as the system does it that runs out of memory" in result.message
    assert "finalize/slot_order needs about 0.7 GiB, and 0.8 GiB were free" in result.message
    monkeypatch.setattr(memory, "free", lambda: 1 << 30)
    whole = _Selection(open_goldens(CHECKOUT), ["models/deepseek_v4_pro"], in_full=True)
    with redirect_stderr(io.StringIO()) as said:
        assert whole.load("models/deepseek_v4_pro").nbytes > 12 << 30
    assert said.getvalue() == "models/deepseek_v4_pro needs about 13.2 GiB, and 1.0 GiB were free\n"


@pytest.mark.skipif(sys.platform != "linux", reason="where the limits of what has ended are known")
@pytest.mark.usefixtures("copied_processes")
def test_a_limit_of_time_that_a_kernel_has_set_is_no_lack_of_memory(case: Case, choice: Path) -> None:
    choice.write_text("limits_its_time")
    with Worker(SPEC) as process:
        result = run_case(process.kernel, case, OPTIONS, worker=process)
    assert_reported(
        result, "crashed", "as the system does it at a limit; the limit is 1 s of a processor's time"
    )
    assert "GiB" not in result.message


@pytest.mark.usefixtures("copied_processes")
@pytest.mark.parametrize(("name", "status", "message"), ENDING)
def test_ending_the_process(
    name: str, status: str, message: str, case: Case, choice: Path, worker: Worker
) -> None:
    isolated("right", case, choice, worker)  # loads what is compiled, outside the time limit
    result = isolated(name, case, choice, worker, QUICK)
    assert_reported(result, status, message)
    assert_renders(result)
    assert isolated("right", case, choice, worker).status == "equal"


@pytest.mark.usefixtures("copied_processes")
def test_a_process_that_cannot_be_put_in_order_is_replaced(
    case: Case, choice: Path, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one without memory for a thread the next run would wait for as long as the kit's own work may take."""
    monkeypatch.setattr(worker_module, "_OWN_SECONDS", 30)
    result = isolated("least_of_memory_for_good", case, choice, worker, ONCE)
    assert_reported(result, "equal", "the kernel changed the limits of resources for good")
    assert isolated("right", case, choice, worker, ONCE).status == "equal"


@pytest.mark.usefixtures("copied_processes")
def test_a_bystander_may_end_the_process_later(case: Case, choice: Path, worker: Worker) -> None:
    """What an earlier run has left behind ends a later one, and only that."""
    assert isolated("exits_later", case, choice, worker).status == "equal"
    choice.write_text("another")
    time.sleep(0.5)
    assert_reported(isolated("right", case, choice, worker), "crashed", "ended without a result: exit code 0")
    assert isolated("right", case, choice, worker).status == "equal"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="whose memory can be filled")
def test_memory_that_is_zero_by_chance(case: Case) -> None:
    """A workspace that nobody clears is zero in a new process, and only there."""
    result = run_case(load_kernel(hostile_kernels.adds_to_what_was_in_memory), case, OPTIONS)
    assert_reported(result, "unstable", "a second run on the same inputs gave")


def test_what_outlives_its_process(case: Case, choice: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that holds the pipes open, and a function that runs at exit, keep nobody waiting and change nothing."""
    start = time.monotonic()
    with Worker(SPEC) as process:
        for name in ("forks_and_the_copy_stays", "exits_at_exit", "right"):
            assert isolated(name, case, choice, process).status == "equal"
        assert len(worker_module.marked(process._mark)) == 2 or not Path("/proc/self/environ").exists()
    assert time.monotonic() - start < 15
    assert worker_module.marked(process._mark) == []


def test_a_watchdog_ends_with_its_run(case: Case, choice: Path, worker: Worker) -> None:
    assert isolated("watchdog", case, choice, worker, ONCE).status == "equal"
    time.sleep(1)
    assert isolated("right", case, choice, worker, ONCE).status == "equal"


def test_what_is_printed(
    case: Case, choice: Path, worker: Worker, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is passed on, to stderr, and a terminal has nothing to obey."""
    assert isolated("prints_escapes", case, choice, worker).status == "equal"
    deadline = time.monotonic() + 5
    printed = ""
    while "title" not in printed and time.monotonic() < deadline:
        printed += capsys.readouterr().err
        time.sleep(0.02)
    assert r"\x1b[2J\x1b[31m\u202e red" in printed
    assert r"\x1b]0;title\x07\xff\x00" in printed
    assert [c for c in printed if not c.isprintable() and c != "\n"] == []


def test_what_an_earlier_run_printed_is_not_that_of_a_crash(case: Case, choice: Path, worker: Worker) -> None:
    assert isolated("prints_and_is_right", case, choice, worker).status == "equal"
    died = isolated("dies_silently", case, choice, worker)
    assert (died.status, died.message.partition("; ")[2]) == ("crashed", "the last it printed: of this run")


def test_of_a_crash_the_kernels_own_line_is_told_and_no_dump() -> None:
    """The dump comes in pieces; what looks like one and is none is text of the kernel's."""
    frames = [
        f'  File "{file}", line 3 in f\n' for file in (ctypes.__file__, "/a/k.py", crash_dumps.__file__)
    ]
    dump = f"Fatal Python error: Segmentation fault\n\nStack (most recent call first):\n{''.join(frames)}"
    dump += "\n\nExtension modules: numpy.a, torch.b (total: 2)\n"
    words = crash_dumps.last_words
    assert words(f"mine\n{dump}".encode()) == " (/a/k.py:3 in f); the last it printed: mine"
    assert words(dump.replace("/a/k.py", ctypes.__file__).encode()) == ""
    assert (
        words(b"not Fatal Python error: Aborted") == "; the last it printed: not Fatal Python error: Aborted"
    )
    pieces = ["mine\n", "Fatal Python error: ", "Segmentation fault\n\nStack", " (most"]
    printed = ["".join(pieces[: n + 1]).encode() for n in range(4)]
    shown = [crash_dumps.before_dump(tail, new.encode()) for tail, new in zip(printed, pieces, strict=True)]
    assert shown == [b"mine\n", b"", b"", b""]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("f = abs; import sys; sys.exit(0)", "cannot import 'hostile_module': SystemExit: 0"),
        ("f = abs; raise GeneratorExit", "GeneratorExit"),
        ("def __getattr__(name): raise RuntimeError('no\\x1b')", r"has no 'f': RuntimeError: no\x1b"),
        ("f = 5", "is no function but int"),
    ],
)
def test_imports(lines: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that cannot be imported is a fault of the environment, in a line."""
    (tmp_path / "hostile_module.py").write_text(lines)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "hostile_module", raising=False)
    with pytest.raises(KernelError) as error:
        load_kernel("hostile_module:f")
    assert message in str(error.value)
    assert str(error.value).isprintable()


@pytest.mark.usefixtures("copied_processes")
@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            "f = abs; import os; os._exit(0)",
            "was imported, the kernel's process ended without a result: exit code 0",
        ),
        (
            "f = abs; import time; time.sleep(60)",
            "was imported, no result within 1 s; its process was killed",
        ),
    ],
)
def test_imports_that_do_not_end(
    lines: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hostile_module.py").write_text(lines)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(worker_module, "_LOAD_SECONDS", 1)
    with pytest.raises(KernelError, match=message):
        run("hostile_module:f", [], Options(timeout=0.1))


@pytest.mark.parametrize("device", ["cuda:99", "nonsense", "meta", "cpu:0:0", "mps"])
def test_devices_that_are_not_here(device: str, case: Case) -> None:
    for kernel in (hostile_kernels.right, Kernel("right", ("moe",), whole_arguments, forward, device=device)):
        with pytest.raises(KernelError, match=r"^device: expected"):
            run(kernel, [case], device=device)


@pytest.mark.usefixtures("copied_processes")
def test_without_isolation_the_command_needs_a_verdict(
    choice: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A kernel that ends the process with exit code 0 does not conform; one that closes stdout does not end it."""
    for name, code, said in (
        ("exits", 1, "does not conform: it ended its process"),
        ("exits_in_the_main_thread", 1, "does not conform: it ended its process"),
        ("right", 0, "conforms: it equals"),
        ("closed_streams", 1, "does not conform: 1 of 1 case fails"),
        ("redirected_streams", 0, "conforms: it equals"),
    ):
        choice.write_text(name)
        options = ("--no-isolate", "--case", "finalize/slot_order", "--diagnosis", "none")
        assert exit_code("conform", SPEC, *options) == code
        out, err = capfd.readouterr()
        assert said in (err if name.startswith("exits") else out)
        assert ("it ended its process" in err) == name.startswith("exits")


def test_every_beginning_of_an_answer_is_its_end() -> None:
    """A process may die while it writes one: that is no other answer."""
    whole = b"".join(kernel_process._framed("run", {}, [b"abc"]))
    for size in range(len(whole)):
        assert kernel_process.unframed(io.BytesIO(whole[:size]), lambda: 3) is None
    assert kernel_process.unframed(io.BytesIO(whole), lambda: 3) == ({"name": "run", "blobs": [3]}, [b"abc"])


@pytest.mark.parametrize(
    "text",
    ["[" * 50_000, "[]", '{"blobs": []}', '{"name": [], "blobs": []}', '{"name": "a", "blobs": [0.5]}'],
)
def test_an_answer_that_is_none(text: str) -> None:
    framed = b"mxfp4ref" + len(text).to_bytes(8, "little") + text.encode()
    with pytest.raises(ValueError):  # noqa: PT011  # whatever it says
        kernel_process.unframed(io.BytesIO(framed), lambda: 3)


@pytest.mark.parametrize(
    "change",
    [{"runs": float("inf")}, {"stages": 5}, {"stages": [["a", "__doc__", [-1]]]}, {"seconds": "now"}],
)
def test_a_result_that_is_none(change: dict[str, Any]) -> None:
    header = {"problem": "raised", "message": "", "seconds": 0.0, "left": "", "runs": 0, "stages": []}
    assert worker_module._collected(header, [], {}).problem == "raised"
    with pytest.raises(worker_module._Ended, match="wrote something else into the pipe"):
        worker_module._collected(header | change, [], {})


@pytest.mark.usefixtures("copied_processes")
def test_an_error_of_the_kit_is_not_the_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "kernel.py").write_text(
        "import platform\n"
        "from tests.helpers.hostile_kernels import wrong\n"
        "platform.platform = None  # an error of ours\n"
    )
    monkeypatch.chdir(tmp_path)
    goldens = ("--goldens", str(CHECKOUT), "--case", "finalize/slot_order", "--no-repeat")
    assert exit_code("conform", "--no-isolate", "--diagnosis", "none", "kernel.py:wrong", *goldens) == 2
    err = capfd.readouterr().err
    assert "TypeError" in err
    assert "an error of mxfp4ref itself" in err
    assert "does not conform" not in err


@pytest.mark.parametrize("isolation", usual.first(1, ["--isolate", "--no-isolate"]))
def test_modules_of_the_working_directory_are_not_the_kits_and_nothing_warns(
    isolation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('a script')")
    (tmp_path / "kernel.py").write_text("from tests.helpers.kernels_under_test import good\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    goldens = ("--goldens", str(CHECKOUT), "--case", "finalize/slot_order", "--no-repeat")
    code = exit_code("conform", isolation, "kernel.py:good", *goldens)
    out, err = capfd.readouterr()
    assert (code, err) == (0, ""), out


def test_no_room_for_the_verdict_is_not_the_kernels_fault(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert exit_code("conform", "--no-isolate", SPEC) == 2
    assert capsys.readouterr() == ("", "Error: OSError: [Errno 28] No space left on device\n")


def test_python_keeps_the_report(case: Case) -> None:
    """Whatever one case does, the results of the others are there."""
    other = GOLDENS.load("formats/every_code_by_row")

    def some(**arguments: Any) -> Any:
        alike = torch.equal(arguments["input"], case.tensors["input"])
        return (hostile_kernels.keyboard_interrupt if alike else hostile_kernels.right)(**arguments)

    report = run(some, [case, other])
    assert [r.status for r in report.results] == ["raised", "equal"]
    for cases, wanted in (([5], "Case"), ("gemm/ordinary", "Goldens or Case objects")):
        with pytest.raises(TypeError, match=f"cases: expected {wanted}, got"):
            run(some, cases)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected a name or a callable, got int 5"):
        run(5, [case])  # type: ignore[arg-type]


def test_a_signature_that_raises(case: Case) -> None:
    class Odd:
        def __init__(self) -> None:
            self.__qualname__ = "\x1b[2J"

        @property
        def __signature__(self) -> Any:
            raise RuntimeError

        def __call__(self, **arguments: Any) -> Any:
            return hostile_kernels.right(**arguments)

    kernel = load_kernel(Odd())
    assert kernel.name == r"\x1b[2J"
    assert run_case(kernel, case).status == "equal"


@pytest.mark.usefixtures("copied_processes")
def test_goldens_that_a_kernel_rewrites(tmp_path: Path) -> None:
    """What agrees with the manifest that it wrote is not what it was to be compared with."""
    cases = ("finalize/slot_order", "finalize/cancelling_experts")
    copy_goldens(tmp_path, cases)
    forger = tmp_path / "forger.py"
    forger.write_text(
        "from pathlib import Path\n"
        "from tests.helpers.hostile_files import forge\n"
        "from tests.helpers.hostile_kernels import right\n"
        "def f(**arguments):\n"
        f"    forge('finalize/slot_order', lambda s: s.update(why='mine'))(Path({str(tmp_path)!r}))\n"
        "    return right(**arguments)\n"
    )
    with pytest.raises(GoldenError, match="maybe the kernel, has rewritten them") as error:
        run(f"{forger}:f", open_goldens(tmp_path / "goldens"), OPTIONS)
    assert error.value.report is not None
    assert [one.status for one in error.value.report.results] == ["equal"]
    assert not error.value.report.ok


@pytest.mark.usefixtures("copied_processes")
def test_no_room_for_a_process(case: Case, choice: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At first it is a fault of the environment; after a crash it costs that case, not the report."""

    def fails(*arguments: object, **keywords: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker_module.subprocess, "Popen", fails)
        with pytest.raises(OSError, match="Too many open files"):
            Worker(SPEC)
    with Worker(SPEC) as process:
        isolated("exits", case, choice, process)
        monkeypatch.setattr(worker_module.subprocess, "Popen", fails)
        result = isolated("right", case, choice, process)
        assert_reported(result, "crashed", "after an earlier crash: [Errno 24] Too many open files")


def test_no_thread_for_its_pipes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process is not left behind."""
    started = []

    def fails(process: Any) -> None:
        started.append(process)
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(worker_module, "_Channel", fails)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        Worker(SPEC)
    assert started[0].poll() is not None


def test_what_an_import_replaces_is_no_verdict_in_this_process(tmp_path: Path) -> None:
    """A kernel that was wrong conformed: what was noted before each run had been replaced already."""
    path = tmp_path / "replaces_when_imported.py"
    path.write_text(
        "import torch\nfrom mxfp4ref.conformance import results\n"
        "from tests.helpers.hostile_kernels import wrong as f\n"
        "torch.equal = lambda *tensors: True\nresults.CaseResult.ok = property(lambda result: True)\n"
    )
    ok, equal = CaseResult.ok, torch.equal
    with pytest.raises(
        KernelError, match=r"importing .* replaced .*CaseResult\.ok.*: a verdict needs a kernel"
    ):
        run(f"{path}:f", [GOLDENS.load("finalize/slot_order")], OPTIONS, isolate=False)
    assert (CaseResult.ok, torch.equal) == (ok, equal)


def test_a_name_is_not_replaced_by_another_of_the_same_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last of a module's names, so that its values stand in the same order."""
    module = sys.modules[interference.__module__]
    name, value = next(reversed(vars(module).items()))
    restore = interference()
    monkeypatch.delattr(module, name)
    monkeypatch.setattr(module, f"_another_{name}", value, raising=False)
    assert name in restore()
    assert vars(module)[name] is value


def test_a_set_is_not_replaced_by_what_is_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A set's copy may have another order: numbers whose hashes collide."""
    numbers = set[int]()
    for number in (272, 1160, 1560, 128, 520):
        numbers.add(number)
    monkeypatch.setattr(sys.modules[interference.__module__], "NUMBERS", numbers, raising=False)
    assert list(numbers) != list(numbers.copy())
    assert not interference()()
    restore = interference()
    numbers.discard(128)
    assert "NUMBERS" in restore()
    assert 128 in numbers
