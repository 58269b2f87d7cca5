"""Writing the goldens: every file from nothing, byte for byte the same on every machine, or a check that it is."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mxfp4ref._files import UNFINISHED, files_below, read_file, write_file
from mxfp4ref._lock import locked
from mxfp4ref.goldens.case import dtype_name, tensor_bytes
from mxfp4ref.goldens.cases import DEFINITIONS
from mxfp4ref.goldens.cases.definition import Content, Definition
from mxfp4ref.goldens.manifest import (
    BUILTIN,
    FILE_KINDS,
    FORMAT,
    Entries,
    entries,
    json_bytes,
    manifest_bytes,
)
from mxfp4ref.goldens.store import BUILTIN_ROOT, GoldenError, Goldens, find_root, is_other_file

__all__ = [
    "SIZE_LIMIT",
    "Files",
    "Regenerated",
    "build_case",
    "case_files",
    "regenerate",
    "safetensors_bytes",
]

SIZE_LIMIT = 32 << 20

_SAFETENSORS_DTYPES = {
    torch.bfloat16: "BF16",
    torch.bool: "BOOL",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.uint8: "U8",
}

Files = dict[str, bytes]
Progress = Callable[[str, int], None]


def safetensors_bytes(tensors: dict[str, torch.Tensor]) -> bytes:
    """The tensors as a safetensors file whose bytes depend on nothing else.

    Wide dtypes come first, so that every tensor is aligned, then names in order; no metadata. The format is
    written out here because the library's order and padding are its own affair.
    """
    header: dict[str, Any] = {}
    data = []
    offset = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        data.append(tensor_bytes(tensor))
        header[name] = {
            "dtype": _SAFETENSORS_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + len(data[-1])],
        }
        offset += len(data[-1])
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(data)


def case_files(definition: Definition, content: Content) -> Files:
    """The files of a case by their ending."""
    outputs: dict[str, list[list[int]]] = {}
    for pair, name in sorted(content.output_tensors.items()):
        outputs.setdefault(name, []).append(list(pair))
    sidecar: dict[str, Any] = {
        "format": FORMAT,
        "suite": definition.suite,
        "name": definition.name,
        "kind": definition.kind,
        "why": definition.why,
        "catches": sorted(definition.catches),
        "unique_for": definition.unique_for,
        "parameters": dict(content.parameters),
        "tensors": {
            name: {
                "dtype": dtype_name(tensor),
                "shape": list(tensor.shape),
                "sha256": hashlib.sha256(tensor_bytes(tensor)).hexdigest(),
            }
            for name, tensor in content.tensors.items()
        },
        "derived": {name: dict(recipe) for name, recipe in content.derived.items()},
        "outputs": [{"tensor": name, "tile_k": pairs} for name, pairs in outputs.items()],
    }
    if definition.pending:
        sidecar["pending"] = True
    return {"json": json_bytes(sidecar), "safetensors": safetensors_bytes(dict(content.tensors))}


def build_case(case_id: str) -> Files:
    """The files of a case, from its definition alone."""
    definition = DEFINITIONS[case_id]
    return case_files(definition, definition.content())


@dataclass(frozen=True)
class Regenerated:
    """What came of a regeneration.

    Attributes:
        root: the folder.
        cases: how many cases were generated.
        differences: for a check, a line for each file that is not as generated.
        size: bytes of all files under the root.
    """

    root: Path
    cases: int
    differences: tuple[str, ...]
    size: int


def regenerate(
    root: Path | None = None,
    patterns: Sequence[str] = (),
    *,
    check: bool = False,
    jobs: int = 1,
    progress: Progress | None = None,
) -> Regenerated:
    """Generate cases and write them under a root, or check that its files are what would be written.

    All cases written, those go which the root's manifest listed and which are none any more. No other file goes, none
    that the manifest did not list is replaced by another, and no link is followed.

    Args:
        root: the folder, with goldens or empty; by default that of the checkout, and for a check elsewhere the one
            that `find_root` finds.
        patterns: only the cases that match one of them, as in "gemm/*".
        check: write nothing, list what differs.
        jobs: how many processes.
        progress: called for each finished case with its name and with the number of cases.

    Raises:
        GoldenError: a pattern matches no case, there is no folder to write to, it has something else in it, a case is
            without a reason, or one of the processes has ended. Nothing has been written then.
        OSError: a file cannot be written.
    """
    root = _default_root(writing=not check) if root is None else root
    belonging = [case_id for case_id in DEFINITIONS if root != BUILTIN_ROOT or case_id in BUILTIN]
    selected = _select(belonging, patterns)
    if silent := [case_id for case_id in selected if not DEFINITIONS[case_id].why]:
        raise GoldenError(
            f"{silent[0]}: expected a docstring that says why, which Python's option -OO takes away"
        )
    if not check:
        _listed(root)  # refused here, before it takes time
    cases = _build_all(selected, jobs, progress or (lambda case_id, total: None))
    complete = not patterns
    differences: list[str] = []
    if not check:
        root.mkdir(parents=True, exist_ok=True)
    with locked(root, exclusive=not check):
        if check:
            differences = _differences(root, cases, complete)
        else:
            _write_tree(root, cases, complete)
        size = sum(path.stat().st_size for path in files_below(root, links=False) if path.is_file())
    return Regenerated(root, len(selected), tuple(differences), size)


def _select(case_ids: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The cases that match one of the patterns, or all of them without patterns."""
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(case_id, pattern) for case_id in case_ids):
            raise GoldenError(f"--only: no case matches {pattern!r}")
    return [
        case_id
        for case_id in case_ids
        if not patterns or any(fnmatch.fnmatchcase(case_id, pattern) for pattern in patterns)
    ]


