"""`mxfp4ref record`: a script's calls in the folders that flashinfer's recorder writes."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner, Result

from mxfp4ref.__main__ import commands
from mxfp4ref.checkpoint import CheckpointError, writing
from mxfp4ref.engine import dump
from mxfp4ref.engine.install import Waiting
from mxfp4ref.engine.recorder import Recorder
from mxfp4ref.engine.recordings import find_recordings
from mxfp4ref.engine.replaying import ReplayOptions, replay
from mxfp4ref.model import flashinfer
from mxfp4ref.sm90.tactics import Sm90Kernel
from tests.engine.test_swap_shadow import CANCELLING
from tests.helpers.drop_in import EXPECTED, SM90_CALL, arguments_of, oracle

SCRIPT = """\
import sys
import torch
from mxfp4ref import torch_ref_cutlass_fused_moe
from tests.helpers.drop_in import SM90_CALL, arguments_of
print("arguments", sys.argv[1:])
for _ in range(int(sys.argv[1])):
    torch_ref_cutlass_fused_moe(**arguments_of(SM90_CALL))
sys.exit(int(sys.argv[2]))
"""


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(commands, [str(a) for a in arguments])


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def test_a_script_is_recorded_and_replayed(tmp_path: Path, script: Path) -> None:
    before = flashinfer.torch_ref_cutlass_fused_moe
    result = invoke("record", script, "2", "0", "--theirs", "--output", tmp_path / "calls")
    assert result.exit_code == 0, result.output
    assert "arguments ['2', '0', '--theirs']" in result.output
    assert f"2 calls recorded in {tmp_path / 'calls'}" in result.output
    report = replay(tmp_path / "calls")
    assert [r.status for r in report.results] == ["equal", "equal"]
    assert report.verdict.endswith("This package's own function gave 2: that tells nothing of a kernel.")
    assert flashinfer.torch_ref_cutlass_fused_moe is before
    assert sys.argv[0] != str(script)
    # A second run adds to the folder.
    added = invoke("record", script, "1", "0", "--output", tmp_path / "calls").output
    assert added.endswith(f"1 call recorded in {tmp_path / 'calls'}, beside 2 that were there\n")
    assert len(find_recordings(tmp_path / "calls")) == 3


def test_the_exit_code_is_the_scripts(tmp_path: Path, script: Path) -> None:
    assert invoke("record", script, "1", "3", "--output", tmp_path / "calls").exit_code == 3


def test_a_script_that_goes_elsewhere(tmp_path: Path, script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script.write_text(f"import os\nos.chdir({str(tmp_path / 'other')!r})\n{SCRIPT}")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    result = invoke("record", "--output", "calls", script, "1", "0")
    assert f"1 call recorded in {tmp_path / 'calls'}" in result.output
    assert len(find_recordings(tmp_path / "calls")) == 1
    assert not list((tmp_path / "other").iterdir())


@pytest.mark.parametrize("error", ["FileNotFoundError", "BrokenPipeError", "ValueError"])
def test_what_the_script_raises_is_told_beside_what_was_recorded(
    tmp_path: Path, script: Path, error: str
) -> None:
    script.write_text(SCRIPT.replace("sys.exit(int(sys.argv[2]))", f"raise {error}('of the script')"))
    result = invoke("record", "--output", tmp_path / "calls", script, "1")
    assert result.exit_code == 1
    assert f"{error}: of the script" in result.output
    assert "1 call recorded" in result.output


@pytest.mark.parametrize(
    ("end", "words"),
    [
        ("raise RuntimeError", "RuntimeError"),
        ("import sys; sys.exit(7)", "exit code 7"),
        ("import sys; sys.exit('x')", "exit code 1"),
    ],
)
def test_a_script_that_ends_too_early_is_told(tmp_path: Path, script: Path, end: str, words: str) -> None:
    script.write_text(end)
    result = invoke("record", "--output", tmp_path / "new" / "calls", script)
    assert result.exit_code == 2
    assert (
        f"nothing recorded; the script ended with {words} before any call of"
        in result.output.splitlines()[-1]
    )
    assert not (tmp_path / "new").exists()
    (tmp_path / "mine").mkdir()
    invoke("record", "--output", tmp_path / "mine", script)
    assert (tmp_path / "mine").exists()


@pytest.mark.usefixtures("copied_processes")
@pytest.mark.parametrize(
    ("count", "code", "words"), [("1", 0, "1 call recorded"), ("0", 2, "nothing recorded")]
)
def test_a_script_that_ends_its_process_is_told(
    tmp_path: Path, script: Path, count: str, code: int, words: str
) -> None:
    script.write_text(SCRIPT.replace("sys.exit", "import os; os._exit"))
    command = ["record", "--output", str(tmp_path / "calls"), str(script), count, "0"]
    done = subprocess.run(
        [sys.executable, "-m", "mxfp4ref", *command], capture_output=True, text=True, check=False
    )
    assert done.returncode == code
    assert words in done.stdout + done.stderr


def test_calls_that_others_write_meanwhile_are_theirs(tmp_path: Path, script: Path) -> None:
    theirs = "mxfp4ref.engine.dump import Stored, write_inputs; from pathlib import Path"
    write = f"write_inputs(Path({str(tmp_path / 'calls')!r}), 'cutlass_fused_moe', 'm', 1, Stored.of({{}}))"
    script.write_text(f"from {theirs}; {write}")
    result = invoke("record", "--output", tmp_path / "calls", script)
    assert result.exit_code == 2
    assert "nothing recorded" in result.output


def test_threads_that_outlive_the_script_are_recorded(tmp_path: Path, script: Path) -> None:
    """Python waits for them too. A pool that nobody shuts down would be waited for without end."""
    script.write_text(
        "import concurrent.futures, sys, threading, time\n"
        + SCRIPT.replace("sys.exit(int(sys.argv[2]))", "")
        + "sys.kept = concurrent.futures.ThreadPoolExecutor(1)\n"
        "sys.kept.submit(int).result()\n"
        "def later():\n"
        "    time.sleep(0.2)\n"
        "    torch_ref_cutlass_fused_moe(**arguments_of(SM90_CALL))\n"
        "threading.Thread(target=later).start()\n"
    )
    try:
        result = invoke("record", "--output", tmp_path / "calls", script, "1")
    finally:
        vars(sys).pop("kept").shutdown()
    assert "2 calls recorded" in result.output
    assert [r.status for r in replay(tmp_path / "calls").results] == ["equal", "equal"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["absent.py"], "there is no file absent.py"),
        (["{script}", "0", "0", "--max-gib", "nan"], "--max-gib: expected a finite float32 number, got nan"),
        (["{script}", "0", "0", "--max-gib", "inf"], "--max-gib: expected a finite float32 number, got inf"),
        (
            ["{script}", "0", "0"],
            "nothing recorded; expected calls of mxfp4ref.torch_ref_cutlass_fused_moe in this process; "
            "flashinfer.fused_moe.cutlass_fused_moe is not here: No module named 'flashinfer'",
        ),
    ],
)
def test_nothing_recorded_is_told(tmp_path: Path, script: Path, arguments: list[str], words: str) -> None:
    given = [a.format(script=script) for a in arguments]
    result = invoke("record", *given, "--output", tmp_path / "calls")
    assert result.exit_code == 2
    assert words in result.output


def test_limits_are_told(tmp_path: Path, script: Path) -> None:
    result = invoke("record", "--max-calls", "1", "--output", tmp_path / "calls", script, "3", "0")
    assert result.exit_code == 0
    assert "not recorded: the limit of 1 calls or 20 GiB is reached" in result.output
    assert "2 calls were not recorded" in result.output
    assert "1 call recorded" in result.output


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A package that looks like flashinfer and answers with the drop-in."""
    names = ("flashinfer", "flashinfer.fused_moe", "flashinfer.fused_moe.core")
    modules = {name: ModuleType(name) for name in names}

    def cutlass_fused_moe(*arguments: Any, **named: Any) -> Any:
        return flashinfer.torch_ref_cutlass_fused_moe(*arguments, **named)

    cutlass_fused_moe.__module__ = names[-1]
    for name, module in modules.items():
        module.__path__ = []  # type: ignore[attr-defined]
        module.cutlass_fused_moe = cutlass_fused_moe  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    modules["flashinfer"].fused_moe = modules["flashinfer.fused_moe"]  # type: ignore[attr-defined]
    modules["flashinfer"].__version__ = "0.7.2.post1"  # type: ignore[attr-defined]
    return modules["flashinfer"]


