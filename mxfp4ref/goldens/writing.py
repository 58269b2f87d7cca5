"""Writing the goldens: every file from nothing, byte for byte the same on every machine, or a check that it is.

Run as `tools/tables/regenerate_goldens.py` or `mxfp4ref regenerate`.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import hashlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from mxfp4ref._lock import locked
from mxfp4ref.goldens.store import (
    BUILTIN_ROOT,
    FORMAT,
    GoldenError,
    Goldens,
    dtype_name,
    find_root,
    is_other_file,
    tensor_bytes,
)
from mxfp4ref.goldens.cases import BUILTIN, DEFINITIONS
from mxfp4ref.goldens.cases.definition import Content, Definition

__all__ = ["build_case", "case_files", "main", "safetensors_bytes"]

SIZE_LIMIT = 32 << 20
_WRITING = ".writing-"  # how the names of unfinished files begin

_SAFETENSORS_DTYPES = {
    torch.bfloat16: "BF16",
    torch.bool: "BOOL",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.uint8: "U8",
}

Files = dict[str, bytes]


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
    sidecar = {
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
    return {"json": _json(sidecar), "safetensors": safetensors_bytes(dict(content.tensors))}


def build_case(case_id: str) -> Files:
    """The files of a case, from its definition alone."""
    definition = DEFINITIONS[case_id]
    return case_files(definition, definition.content())


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0 done or equal, 1 different, 2 wrong usage."""
    options = _parse(arguments)
    try:
        roots = [Path(options.root)] if options.root else _default_roots(writing=not options.check)
    except GoldenError as error:
        print(error, file=sys.stderr)
        return 2
    wanted = {root: _selected(root, "*") for root in roots}
    selected = {root: _selected(root, options.only) for root in roots}
    needed = [case_id for case_id in DEFINITIONS if any(case_id in ids for ids in selected.values())]
    if not needed:
        print(f"--only: no case matches {options.only!r}", file=sys.stderr)
        return 2
    start = time.monotonic()
    built = _build_all(needed, options.jobs)
    seconds = time.monotonic() - start

    status = 0
    for root in roots:
        cases = {case_id: built[case_id] for case_id in selected[root]}
        complete = selected[root] == wanted[root]
        if options.check:
            with locked(root):
                differences = _differences(root, cases, complete)
            print("\n".join(differences) or f"{root}: {len(cases)} cases, equal byte for byte")
            status = 1 if differences else status
        elif cases:
            root.mkdir(parents=True, exist_ok=True)
            with locked(root, exclusive=True):
                _write_tree(root, cases, complete)
            print(f"{root}: {len(cases)} cases written")
        with locked(root):
            size = _total_size(root)
        print(f"{root}: {size / 2**20:.2f} MiB in all")
        if size > SIZE_LIMIT:
            print(f"{root}: more than {SIZE_LIMIT >> 20} MiB", file=sys.stderr)
            status = 1
    print(f"generated {len(needed)} cases in {seconds:.1f} s with {options.jobs} processes")
    return status


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="regenerate_goldens", description="Write the goldens from nothing, or check that they can be."
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; list the differences and exit with 1"
    )
    parser.add_argument("--only", default="*", metavar="PATTERN", help="cases that match, as in 'gemm/*'")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)"
    )
    parser.add_argument(
        "--root", metavar="FOLDER", help="the goldens; by default those of the checkout and of the package"
    )
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs: expected at least 1, got {options.jobs}")
    return options


def _default_roots(*, writing: bool) -> list[Path]:
    """In a checkout its goldens and those of the package; elsewhere, to check only, those that are found.

    Raises:
        GoldenError: outside of a checkout, there is nothing to write to or nothing was found.
    """
    checkout = BUILTIN_ROOT.parents[2]
    if (checkout / "pyproject.toml").is_file():
        return [checkout / "goldens", BUILTIN_ROOT]
    if writing:
        raise GoldenError("--root: expected a folder to write to, because this is no checkout")
    return [find_root()]