def _default_root(*, writing: bool) -> Path:
    """The goldens of the checkout; elsewhere, to check only, those that are found."""
    checkout = BUILTIN_ROOT.parents[2]
    if (checkout / "pyproject.toml").is_file():
        return checkout / "goldens"
    if writing:
        raise GoldenError("--root: expected a folder to write to, because this is no checkout")
    return find_root()


def _build_all(case_ids: Sequence[str], jobs: int, progress: Progress) -> dict[str, Files]:
    """The files of all cases. The large ones are started first."""
    ordered = sorted(case_ids, key=lambda case_id: not case_id.startswith("models/"))
    built: dict[str, Files] = {}
    if jobs == 1:
        for case_id in ordered:
            built[case_id] = build_case(case_id)
            progress(case_id, len(ordered))
    else:
        built = _build_side_by_side(ordered, min(jobs, len(ordered)), progress)
    return {case_id: built[case_id] for case_id in case_ids}


def _build_side_by_side(case_ids: Sequence[str], jobs: int, progress: Progress) -> dict[str, Files]:
    """The files of cases, by so many processes, none of which is left whatever happens."""
    built = {}
    # Spawned, because a fork of torch's thread pool can hang.
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin) as executor:
        try:
            with _uninterrupted():  # and so are the processes: that is for this one to tell
                futures = {executor.submit(build_case, case_id): case_id for case_id in case_ids}
            for future in as_completed(futures):
                built[futures[future]] = future.result()
                progress(futures[future], len(case_ids))
        except BaseException as error:
            for process in set(multiprocessing.active_children()) - others:
                process.kill()
            executor.shutdown(cancel_futures=True)
            if isinstance(error, BrokenProcessPool):
                words = (
                    "one has ended before its case was done, as the system ends it that runs out of memory"
                )
                raise GoldenError(f"--jobs: expected {jobs} processes that do their work, {words}") from None
            raise
    return built


def _begin() -> None:
    """A process has one thread, because all of them fill the cores, and ends with that which has started it."""
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Inside, Ctrl-C waits; processes that are started there never get it."""
    if os.name != "posix":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _differences(root: Path, cases: dict[str, Files], complete: bool) -> list[str]:
    """What is not as built, one line a file; with all cases built, missing and extra ones too."""
    differences = []
    for case_id, files in cases.items():
        for kind, data in files.items():
            path = root / f"{case_id}.{kind}"
            if not path.is_file():
                differences.append(f"{path}: missing")
            elif path.read_bytes() != data:
                differences.append(f"{path}: differs")
    if complete:
        manifest = root / "manifest.json"
        of = len(DEFINITIONS) if len(cases) < len(DEFINITIONS) else 0
        if not manifest.is_file() or manifest.read_bytes() != manifest_bytes(entries(cases), of):
            differences.append(f"{manifest}: {'differs' if manifest.is_file() else 'missing'}")
        known = {f"{case_id}.{kind}" for case_id, files in cases.items() for kind in files}
        for path in sorted(path for path in files_below(root, links=False) if path.is_file()):
            relative = path.relative_to(root)
            if not is_other_file(relative) and relative.as_posix() not in known:
                differences.append(f"{path}: not a file of any case")
    return differences


def _listed(root: Path) -> tuple[Entries, int]:
    """What the manifest of a root lists that is to be written to, and of how many cases it says that they are."""
    if not root.exists() or all(UNFINISHED.fullmatch(path.name) for path in root.iterdir()):
        return {}, 0
    try:
        goldens = Goldens(root)
        return goldens.entries, goldens.of * (goldens.of > len(goldens.entries))
    except GoldenError as error:
        raise GoldenError(
            f"{root}: expected an empty folder to write to, or goldens with their manifest; got neither, {error}"
        ) from None


def _write_tree(root: Path, cases: dict[str, Files], complete: bool) -> None:
    """Write the cases, then the manifest, then remove what is no longer a case. The root has to be locked.

    Every file is replaced in one step; after an interruption some cases may not be those of the manifest, which
    reading them reports.
    """
    listed, of = _listed(root)
    paths = {
        root / f"{case_id}.{kind}": data for case_id, files in cases.items() for kind, data in files.items()
    }
    changed = {path: data for path, data in paths.items() if not (path.is_file() and read_file(path) == data)}
    gone = [
        root / f"{name}.{kind}" for name in listed if complete and name not in cases for kind in FILE_KINDS
    ]
    known = {root / f"{name}.{kind}" for name in listed for kind in FILE_KINDS}
    for path in [*changed, *gone]:
        if path.is_symlink() or path.parent.is_symlink():
            raise GoldenError(
                f"{path}: expected a file inside {root}, got a link to {os.path.realpath(path)}"
            )
        if path.exists() and path not in known:
            raise GoldenError(f"{path}: expected a file of the manifest, or none; this one would be lost")
    if not (root / "manifest.json").exists():
        write_file(
            root / "manifest.json", manifest_bytes({})
        )  # after an interruption, what tells that it is ours
    for path, data in changed.items():
        write_file(path, data, root)
    manifest = manifest_bytes(entries(cases)) if complete else manifest_bytes(listed | entries(cases), of)
    write_file(root / "manifest.json", manifest)
    for path in gone:
        path.unlink(missing_ok=True)
