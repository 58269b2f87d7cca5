"""Writing goldens and checking that they are what would be written: `mxfp4ref regenerate`."""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner, Result

from mxfp4ref.__main__ import commands
from mxfp4ref.goldens import (
    GoldenError,
    Goldens,
    open_goldens,
    tensor_bytes,
    writing,
)
from mxfp4ref.goldens.cases import DEFINITIONS
from mxfp4ref.goldens.cases.definition import moe_content
from mxfp4ref.goldens.cases.source import Source
from mxfp4ref.goldens.manifest import BUILTIN

CHECKOUT = Path(__file__).resolve().parents[2] / "goldens"
SMALL = "layout/fold_scales_0_6_16"


@pytest.fixture
def root(builtin_root: Path, tmp_path: Path) -> Path:
    """A copy of the built-in suite, to damage."""
    return Path(shutil.copytree(builtin_root, tmp_path / "goldens"))


# Writing.


def test_safetensors_bytes_are_read_by_the_library_and_aligned() -> None:
    tensors = {
        "a": torch.arange(3, dtype=torch.uint8),
        "b": torch.tensor([1.5, -0.0, torch.nan]).to(torch.bfloat16),
        "c": torch.arange(6).reshape(2, 3),
        "d": torch.tensor([True, False]),
        "e": torch.zeros(0, 4),
        "f": torch.arange(4, dtype=torch.int32)[::2],
    }
    data = writing.safetensors_bytes(tensors)
    assert data == writing.safetensors_bytes(dict(reversed(tensors.items())))
    read = safetensors.torch.load(data)
    assert {name: t.dtype for name, t in read.items()} == {name: t.dtype for name, t in tensors.items()}
    assert all(tensor_bytes(read[name]) == tensor_bytes(tensor) for name, tensor in tensors.items())
    size = int.from_bytes(data[:8], "little")
    for name, entry in json.loads(data[8 : 8 + size]).items():
        assert (8 + size + entry["data_offsets"][0]) % tensors[name].element_size() == 0


def regenerate(*arguments: str) -> Result:
    return CliRunner().invoke(commands, ["regenerate", *arguments, "--jobs", "1"])


def test_writes_and_checks(tmp_path: Path) -> None:
    root = tmp_path / "new"
    assert regenerate("--root", str(root), "--only", "layout/f*").exit_code == 0
    assert Goldens(root).names() == ["layout/fold_scales_0_6_16", "layout/fold_scales_0_6_9"]
    assert Goldens(root).verify() == []
    checked = regenerate("--root", str(root), "--only", "layout/fold*", "--check")
    assert checked.exit_code == 0
    assert "2 cases, equal byte for byte" in checked.output

    before = {path: path.stat().st_mtime_ns for path in root.rglob("*.*")}
    assert regenerate("--root", str(root), "--only", "layout/swap_halves").exit_code == 0
    assert len(Goldens(root).names()) == 3
    after = {path: path.stat().st_mtime_ns for path in before}
    assert [path.name for path in before if before[path] != after[path]] == ["manifest.json"]

    path = root / "layout" / "swap_halves.json"
    path.write_bytes(path.read_bytes() + b" ")
    (root / "layout" / "fold_scales_0_6_9.safetensors").unlink()
    checked = regenerate("--root", str(root), "--only", "layout/f*", "--only", "layout/s*", "--check")
    assert checked.exit_code == 1
    lines = checked.output.splitlines()
    assert f"{path}: differs" in lines
    assert f"{root / 'layout' / 'fold_scales_0_6_9.safetensors'}: missing" in lines


