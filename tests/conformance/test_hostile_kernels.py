"""Kernels that do what no kernel should: what has to be reported of each, isolated and in this process.

They share a process as long as they leave it alive, and run on the smallest golden case.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from mxfp4ref.conformance import CaseResult, Options, Report, load_kernel, run_case
from mxfp4ref.conformance.report import to_html, to_json, to_junit, to_text
from mxfp4ref.conformance.worker import Worker
from mxfp4ref.goldens import Case, open_goldens
from tests.helpers import hostile_kernels

SPEC = "tests.helpers.hostile_kernels:chosen"
OPTIONS = Options(timeout=30, diagnosed=False)
QUICK = Options(timeout=1, diagnosed=False)

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
    ("integers", "wrong output", "expected bfloat16 [8, 128], got int16 [8, 128]"),
    ("vast", "wrong output", "got bfloat16 [1048576, 1048576]"),
    ("no_elements", "wrong output", "got bfloat16 [0, 128]"),
    ("meta_intermediates", "wrong output", "activation: expected a tensor, got a meta float32 [3] tensor"),
    ("odd_intermediates", "differs", ""),
    ("parameter", "equal", ""),
    ("transposed", "equal", ""),
    ("of_inference_mode", "equal", ""),
    ("resized_output", "wrong output", "got bfloat16 [2, 128]"),
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
    ("shrinks_memory_of_input", "input modified", "without the memory for it"),
    ("swaps_data_of_input", "input modified", "token_final_scales at [0, 0]"),
    ("wants_gradient_of_input", "input modified", "requires a gradient"),
    (
        "clears_list_of_scales",
        "input modified",
        "quant_scales[0], which is gone; quant_scales[1], which is gone",
    ),
    ("returns_overwritten_input", "input modified", "input at [0, 0]"),
    ("nan_of_another_payload", "input modified", "token_final_scales at [0, 0]"),
    # What is raised
    ("mute_exception", "raised", "_Mute: (its text cannot be had)"),
    ("system_exit", "raised", "SystemExit: 0"),
    ("keyboard_interrupt", "raised", "KeyboardInterrupt"),
    ("generator_exit", "raised", "GeneratorExit"),
    ("nameless_exception", "raised", "_Nameless: nothing"),
    ("self_raising", "raised", "RuntimeError: its own cause"),
    ("recursion", "raised", "RecursionError"),
    ("out_of_memory", "raised", "MemoryError"),
    ("kit_skip", "raised", "Skip: this one is not for me"),
    ("long_text", "raised", "[... 49,998,000 characters ...]"),
    ("odd_text", "raised", r"\x1b[2J\x1b]0;t\x07 \ud800 \u202e \x00 \x9b31m \ufffe"),
    ("raises_second_time", "raised", "in a second run: RuntimeError: only now"),
    ("wrong_second_time", "unstable", "1 other elements in output; at [3, 5]"),
    # What is left behind
    ("default_dtype", "equal", f"torch's default dtype, {PUT_BACK}"),
    ("default_device", "equal", ""),
    ("grad_and_inference_mode", "equal", ""),
    ("deterministic", "equal", f"torch's deterministic mode, {PUT_BACK}"),
    ("working_directory", "equal", f"the working directory, {PUT_BACK}"),
    ("environment", "equal", f"the environment, {PUT_BACK}"),
    ("modules", "equal", "sys.modules['"),
    ("standard_streams", "equal", f"sys.stdout, sys.stderr, {PUT_BACK}"),
    ("replaced_builtins", "equal", f"Python's builtins, {PUT_BACK}"),
    ("recursion_limit", "equal", f"the recursion limit, {PUT_BACK}"),
    ("strict_warnings", "equal", ""),
    ("random_numbers", "equal", ""),
    ("rounding_mode", "equal", ""),
    ("trace_function", "equal", ""),
    ("thread_that_goes_on", "equal", ""),
    ("forks_and_both_return", "equal", ""),
]
# What replaces functions of this process, which is not where an isolated kernel runs.
REPLACING = [
    ("replaces_not_equal", "Tensor.__ne__"),
    ("replaces_differing", "mxfp4ref.conformance.suite.differing"),
    ("replaces_code_of_differing", "mxfp4ref.conformance.comparison.differing"),
    ("replaces_comparison_of_bytes", "mxfp4ref.conformance.plain.raw_bytes"),
    ("replaces_expected_outputs", "Case.outputs"),
]
# What ends or blocks the process that it runs in.
ENDING = [
    ("exits", "crashed", "ended without a result: exit code 0"),
    ("exits_in_c", "crashed", "ended without a result: exit code 0"),
    ("killed_by_real_time_signal", "crashed", "signal 44"),
    (
        "segmentation_fault",
        "crashed",
        "signal SIGSEGV; the last it printed: Fatal Python error: Segmentation fault",
    ),
    ("never_gives_up_the_lock", "timed out", "no result within 1 s; its process was killed"),
    ("stops_itself", "timed out", "no result within 1 s; its process was killed"),
    ("floods_and_dies", "crashed", "signal SIGABRT; the last it printed: "),
    ("closes_everything", "crashed", "ended without a result"),
    ("puts_a_file_in_place_of_the_pipe", "crashed", "ended without a result: exit code 1"),
    ("writes_into_every_pipe", "crashed", "wrote something else into the pipe to the kit"),
    ("forks_and_the_copy_returns", "crashed", "ended without a result: exit code 0"),
    ("hangs_when_deleted", "timed out", "no result within 1 s"),
]
SAFE_CONTROLS = "\n\t"


@pytest.fixture
def case() -> Case:
    return open_goldens().load("finalize/slot_order")


@pytest.fixture(scope="module")
def choice(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The file that names the kernel to run."""
    with pytest.MonkeyPatch.context() as patch:
        file = tmp_path_factory.mktemp("hostile") / "chosen"
        patch.setenv(hostile_kernels.CHOSEN, str(file))
        yield file


