"""Goldens that are written while others read, check and write them: everyone sees old or new, nobody half."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from unittest.mock import patch

import pytest
import safetensors.torch
import torch

from mxfp4ref.goldens import GoldenError, Goldens, tensor_bytes, writing
from mxfp4ref.goldens.cases import DEFINITIONS
from mxfp4ref.goldens.writing import Files, case_files

CASES = ("layout/fold_scales_0_6_16", "layout/fold_scales_0_6_9", "layout/swap_halves")
ROUNDS = 30
KINDS = ("json", "safetensors")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no locks on folders there")


@cache
def version(case_id: str, number: int) -> Files:
    """A case as some release might have it: every version has other words, other bytes and other sizes."""
    definition = DEFINITIONS[case_id]
    content = definition.content()
    tensors = {name: t.contiguous().view(torch.uint8) ^ number for name, t in content.tensors.items()}
    tensors["version"] = torch.full((3 * number,), number)
    why = f"Version {number}." + " " * number
    return case_files(replace(definition, why=why), replace(content, tensors=tensors))


def write(root: Path, pattern: str, number: int, *, check: bool = False) -> tuple[str, ...]:
    """Regenerate the cases that match, in this version; what a check found to differ."""
    with patch.object(writing, "build_case", lambda case_id: version(case_id, number)):
        return writing.regenerate(root, [pattern], check=check).differences


def read(goldens: Goldens, case_id: str) -> int:
    """The version of a case; all of it has to be of that one."""
    case = goldens.load(case_id)
    number = len(case.tensors["version"]) // 3
    expected = safetensors.torch.load(version(case_id, number)["safetensors"])
    assert case.why == f"Version {number}." + " " * number
    assert {n: tensor_bytes(t) for n, t in case.tensors.items()} == {
        n: tensor_bytes(t) for n, t in expected.items()
    }
    return number


def keep_writing(root: Path, pattern: str) -> None:
    """Write two versions in turn, from when both writers are there."""
    name = pattern[-2]
    write(root, pattern, 1)
    (root.parent / f"ready-{name}").touch()
    while len(list(root.parent.glob("ready-*"))) < 2:
        time.sleep(0.01)
    for number in (2, 1) * (ROUNDS // 2):
        write(root, pattern, number)
        while number == 2 and not (root.parent / "seen").exists():  # by the reader
            time.sleep(0.01)
        # Nobody else writes these: they have to be there as written.
        assert write(root, pattern, number, check=True) == ()


def test_two_writers_and_a_reader(tmp_path: Path) -> None:
    root = tmp_path / "goldens"
    write(root, "layout/[fs]*", 1)
    kept = Goldens(root)
    assert kept.names() == list(CASES)
    seen = set()
    multiprocessing.set_forkserver_preload([__name__])  # so that torch is imported once
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("forkserver")) as executor:
        writers = [executor.submit(keep_writing, root, pattern) for pattern in ("layout/f*", "layout/s*")]
        try:
            while not all(writer.done() for writer in writers):
                # One that was opened before all changes, and one that is opened between them.
                for goldens in (kept, Goldens(root)):
                    seen.update((case_id, read(goldens, case_id)) for case_id in CASES)
                    assert goldens.verify() == []
                differences = write(root, "layout/[fs]*", 1, check=True)
                assert all(line.endswith("differs") for line in differences)  # old or new, but there
                if len(seen) == 2 * len(CASES):
                    (tmp_path / "seen").touch()
        finally:
            (tmp_path / "seen").touch()
        for writer in writers:
            writer.result()
    assert seen == {(case_id, number) for case_id in CASES for number in (1, 2)}
    assert [read(kept, case_id) for case_id in CASES] == [1, 1, 1]


KILLED = """
import os, pathlib, signal, sys
sys.path.insert(0, sys.argv[2])
from tests.whole import test_concurrency

root = pathlib.Path(sys.argv[1])
for case in test_concurrency.CASES:
    test_concurrency.version(case, 2)
for step in range(100):
    test_concurrency.write(root, "layout/[fs]*", 1)
    child = os.fork()
    if not child:
        left = step
        def stop(step):
            def instead(*arguments):
                global left
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
                return step(*arguments)
            return instead
        os.fsync, os.chmod, os.replace = map(stop, (os.fsync, os.chmod, os.replace))
        test_concurrency.write(root, "layout/[fs]*", 2)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
    test_concurrency.check_after_a_kill(root)
print(step)
"""


def check_after_a_kill(root: Path) -> None:
    """Every file is old or new; a case of both is refused; the next run puts all right."""
    for case_id in CASES:
        files = {kind: (root / f"{case_id}.{kind}").read_bytes() for kind in KINDS}
        assert all(data in (version(case_id, 1)[k], version(case_id, 2)[k]) for k, data in files.items())
        with suppress(GoldenError):
            read(Goldens(root), case_id)
    write(root, "layout/[fs]*", 2)
    assert [read(Goldens(root), case_id) for case_id in CASES] == [2, 2, 2]
    assert Goldens(root).verify() == []


@pytest.mark.usefixtures("copied_processes")
def test_a_killed_writer(tmp_path: Path) -> None:
    """Killed before each of its steps, in a process without threads."""
    command = [sys.executable, "-c", KILLED, str(tmp_path / "goldens"), str(Path(__file__).parents[2])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # The six files and the manifest, three steps each.
    assert int(done.stdout) == 21