def test_complete_check_finds_extra_files_and_a_wrong_manifest(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only = {name: definition for name, definition in DEFINITIONS.items() if name == SMALL}
    monkeypatch.setattr(writing, "DEFINITIONS", only)
    checked = regenerate("--root", str(root), "--check")
    assert checked.exit_code == 1
    out = checked.output
    assert f"{root / 'manifest.json'}: differs" in out
    assert out.count("not a file of any case") == 2 * (len(BUILTIN) - 1)
    assert regenerate("--root", str(root)).exit_code == 0  # removes what is no case any more
    assert regenerate("--root", str(root), "--check").exit_code == 0
    assert sorted(path.name for path in root.rglob("*") if path.is_file()) == [
        "fold_scales_0_6_16.json",
        "fold_scales_0_6_16.safetensors",
        "manifest.json",
    ]


def test_interrupted_run_leaves_old_files_whole(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = root / f"{SMALL}.json"
    path.write_bytes(b"old")

    def interrupted(source: str, target: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        writing.regenerate(root, [SMALL])
    assert path.read_bytes() == b"old"
    assert not list(root.rglob(".writing-*"))


def test_what_a_killed_run_leaves_is_no_reason_to_refuse(tmp_path: Path) -> None:
    """The first file of a new root that has not got its name."""
    (tmp_path / f".writing-{'0' * 32}").write_text("{")
    assert regenerate("--root", str(tmp_path), "--only", SMALL).exit_code == 0


# Nothing is lost.


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("only", [(), ("--only", SMALL)])
@pytest.mark.parametrize(
    "manifest", [None, "{}", "not JSON", "[" * 5000, '{"format": "mxfp4ref-goldens-2", "cases": {}}']
)
def test_a_folder_of_something_else_is_refused(
    tmp_path: Path, manifest: str | None, only: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("model/model.safetensors", "model/config.json", ".writing-x"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(manifest)
    before = tree(tmp_path)
    monkeypatch.setattr(
        writing, "_build_all", lambda *_: pytest.fail("should be refused before it takes time")
    )
    result = regenerate("--root", str(tmp_path), *only)
    assert result.exit_code == 2, result.output
    assert "expected an empty folder to write to, or goldens with their manifest" in result.output
    assert tree(tmp_path) == before


def test_only_what_the_manifest_lists_goes(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    for path in (
        "goldens/model/model.safetensors",
        "goldens/gemm/mine.json",
        "goldens/x.json",
        "elsewhere/m.json",
    ):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("mine")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "layout" / ".writing-1").write_text("whose?")
    monkeypatch.setattr(writing, "DEFINITIONS", {SMALL: DEFINITIONS[SMALL]})
    (root / f"{SMALL}.json").write_text("damaged")
    before = tree(tmp_path)
    assert regenerate("--root", str(root), "--only", SMALL).exit_code == 0
    after = tree(tmp_path)
    assert [name for name in before if before[name] != after.get(name)] == [f"goldens/{SMALL}.json"]
    assert regenerate("--root", str(root)).exit_code == 0
    left = sorted(name for name in tree(tmp_path) if name.startswith("goldens/"))
    kept = ["gemm/mine.json", "layout/.writing-1", f"{SMALL}.json", f"{SMALL}.safetensors", "manifest.json"]
    assert left == sorted(f"goldens/{name}" for name in [*kept, "model/model.safetensors", "x.json"])
    assert (tmp_path / "elsewhere" / "m.json").read_text() == "mine"


def test_a_file_that_is_not_listed_is_not_replaced(tmp_path: Path) -> None:
    root = tmp_path / "new"
    assert regenerate("--root", str(root), "--only", SMALL).exit_code == 0
    (root / "layout" / "swap_halves.json").write_text("mine")
    before = tree(root)
    result = regenerate("--root", str(root), "--only", "layout/swap_halves")
    assert result.exit_code == 2
    assert (
        "swap_halves.json: expected a file of the manifest, or none; this one would be lost" in result.output
    )
    assert tree(root) == before


@pytest.mark.parametrize("linked", ["folder", "file", "dangling", "of a case that is gone"])
def test_links_are_not_followed(
    root: Path, tmp_path: Path, linked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = tmp_path / "outside"
    if linked == "folder":
        (root / "layout").rename(outside)
        (root / "layout").symlink_to(outside)
        (outside / f"{SMALL.split('/')[1]}.json").write_text("damaged")
    elif linked == "of a case that is gone":
        monkeypatch.setattr(writing, "DEFINITIONS", {SMALL: DEFINITIONS[SMALL]})
        (root / "gemm").rename(outside)
        (root / "gemm").symlink_to(outside)
    else:
        outside.mkdir()
        (root / f"{SMALL}.json").unlink()
        (root / f"{SMALL}.json").symlink_to(outside / "x.json")
        if linked == "file":
            (outside / "x.json").write_text("mine")
    before = tree(outside), tree(root)
    result = regenerate("--root", str(root), *(() if "gone" in linked else ("--only", SMALL)))
    assert result.exit_code == 2
    assert "expected a file inside" in result.output
    assert (tree(outside), tree(root)) == before


def test_an_interrupted_first_run_can_be_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, replace = tmp_path / "new", os.replace

    def interrupted(source: Path, target: Path) -> None:
        if target.suffix == ".safetensors":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        writing.regenerate(root, [SMALL])
    monkeypatch.undo()
    assert writing.regenerate(root, [SMALL]).cases == 1
    assert Goldens(root).verify() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--only", "nothing/*"), "no case matches 'nothing/*'"),
        (("--only", SMALL, "--only", "nothing/*"), "no case matches 'nothing/*'"),
        (("--jobs", "0"), "0 is not in the range"),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...], message: str) -> None:
    result = CliRunner().invoke(commands, ["regenerate", "--check", *arguments])
    assert result.exit_code == 2
    assert message in result.output


def test_the_tool_is_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tool = Path(__file__).resolve().parents[2] / "tools" / "tables" / "regenerate_goldens.py"
    monkeypatch.setattr(sys, "argv", [str(tool), "--check", "--only", SMALL, "--jobs", "1"])
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(tool), run_name="__main__")
    assert not done.value.code
    assert "1 cases, equal byte for byte" in capsys.readouterr().out


def test_installed_package_can_check_but_not_write(
    builtin_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "site-packages" / "mxfp4ref" / "goldens" / "builtin"
    shutil.copytree(builtin_root, installed)
    monkeypatch.setattr(writing, "BUILTIN_ROOT", installed)
    monkeypatch.setattr(writing, "find_root", lambda: installed)
    checked = regenerate("--check")
    assert checked.exit_code == 0
    assert f"{installed}: {len(BUILTIN)} cases, equal byte for byte" in checked.output
    refused = regenerate()
    assert refused.exit_code == 2
    assert "--root: expected a folder to write to" in refused.output
    (installed / "gemm" / "more.json").write_text("{}")
    assert regenerate("--check").exit_code == 1


def test_no_golden_is_written_without_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where Python runs without docstrings, by -OO."""
    name = "layout/fold_scales_0_6_16"
    monkeypatch.setitem(DEFINITIONS, name, replace(DEFINITIONS[name], why=""))
    result = CliRunner().invoke(commands, ["regenerate", "--root", str(tmp_path), "--only", name])
    assert (result.exit_code, list(tmp_path.iterdir())) == (2, [])
    assert (
        f"Error: {name}: expected a docstring that says why, which Python's option -OO takes" in result.output
    )


def test_processes_and_threads_do_not_matter() -> None:
    name = "finalize/stage_cancelling"
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = writing.build_case(name)
        torch.set_num_threads(2)
        assert writing.build_case(name) == one
    finally:
        torch.set_num_threads(threads)


def test_no_golden_depends_on_tile_n() -> None:
    definition = DEFINITIONS["gemm/first_groups_underflow"]
    case = open_goldens(CHECKOUT).load(definition.id)
    even = case.call()
    # The same tokens in even positions do depend on it, which the definitions' check would refuse.
    with pytest.raises(ValueError, match="depends on tile_n"):
        moe_content(even.select(slice(1, None)))


def test_normal_inputs_are_normal() -> None:
    values = Source("test/normal").normal("x", 1 << 14).to(torch.float64).numpy()
    assert abs(float(np.mean(values))) < 0.05
    assert 1.0 < float(np.std(values)) < 1.3


def _built(case_id: str) -> dict[str, bytes]:
    if case_id == "hangs":
        time.sleep(60)
    if case_id == "dies":
        os._exit(0)
    return {"json": case_id.encode()}


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes for cases are copies of this one, which start at once."""
    monkeypatch.setattr(writing.multiprocessing, "get_context", lambda kind: get_context("fork"))
    monkeypatch.setattr(writing, "build_case", _built)


@pytest.mark.usefixtures("copied")
def test_no_case_is_waited_for_when_another_fails() -> None:
    def interrupted(case_id: str, total: int) -> None:
        raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        writing._build_all(["hangs", "one"], 2, interrupted)
    with pytest.raises(
        GoldenError, match="--jobs: expected 2 processes that do their work, one has ended before"
    ):
        writing._build_all(["hangs", "dies"], 2, interrupted)
    assert time.monotonic() - start < 30
    assert not multiprocessing.active_children()
    names = ["one", "two", "three"]
    assert writing._build_all(names, 2, lambda case_id, total: None) == {name: _built(name) for name in names}


STARTS = """
import multiprocessing, os, time
from mxfp4ref.goldens import writing

def build(case_id):
    os.kill(os.getppid(), 9)
    time.sleep(60)

get_context = multiprocessing.get_context
multiprocessing.get_context = lambda kind: get_context("fork")
writing.build_case = build
build.__module__, build.__qualname__ = writing.__name__, "build_case"
writing._build_all(["one", "two"], 2, print)
"""


@pytest.mark.usefixtures("copied_processes")
def test_processes_end_with_the_one_that_started_them() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", STARTS], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as one:
        one.communicate(timeout=30)  # until no process has its pipes any more
    assert one.returncode == -signal.SIGKILL