def test_flashinfers_function_is_recorded_wherever_it_was_imported(
    tmp_path: Path, stand_in: ModuleType
) -> None:
    arguments = arguments_of(SM90_CALL)

    class Held:
        moe = staticmethod(stand_in.cutlass_fused_moe)

    with Recorder(tmp_path).recording():
        result = stand_in.cutlass_fused_moe(**arguments)
        stand_in.fused_moe.cutlass_fused_moe(*list(arguments.values())[:7], use_w4_group_scaling=True)
        Held.moe(**arguments)
    assert torch.equal(result[0], EXPECTED)
    calls = find_recordings(tmp_path)  # what the drop-in is called for by it is no call of its own
    assert [call.metadata()["function_name"] for call in calls] == ["cutlass_fused_moe"] * 3
    assert all(call.metadata()["versions"]["flashinfer"] == "0.7.2.post1" for call in calls)
    assert [result.status for result in replay(tmp_path).results] == ["equal"] * 3
    assert stand_in.cutlass_fused_moe.__code__.co_name == "cutlass_fused_moe"
    Held.moe(**arguments)
    assert len(find_recordings(tmp_path)) == 3


@pytest.mark.parametrize(
    ("options", "tiles"),
    [
        ({"strict": "count", "trace": True}, "128x128"),
        ({"kernel": Sm90Kernel.of_tiles((256, 128)), "strict": False}, "256x128"),
        ({"profile_ids": range(4, 3, -5)}, "refused"),
    ],
)
def test_arguments_of_the_drop_ins_own_are_replayed(
    tmp_path: Path, options: dict[str, Any], tiles: str
) -> None:
    with Recorder(tmp_path).recording(), suppress(ValueError):
        flashinfer.torch_ref_cutlass_fused_moe(**arguments_of(CANCELLING), **options)
    (result,) = replay(tmp_path).results
    assert tiles in (result.status, *result.tiles)


