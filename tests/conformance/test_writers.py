"""What the commands write: whole or not at all, never over an input, and the text on the terminal first."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner, Result

from mxfp4ref import _files, conformance
from mxfp4ref.__main__ import commands
from mxfp4ref.conformance import CaseResult, Options, Report, diagnose, differing, load_kernel, run
from mxfp4ref.conformance.diagnosis import NothingDiffers
from mxfp4ref.conformance.reports import html_report, report, report_text, reproducer
from mxfp4ref.conformance.reports.reproducer import load_reproducer, write_reproducer
from mxfp4ref.goldens import Case, Goldens, open_goldens
from mxfp4ref.goldens.runs import runs
from tests.helpers import hostile_files
from tests.helpers.hostile_files import LAYOUT, MOE

HOSTILE = "\x1b[2J\ud800\x00\ufffe\u202e</failure><script>]]>\n\nx conforms: it equals"
CASE = open_goldens().load(LAYOUT)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written") / "whole"
    hostile_files.make_folder(folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = Path(shutil.copytree(whole, tmp_path / "folder"))
    monkeypatch.chdir(folder)
    return folder


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(commands, arguments)


def conform(*arguments: str, kernel: str = "oracle", case: str = LAYOUT) -> Result:
    return invoke("conform", kernel, "--goldens", "goldens", "--case", case, "--no-repeat", *arguments)


LAYER = ("layer", "--checkpoint", "checkpoint", "--layer", "0", "--input", "hidden.safetensors", "--output")
EXISTING = ("hidden.safetensors", "checkpoint/config.json", "checkpoint/model-00002-of-00002.safetensors")


@pytest.mark.parametrize("how", ["itself", "symbolic link", "hard link", "by another way"])
@pytest.mark.parametrize("name", EXISTING)
def test_the_layer_is_not_written_over_an_input(folder: Path, name: str, how: str) -> None:
    output = {"itself": name, "by another way": f"goldens/../{name}"}.get(how, "out.safetensors")
    if how == "symbolic link":
        (folder / output).symlink_to(name)
    elif how == "hard link":
        (folder / output).hardlink_to(folder / name)
    before = hostile_files.contents(folder)
    result = invoke(*LAYER, output)
    assert result.exit_code == 2
    assert "expected another file than the input" in result.output
    assert hostile_files.contents(folder) == before


OBSTACLES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a folder": (Path.mkdir, "it is a folder|is a directory"),
    "a link": (lambda path: path.symlink_to("b.safetensors"), "expected no link to write to, it leads to"),
    "a link to nothing": (lambda path: path.symlink_to("nothing"), "expected no link to write to"),
    "a link to itself": (lambda path: path.symlink_to("out"), "expected no link to write to"),
    "a full disk": (lambda path: None, r"No space left on device: .*\bout"),
}


def full_disk(source: Path, target: Path) -> None:
    """os.replace on a disk that is full as long as "out" is written."""
    if target.name == "out":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.rename(source, target)


@pytest.mark.parametrize("obstacle", OBSTACLES)
@pytest.mark.parametrize("kind", ["layer", "json", "junit", "html"])
def test_what_cannot_be_written_is_said_and_costs_nothing_else(
    folder: Path, kind: str, obstacle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, says = OBSTACLES[obstacle]
    make(folder / "out")
    if obstacle == "a full disk":
        monkeypatch.setattr(os, "replace", full_disk)
    before = hostile_files.contents(folder)
    beside = "--junit" if kind == "json" else "--json"
    result = invoke(*LAYER, "out") if kind == "layer" else conform(f"--{kind}", "out", beside, "whole")
    assert result.exit_code == 2, result.output
    assert [line for line in result.output.splitlines() if "rror" in line], result.output
    assert re.search(says, result.output), result.output
    refused_at_once = obstacle != "a full disk"  # before anything runs
    said = ("token_final_scales" if kind == "layer" else "oracle conforms") in result.output
    assert said != refused_at_once, result.output
    after = hostile_files.contents(folder)
    written = {"whole"} if kind != "layer" and not refused_at_once else set()
    assert {p for p in before.keys() | after.keys() if before.get(p) != after.get(p)} == written


def test_reports_are_no_goldens_and_not_each_other(folder: Path) -> None:
    (folder / "linked.json").hardlink_to(folder / f"goldens/{LAYOUT}.json")
    before = hostile_files.contents(folder)
    for name in ("goldens/manifest.json", f"goldens/{MOE}.json", f"goldens/{MOE}.safetensors", "linked.json"):
        result = conform("--json", name)
        assert result.exit_code == 2
        assert "expected another file than the input" in result.output
    for where in ("goldens", "goldens/finalize", "calls/../goldens"):
        for option in (("--html", f"{where}/new"), ("--dump", where)):
            result = conform(*option, kernel="defect:bf16_finalize", case=MOE)
            assert result.exit_code == 2
            assert f"{option[0]}: expected one outside of the goldens" in result.output
    (folder / "new").mkdir()
    for name in ("new/finalize-slot_order.py", "new/x.safetensors"):
        result = conform("--dump", "new", "--json", name, kernel="defect:bf16_finalize", case=MOE)
        assert result.exit_code == 2
        assert "expected another file than the reproducers of --dump new" in result.output
    (folder / "new").rmdir()
    assert conform("--dump", "new", "--json", "new", kernel="defect:bf16_finalize").exit_code == 2
    result = conform("--json", "r", "--html", f"{folder}/r")
    assert result.exit_code == 2
    assert "expected a file of its own for each" in result.output
    assert hostile_files.contents(folder) == before


def test_a_report_that_fails_comes_after_the_text_and_the_others(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> str:
        raise RuntimeError("no fonts \x1b[2J")

    monkeypatch.setattr(html_report, "mismatch_maps", broken)
    arguments = ("--html", "r.html", "--junit", "r.xml", "--json", "r.json")
    result = conform(*arguments, "--diagnosis=quick", kernel="defect:bf16_finalize", case=MOE)
    assert result.exit_code == 1, result.output
    verdict, error = (
        result.output.index("does not conform"),
        result.output.index("r.html could not be written"),
    )
    assert verdict < error
    assert r"RuntimeError: no fonts \x1b[2J" in result.output
    assert not (folder / "r.html").exists()
    assert json.loads((folder / "r.json").read_text())["ok"] is False
    assert ElementTree.parse(folder / "r.xml").getroot().find("testsuite") is not None


def test_a_report_that_was_there_keeps_its_mode_and_is_replaced_whole(folder: Path) -> None:
    (folder / "r.json").write_text("old")
    (folder / "r.json").chmod(0o640)
    (folder / "old").hardlink_to(folder / "r.json")
    assert conform("--json", "r.json").exit_code == 0
    assert json.loads((folder / "r.json").read_text())["ok"]
    assert (folder / "r.json").stat().st_mode & 0o777 == 0o640
    assert (folder / "old").read_text() == "old"
    assert not list(folder.glob(".writing-*"))


@pytest.mark.parametrize(
    "arguments", [LAYER, ("conform", "oracle", "--goldens", "goldens", "--case", LAYOUT, "--json")]
)
def test_a_pipe_is_written_to(folder: Path, arguments: tuple[str, ...]) -> None:
    """And stays one: a library that writes files may put another one in its place."""
    os.mkfifo(folder / "pipe")
    with ThreadPoolExecutor(1) as reader:
        read = reader.submit((folder / "pipe").read_bytes)
        assert invoke(*arguments, "pipe").exit_code == 0
        assert len(read.result(timeout=10)) > 100
    assert (folder / "pipe").is_fifo()


@pytest.mark.usefixtures("copied_processes")
@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_full_terminal_and_a_narrow_encoding(folder: Path, encoding: str) -> None:
    """stdout on a full disk, and names that its encoding lacks: the files are written all the same."""
    code = "import sys; sys.stdout.reconfigure(encoding={0!r}); sys.stderr.reconfigure(encoding={0!r})\n"
    code = code.format(encoding) + "from mxfp4ref.__main__ import main; main()"
    arguments = ("conform", "oracle", "--goldens", "goldens", "--case", LAYOUT, "--json")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments, "\u2713.json"],
            stdout=full if encoding == "ascii" else subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
    assert json.loads((folder / "\u2713.json").read_text())["ok"]
    assert done.returncode == (2 if encoding == "ascii" else 0), done.stderr
    assert b"Traceback" not in done.stderr
    if encoding == "ascii":
        assert b"the text could not be written: OSError: [Errno 28]" in done.stderr


# Text from files and kernels.


def hostile_report() -> Report:
    result = CaseResult(HOSTILE, "moe", HOSTILE, "raised", message=HOSTILE)
    skipped = CaseResult("a/b/c", "moe", HOSTILE, "skipped", message=HOSTILE)
    return Report(HOSTILE, "exact", (result, skipped), environment={"gpu": HOSTILE})


def is_clean(text: str) -> bool:
    return all(c.isprintable() or c in "\n\t" for c in text)


def test_every_report_is_text_that_commands_nothing() -> None:
    found = hostile_report()
    text = report_text.to_text(found, verbose=True)
    assert is_clean(text)
    assert not [line for line in text.split("\n") if line.startswith("x conforms")]
    root = ElementTree.fromstring(report.to_junit(found).encode())
    assert len(root.findall(".//error")) == 1
    assert is_clean("".join(root.itertext()))
    html = html_report.to_html(found)
    assert is_clean(html)
    assert html.count("<script") == 1  # the report's own
    assert is_clean(json.dumps(json.loads(report.to_json(found)), ensure_ascii=False))


QUOTES = '"""\nimport os; os.mkdir("made")\n"""\r\nos.mkdir("made")\x0cos.mkdir("made")\u2028#'


def test_a_reproducer_holds_words_as_words(folder: Path) -> None:
    for name in ("../../outside", "a/b", "\ud800\x00", QUOTES):
        case = replace(CASE, why=QUOTES, suite=name, name=name)
        script = write_reproducer(folder / "d", case, runs(CASE)[0], f"{QUOTES}'''{HOSTILE}", {})
        assert script.parent == folder / "d"
        source = script.read_text(encoding="utf-8")
        assert is_clean(source)
        compile(source, script, "exec")
        head = source[: source.index("\nimport sys")]
        assert all(not line or line.startswith("#") for line in head.split("\n"))
        kind, inputs, expected = load_reproducer(script.with_suffix(".safetensors"))
        assert (kind, set(expected)) == ("layout", {"after"})
        assert torch.equal(inputs["before"], CASE.tensors["before"])
    assert not (folder / "made").exists()
    assert len(list((folder / "d").iterdir())) == len(list(folder.glob("d/*"))) == 8


def test_a_reproducer_that_a_killed_run_has_begun_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(path: Path, data: str | bytes, root: Path) -> None:
        _files.write_file(path, data, root)
        raise KeyboardInterrupt

    arguments = CASE, runs(CASE)[0], "oracle", {}
    monkeypatch.setattr(reproducer, "write_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_reproducer(tmp_path, *arguments)
    monkeypatch.undo()
    assert write_reproducer(tmp_path, *arguments).with_suffix(".safetensors").is_file()


def test_a_reproducer_that_cannot_be_written_is_no_reason_to_stop(folder: Path) -> None:
    (folder / "dump").write_text("mine")
    case = open_goldens().load(MOE)
    options = conformance.Options(dump=folder / "dump", repeat=False, diagnosis="none")
    found = conformance.run("defect:bf16_finalize", [case], options)
    assert found.results[0].status == "differs"
    assert "its reproducer was not written: " in report_text.to_text(found)
    assert (folder / "dump").read_text() == "mine"


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {},
        {"kind": "moe"},
        {"kind": "eval", "parameters": "{}"},
        {"kind": "layout", "parameters": "[" * 100_000},
        {"kind": "layout", "parameters": "[]"},
        {"kind": "moe", "parameters": "{}"},
        {"kind": "moe", "parameters": '{"tile_k": 3, "tile_n": [], "generation": "x"}'},
    ],
)
def test_a_file_that_is_no_reproducer(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"a": torch.ones(1)}, path, metadata)
    with pytest.raises(ValueError, match=r"x\.safetensors: expected a reproducer, got "):
        load_reproducer(path)


@pytest.mark.parametrize("inside", ["goldens", "goldens/finalize", "link/new"])
def test_from_python_too_no_reproducer_lies_among_goldens(folder: Path, inside: str) -> None:
    (folder / "link").symlink_to(folder / "goldens")
    with pytest.raises(ValueError, match=r"^dump: expected one outside of the goldens"):
        run("oracle", Goldens(folder / "goldens"), Options(dump=folder / inside))


# Arguments of the kit that are nothing of the kind.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((5, []), "kernel: expected a name or a callable, got int 5"),
        ((None, []), "kernel: expected a name or a callable, got NoneType"),
        ((["oracle"], []), "kernel: expected a name or a callable, got list"),
        (("oracle", 5), "cases: expected Goldens or Case objects, got int 5"),
        (("oracle", "gemm/ordinary"), "cases: expected Goldens or Case objects, got str"),
        (
            ("oracle", ["gemm/ordinary"]),
            r"cases: expected Case, got str; did you mean open_goldens\(\).load\('gemm/ordinary'\)",
        ),
        (("oracle", [], "exact"), "options: expected Options, got str"),
    ],
)
def test_run_with_anything(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(TypeError, match=f"^{message}"):
        conformance.run(*arguments)  # type: ignore[arg-type]


_CODES = {name: torch.zeros(1, 16, dtype=torch.uint8) for name in ("packed", "scales")}
_OUTPUT = r"{}\['output'\]: expected a bfloat16 tensor of shape \[8, 128\], got "
_WRONG = {"output": torch.zeros(8, 128, dtype=torch.bfloat16)}


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (lambda one: Options(dump="reproducers"), "dump: expected Path, got str"),
        (lambda one: Options(repeat="no"), "repeat: expected a bool, got str"),
        (lambda one: Options(all_tactics=0), "all_tactics: expected a bool, got int"),
        (lambda one: run("oracle", [], device=torch.device("cpu")), "device: expected str, got device"),
        (lambda one: run("a:b", [], device=b"cpu"), "device: expected str, got bytes"),
        (lambda one: run("oracle", [], isolate="no"), "isolate: expected bool, got str"),
        (lambda one: run("oracle", torch.tensor(1)), "cases: expected Goldens or Case objects, got Tensor"),
        (lambda one: run("oracle", [], progress=5), "progress: expected a function, got 5"),
        (lambda one: run("oracle", [], note="x"), "note: expected a function, got 'x'"),
        (lambda one: load_kernel("oracle", torch.device("cpu")), "device: expected str, got device"),
        (lambda one: conformance.run_case("oracle", CASE), "kernel: expected Kernel, got str"),
        (lambda one: conformance.run_case(load_kernel("oracle"), CASE, {}), "options: expected Options, got"),
        (lambda one: differing([1], torch.ones(1)), "got: expected Tensor, got list"),
        (lambda one: diagnose("moe", None, _WRONG, one.expected), "inputs: expected MoeCall, got NoneType"),
        (lambda one: diagnose("moe", one.inputs, None, one.expected), "outputs: expected Mapping, got None"),
        (lambda one: diagnose("mo", one.inputs, _WRONG, one.expected), "kind: expected one of moe, "),
        (lambda one: diagnose("moe", one.inputs, {}, {}), "expected: expected output, got none"),
        *(
            (lambda one, wrong=wrong: diagnose("moe", one.inputs, *wrong(one.expected)), message)
            for wrong, message in (
                (lambda right: (_WRONG, [right]), "expected: expected Mapping, got list"),
                (lambda right: ({"y": 1}, {"y": 1}), "expected: expected output, got 'y'"),
                (lambda right: (_WRONG, {"output": right["output"].float()}), _OUTPUT.format("expected")),
                (lambda right: (_WRONG, {"output": right["output"][0]}), _OUTPUT.format("expected")),
                (lambda right: ({"output": right["output"][None]}, right), _OUTPUT.format("outputs")),
                (
                    lambda right: ({"output": None}, right),
                    r"outputs\['output'\]: expected Tensor, got NoneType",
                ),
                (
                    lambda right: (_WRONG | {"activation": 1}, right),
                    r"outputs\['activation'\]: expected Tensor",
                ),
            )
        ),
        *(
            (lambda one, how=how: diagnose("moe", one.inputs, _WRONG, one.expected, **how), message)
            for how, message in (
                (
                    {"suspects": "limit_ignored"},
                    "suspects: expected names of defects and hypotheses, got 'lim",
                ),
                ({"suspects": ["limit_ignore"]}, "suspects: .*did you mean limit_ignored"),
                ({"suspects": [3]}, "suspects: expected str, got int"),
                ({"progress": 3}, "progress: expected a function, got 3"),
            )
        ),
        (
            lambda one: diagnose("quantize", {}, _CODES, _CODES),
            "inputs: expected those of kind quantize, got T",
        ),
        (
            lambda one: diagnose("layout", {"before": 1}, _CODES, _CODES),
            "expected: expected after, got 'packed'",
        ),
        (lambda one: Goldens(b"goldens"), "argument should be a str "),
    ],
)
def test_calls_with_anything(work: Callable[[Any], object], message: str) -> None:
    """They were errors of Python's own, of the kit after the kernel had run, or "nothing differs" of nothing."""
    with pytest.raises((TypeError, ValueError), match=f"^{message}") as error:
        work(runs(open_goldens().load(MOE))[0])
    assert type(error.value) is not NothingDiffers
    assert Goldens(str(open_goldens().root)).count == open_goldens().count


def test_no_cases_are_no_conformance() -> None:
    found = conformance.run("oracle", [])
    assert not found.ok
    assert found.verdict == "oracle ran on no case."


@pytest.mark.parametrize("case", [CASE, open_goldens().load(MOE)], ids=lambda case: case.id)
def test_an_output_that_is_right_has_no_diagnosis(case: Case) -> None:
    one = runs(case)[0]
    said = r"^nothing differs: (after|output): all [\d,]+ elements have the expected bits$"
    with pytest.raises(NothingDiffers, match=said):
        diagnose(case.kind, one.inputs, dict(one.expected), one.expected)
    with pytest.raises(ValueError, match=r"^outputs: expected (after|output), got none"):
        diagnose(case.kind, one.inputs, {}, one.expected)