def _selected(root: Path, pattern: str) -> list[str]:
    """The cases that match and that belong under the root."""
    return [
        case_id
        for case_id in DEFINITIONS
        if fnmatch.fnmatchcase(case_id, pattern) and (root != BUILTIN_ROOT or case_id in BUILTIN)
    ]


def _build_all(case_ids: list[str], jobs: int) -> dict[str, Files]:
    """The files of all cases. The large ones are started first."""
    ordered = sorted(case_ids, key=lambda case_id: not case_id.startswith("models/"))
    built = {}
    with _progress(len(ordered)) as advance:
        if jobs == 1:
            for case_id in ordered:
                built[case_id] = build_case(case_id)
                advance(case_id)
        else:
            with _executor(min(jobs, len(ordered))) as executor:
                futures = {executor.submit(build_case, case_id): case_id for case_id in ordered}
                for future in as_completed(futures):
                    built[futures[future]] = future.result()
                    advance(futures[future])
    return {case_id: built[case_id] for case_id in case_ids}


def _executor(jobs: int) -> Executor:
    # Spawned, because a fork of torch's thread pool can hang; one thread each, because the processes fill the cores.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(jobs, mp_context=context, initializer=torch.set_num_threads, initargs=(1,))


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """Call the result with the name of each finished case."""
    try:
        from rich.progress import Progress
    except ImportError:
        Progress = None  # type: ignore[assignment, misc]
    if Progress is None or not sys.stderr.isatty():
        done = 0

        def line(case_id: str) -> None:
            nonlocal done
            done += 1
            print(f"[{done:3}/{total}] {case_id}", file=sys.stderr, flush=True)

        yield line
        return
    from rich.console import Console

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("cases", total=total)
        yield lambda case_id: progress.update(task, advance=1, description=case_id)


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
        if not manifest.is_file() or manifest.read_bytes() != _manifest(_entries(cases)):
            differences.append(f"{manifest}: {'differs' if manifest.is_file() else 'missing'}")
        known = {f"{case_id}.{kind}" for case_id, files in cases.items() for kind in files}
        for path in sorted(path for path in root.rglob("*") if path.is_file()):
            relative = path.relative_to(root)
            if not is_other_file(relative) and relative.as_posix() not in known:
                differences.append(f"{path}: not a file of any case")
    return differences


def _write_tree(root: Path, cases: dict[str, Files], complete: bool) -> None:
    """Write the cases, then the manifest, then remove what is no longer a case. The root has to be locked.

    Every file is replaced in one step; after an interruption some cases may not be those of the manifest, which
    reading them reports.
    """
    # What a killed process was writing.
    for path in [*root.glob(f"{_WRITING}*"), *root.glob(f"*/{_WRITING}*")]:
        path.unlink()
    for case_id, files in cases.items():
        for kind, data in files.items():
            _write(root / f"{case_id}.{kind}", data)
    entries = {} if complete or not (root / "manifest.json").is_file() else Goldens(root).entries
    entries = {name: entry for name, entry in entries.items() if name in DEFINITIONS} | _entries(cases)
    _write(root / "manifest.json", _manifest(entries))
    known = {f"{name}.{kind}" for name in entries for kind in ("json", "safetensors")}
    for path in [*root.glob("*/*.json"), *root.glob("*/*.safetensors")]:
        relative = path.relative_to(root)
        if not is_other_file(relative) and relative.as_posix() not in known:
            path.unlink()


def _entries(cases: dict[str, Files]) -> dict[str, dict[str, dict[str, Any]]]:
    return {
        case_id: {
            kind: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for kind, data in files.items()
        }
        for case_id, files in cases.items()
    }


def _manifest(entries: dict[str, dict[str, dict[str, Any]]]) -> bytes:
    return _json({"format": FORMAT, "cases": entries})


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _write(path: Path, data: bytes) -> None:
    """Replace a file in one step, unless it has these bytes already."""
    if path.is_file() and path.read_bytes() == data:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=_WRITING)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _total_size(root: Path) -> int:
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