def test_the_kernel_of_an_argument_has_to_be_that_of_the_bits(tmp_path: Path) -> None:
    given = arguments_of(CANCELLING) | {"kernel": Sm90Kernel.of_tiles((256, 128))}
    with Recorder(tmp_path).recording():
        flashinfer.torch_ref_cutlass_fused_moe(**given)
    (metadata,) = tmp_path.rglob("metadata.jsonl")
    text = metadata.read_text()
    assert text.count("[64, 16, 256]") == 2
    metadata.write_text(text.replace("[64, 16, 256]", "[64, 16, 128]"))
    assert [result.status for result in replay(tmp_path).results] == ["wrong tactic"]
    metadata.write_text(text.replace("[64, 16, 256]", '"all"'))
    (result,) = replay(tmp_path).results
    assert (result.status, "expected the tactics of a kernel" in result.message) == ("unreadable", True)


def test_a_call_that_raises_is_recorded_without_output(tmp_path: Path, stand_in: ModuleType) -> None:
    with Recorder(tmp_path).recording(), pytest.raises(NotImplementedError):
        stand_in.cutlass_fused_moe(**arguments_of(SM90_CALL), cluster_size=3)
    (result,) = replay(tmp_path).results
    assert (result.status, result.message) == (
        "skipped",
        "cluster_size: not modelled, expected 1 (the kernel refuses any other), got 3",
    )


def test_a_full_disk_does_not_stop_the_script(tmp_path: Path, stand_in: ModuleType) -> None:
    (tmp_path / "calls").write_text("in the way")
    recorder = Recorder(tmp_path / "calls")
    with recorder.recording():
        result = stand_in.cutlass_fused_moe(**arguments_of(SM90_CALL))
    assert torch.equal(result[0], EXPECTED)
    assert recorder.left_out == 1
    assert "NotADirectoryError" in recorder.problems[0]