@pytest.fixture(scope="module")
def worker(choice: Path) -> Iterator[Worker]:
    with Worker(SPEC) as process:
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


@pytest.mark.parametrize(("name", "status", "message"), EVERYWHERE)
def test_isolated(name: str, status: str, message: str, case: Case, choice: Path, worker: Worker) -> None:
    result = isolated(name, case, choice, worker)
    assert_reported(result, status, message)
    if status not in ("equal", "differs"):
        assert_renders(result)
    assert isolated("right", case, choice, worker).status == "equal"  # nothing is left behind
    assert isolated("wrong", case, choice, worker).status == "differs"


@pytest.mark.parametrize(("name", "status", "message"), EVERYWHERE)
def test_in_this_process(name: str, status: str, message: str, case: Case) -> None:
    before = torch.get_default_dtype(), os.environ.copy(), os.getcwd(), torch.get_rng_state().tolist()
    result = run_case(load_kernel(getattr(hostile_kernels, name)), case, OPTIONS)
    assert_reported(result, status, message)
    case = open_goldens().load(case.id)
    assert before == (
        torch.get_default_dtype(),
        os.environ.copy(),
        os.getcwd(),
        torch.get_rng_state().tolist(),
    )
    for other, expected in (("right", "equal"), ("wrong", "differs")):
        assert run_case(load_kernel(getattr(hostile_kernels, other)), case, OPTIONS).status == expected


@pytest.mark.parametrize(("name", "replaced"), REPLACING)
def test_replacing_what_compares(name: str, replaced: str, case: Case, choice: Path, worker: Worker) -> None:
    assert isolated(name, case, choice, worker).status == "differs"
    kernel = load_kernel(getattr(hostile_kernels, name))
    result = run_case(kernel, case, OPTIONS)
    assert_reported(result, "interfered", replaced)
    assert run_case(load_kernel(hostile_kernels.wrong), case, OPTIONS).status == "differs"


@pytest.mark.parametrize(("name", "status", "message"), ENDING)
def test_ending_the_process(
    name: str, status: str, message: str, case: Case, choice: Path, worker: Worker
) -> None:
    isolated("right", case, choice, worker)  # loads what is compiled, outside the time limit
    result = isolated(name, case, choice, worker, QUICK)
    assert_reported(result, status, message)
    assert_renders(result)
    assert isolated("right", case, choice, worker).status == "equal"