@pytest.mark.parametrize("fails", range(4))
def test_a_disk_that_fills_up_leaves_whole_files(
    tmp_path: Path, stand_in: ModuleType, monkeypatch: pytest.MonkeyPatch, fails: int
) -> None:
    """Inputs, metadata, outputs and metadata once more: calls with all of their inputs are there, nothing else."""
    written: list[str] = []

    def full_disk(source: Path, target: Path) -> None:
        if len(written) == fails:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.rename(source, target)
        written.append(target.name)

    recorder = Recorder(tmp_path)
    with recorder.recording(), monkeypatch.context() as disk:
        disk.setattr(os, "replace", full_disk)
        stand_in.cutlass_fused_moe(**arguments_of(SM90_CALL))
    assert recorder.left_out == 1
    assert "No space left" in recorder.problems[0]
    if fails < 2:  # half of the inputs is no call
        assert [*tmp_path.iterdir()] == []
        return
    (folder,) = tmp_path.iterdir()
    assert {path.name for path in folder.iterdir()} == set(written)
    (call,) = find_recordings(tmp_path)
    assert call.metadata()["execution_status"] == "inputs_saved"


def test_a_trace_and_tensors_that_share_memory(tmp_path: Path) -> None:
    both = torch.stack([SM90_CALL.experts.fc1_biases.new_zeros(4, 256)] * 2)  # type: ignore[union-attr]
    arguments = arguments_of(SM90_CALL) | {"fc1_expert_biases": both[0], "fc2_expert_biases": both[1]}
    with Recorder(tmp_path).recording():
        flashinfer.torch_ref_cutlass_fused_moe(**arguments, trace=True)
    (call,) = find_recordings(tmp_path)
    assert (
        json.loads((call.path / "metadata.jsonl").read_text().splitlines()[-1])["execution_status"]
        == "completed"
    )
    assert replay(tmp_path).ok
    assert torch.equal(
        call.output(), oracle(**{k: arguments[k] for k in ("fc1_expert_biases", "fc2_expert_biases")})
    )


# A package whose function is wrong and within the reference, in one of the ways in which packages are made.
_IN_PACKAGE = """
def cutlass_fused_moe(*arguments, **named):
    from mxfp4ref.model.flashinfer import drop_in
    result = drop_in()(*arguments, **named)
    result[0].view(torch.int16)[2, 5] ^= 1
    return result
"""
_AROUND_CORE = """
from . import core
def cutlass_fused_moe(*arguments, **named):
    result = core.cutlass_fused_moe(*arguments, **named)
    result[0].view(torch.int16)[2, 5] ^= 1
    return result
"""
_OF_NOTHING = "def cutlass_fused_moe(input, *others, **named): return [torch.zeros_like(input)]\n"
_CALLS = """
import sys
{before}
import flashinfer.fused_moe
from tests.helpers.drop_in import SM90_CALL, arguments_of
for _ in range(2):
    flashinfer.fused_moe.cutlass_fused_moe(**arguments_of(SM90_CALL))
"""


@pytest.fixture
def no_flashinfer() -> Iterator[None]:
    """What a test imports of its own flashinfer is gone after it."""
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "flashinfer"]:
        del sys.modules[name]


def write_package(folder: Path, package: str, core: str = "") -> None:
    (folder / "flashinfer" / "fused_moe").mkdir(parents=True)
    (folder / "flashinfer" / "__init__.py").write_text('__version__ = "0.7.2.post1"\n')
    (folder / "flashinfer" / "fused_moe" / "__init__.py").write_text(f"import torch\n{package}")
    if core:
        (folder / "flashinfer" / "fused_moe" / "core.py").write_text(f"import torch\n{core}")


@pytest.mark.parametrize(
    ("package", "core"),
    [
        (_IN_PACKAGE, ""),
        (_AROUND_CORE, _IN_PACKAGE.replace("2, 5", "3, 1")),
        ("from .core import *\n", _IN_PACKAGE),
        (_OF_NOTHING, ""),
        (_OF_NOTHING, _IN_PACKAGE),
    ],
    ids=["in the package", "around core's", "in core", "calls nothing of ours", "beside core's"],
)
@pytest.mark.usefixtures("no_flashinfer")
def test_the_function_that_is_called_is_recorded_wherever_it_is_defined(
    tmp_path: Path, script: Path, package: str, core: str
) -> None:
    """It lies beside the script, is recorded once a call, and never is what it calls within."""
    write_package(tmp_path, package, core)
    script.write_text(_CALLS.format(before=""))
    result = invoke("record", "--output", tmp_path / "calls", script)
    assert "2 calls recorded" in result.output
    calls = find_recordings(tmp_path / "calls")
    assert {call.metadata()["function_name"] for call in calls} == {"cutlass_fused_moe"}
    assert [r.status for r in replay(tmp_path / "calls", ReplayOptions(diagnosis="none")).results] == [
        "differs"
    ] * 2


@pytest.mark.usefixtures("no_flashinfer")
@pytest.mark.parametrize(("package", "core"), [(_IN_PACKAGE, ""), ("from .core import *\n", _IN_PACKAGE)])
def test_a_flashinfer_that_comes_late_is_recorded_from_its_first_call(
    tmp_path: Path, script: Path, package: str, core: str
) -> None:
    write_package(tmp_path / "late", package, core)
    script.write_text(_CALLS.format(before=f"sys.path.insert(0, {str(tmp_path / 'late')!r})"))
    assert "2 calls recorded" in invoke("record", "--output", tmp_path / "calls", script).output
    calls = find_recordings(tmp_path / "calls")
    assert {call.metadata()["function_name"] for call in calls} == {"cutlass_fused_moe"}
    assert not [one for one in sys.meta_path if isinstance(one, Waiting)]


@pytest.mark.usefixtures("no_flashinfer")
def test_what_cannot_be_recorded_is_told(tmp_path: Path, script: Path) -> None:
    write_package(tmp_path, "cutlass_fused_moe = len\n")
    script.write_text(_CALLS.format(before=""))
    result = invoke("record", "--output", tmp_path / "calls", script)
    assert result.exit_code == 2
    words = "not run; flashinfer.fused_moe.cutlass_fused_moe: expected a Python function, got builtin"
    assert words in result.output.splitlines()[-1]
    assert "Traceback" not in result.output
    assert not (tmp_path / "calls").exists()


@pytest.mark.usefixtures("no_flashinfer")
def test_nothing_recorded_names_what_was_hooked(tmp_path: Path, script: Path) -> None:
    write_package(tmp_path, _AROUND_CORE, _OF_NOTHING)
    script.write_text("")
    said = " ".join(invoke("record", "--output", tmp_path / "calls", script).output.split())
    names = (
        "flashinfer.fused_moe.cutlass_fused_moe or of flashinfer.fused_moe.core.cutlass_fused_moe or of "
        "mxfp4ref.torch_ref_cutlass_fused_moe in this process"
    )
    assert said.endswith(f"nothing recorded; expected calls of {names}")


def test_tensors_that_are_not_as_they_lie_in_memory(tmp_path: Path) -> None:
    """What is negated lazily is written as it is, and of what was freed nothing is."""
    value = torch.arange(6.0).view(2, 3)
    for number, negated in enumerate((torch._neg_view(value), value.to(torch.complex64).conj()), 1):
        stored = dump.Stored.of({"kwarg_extra": negated})
        assert torch.equal(stored.tensors["kwarg_extra"].resolve_neg(), negated)
        if number == 1:
            dump.write_inputs(tmp_path, "cutlass_fused_moe", "m", number, stored)
    (call,) = find_recordings(tmp_path)
    assert torch.equal(call.arguments()[1]["extra"], -value)
    writing.save(tmp_path / "x.safetensors", {"extra": torch._neg_view(value)})
    assert torch.equal(safetensors.torch.load_file(tmp_path / "x.safetensors")["extra"], -value)
    value = value.clone()
    value.untyped_storage().resize_(8)
    with pytest.raises(
        ValueError, match="kwarg_extra: expected a tensor with dense storage, got a partly or"
    ):
        dump.Stored.of({"kwarg_extra": value})
    with pytest.raises(CheckpointError, match="extra: expected a tensor with dense storage, got a partly or"):
        writing.save(tmp_path / "x.safetensors", {"extra": value})
