"""Reading the goldens: stored cases, verified byte for byte before anything is compared with them.

A case is a safetensors file and a JSON sidecar beside it; `manifest.json` at the root has the size and the
SHA-256 of both. `goldens/README.md` defines every key. torch is imported when a case is loaded: names need none.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from safetensors import SafetensorError

from mxfp4ref._files import UNFINISHED, files_below, mismatch, parse_json, read_file
from mxfp4ref._lock import locked
from mxfp4ref._words import did_you_mean
from mxfp4ref.goldens.error import GoldenError
from mxfp4ref.goldens.manifest import FILE_KINDS, FORMAT, derived_bytes

if TYPE_CHECKING:
    from mxfp4ref.goldens.case import Case

__all__ = [
    "BUILTIN_ROOT",
    "FETCH",
    "KINDS",
    "GoldenError",
    "Goldens",
    "find_root",
    "is_other_file",
    "open_goldens",
]

KINDS = (
    *("moe", "quantize", "dequantize", "layout", "tensor_core", "gemm", "activation", "finalize"),
    *("routing", "w4a8", "preparation", "fp8_rows", "fp8_tensor_core"),
)
# In an installed package only: a wheel contains it, a checkout has all goldens.
BUILTIN_ROOT = Path(__file__).resolve().parent / "builtin"
_PACKAGE_PARENT = BUILTIN_ROOT.parents[2]
_ORDINARY = ("finalize/weights_with_a_routed_factor", "gemm/uneven_experts", "gemm/ordinary")
FETCH = "mxfp4ref goldens fetch goldens.tar --sha256 HASH --into goldens"  # how to get all

_T = TypeVar("_T")
_NAME = re.compile(r"[a-z0-9_]+/[a-z0-9_]+")
# Files of the root folder that belong there and are no cases.
_OTHER_FILES = ("README.md", "manifest.json", "defect_matrix.md", "defect_matrix.svg")
_OTHER_FOLDERS = ("hardware",)

_ENTRY = {kind: {"bytes": int, "sha256": str} for kind in FILE_KINDS}
_SIDECAR = {
    "format": (FORMAT,),
    "suite": str,
    "name": str,
    "kind": KINDS,
    "why": str,
    "catches": [str],
    "unique_for": str,
    "parameters": {"*": bool | int | float | str},
    "tensors": {"*": {"dtype": str, "shape": [int], "sha256": str}},
    "derived": {
        "*": {"shape": [int], "content": [int], "rule": str, "seed": int, "experts": [int], "sha256": str}
    },
    "outputs": [{"tensor": str, "tile_k": [[int, int]]}],
    "pending?": bool,
}


class Goldens:
    """The cases under one root folder; `open_goldens` finds it.

    If they are regenerated meanwhile, a case is read as it was before or as it is afterwards.

    Attributes:
        entries: for each case the size and SHA-256 of its files.
        sha256: of the manifest, and so of all files.
        of: how many cases there are: more than these, if they are the few that a wheel has.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        self.entries = self._manifest()

    def __repr__(self) -> str:
        return f"Goldens({str(self.root)!r}: {self.count} in {len(self.suites)} suites)"

    @property
    def count(self) -> str:
        """How many they are: "190 cases", "13 of 190 cases"."""
        few = f"{len(self.entries)} of " if len(self.entries) < self.of else ""
        return f"{few}{self.of} cases"

    def _manifest(self) -> dict[str, dict[str, dict[str, Any]]]:
        path = self.root / "manifest.json"
        data = _read(path)
        self.sha256 = hashlib.sha256(data).hexdigest()
        manifest = _parse(path, data)
        if wrong := mismatch(manifest, {"format": (FORMAT,), "cases": {"*": _ENTRY}, "of?": int}, "manifest"):
            raise GoldenError(f"{path}: {wrong}")
        cases: dict[str, dict[str, dict[str, Any]]] = manifest["cases"]
        for name in cases:
            if not _NAME.fullmatch(name):
                raise GoldenError(f"{path}: expected names of cases as suite/case, got {name!r}")
        self.of = max(manifest.get("of", 0), len(cases))
        return cases

    @property
    def suites(self) -> list[str]:
        return sorted({name.split("/")[0] for name in self.entries})

    def names(self, suite: str | None = None) -> list[str]:
        """The cases as "suite/name", sorted; of one suite or of all.

        Raises:
            GoldenError: no such suite.
        """
        if suite is not None and suite not in self.suites:
            hint = did_you_mean(suite, self.suites)
            raise GoldenError(f"suite: expected one of {', '.join(self.suites)}, got {suite!r}{hint}")
        return sorted(name for name in self.entries if suite in (None, name.split("/")[0]))

    def in_order_to_run(self) -> list[str]:
        """All cases, ordinary data first: most mistakes show on it, and few of them look alike there."""
        names = self.names()
        return list(dict.fromkeys([*(name for name in _ORDINARY if name in names), *names]))

    def load(self, name: str) -> Case:
        """A case, all of its bytes verified.

        Raises:
            GoldenError: no such case, or a file is missing, damaged, renamed or not the one in the manifest.
        """
        return self._read(lambda: self._load(name))

    def about(self, name: str, *, tensors: bool = False) -> dict[str, Any]:
        """What is said of a case, verified, without torch; with `tensors` their file is too; errors as of `load`.

        Beside the keys of its JSON file "bytes", as of `Case.nbytes`, but for the stored file's header.
        """
        sidecar, _ = self._read(lambda: self._stored(name) if tensors else self._sidecar(name))
        stored = self.entries[name]["safetensors"]["bytes"]
        return {**sidecar, "bytes": stored + derived_bytes(sidecar["derived"])}

    def _read(self, read: Callable[[], _T]) -> _T:
        """What `read` gives, of these entries or, if that fails, of those that are there once nobody writes."""
        try:
            return read()
        except GoldenError:
            pass
        # Damaged, or somebody is writing: once they are done, the manifest tells which.
        with locked(self.root):
            self.entries = self._manifest()
            return read()

    def _sidecar(self, name: str) -> tuple[dict[str, Any], Path]:
        """What is in a case's JSON file, and where its tensors are."""
        if name not in self.entries:
            hint = did_you_mean(name, self.entries)
            if len(self.entries) < self.of:
                hint += f"; these are {self.count}, the few that come with the package; to get all: {FETCH}"
            raise GoldenError(f"{name!r}: no such case in {self.root}{hint}")
        path = self.root / f"{name}.json"
        data = _read(path)
        _verify(str(path), data, self.entries[name]["json"])
        sidecar = _parse(path, data)
        if wrong := mismatch(sidecar, _SIDECAR, "case"):
            raise GoldenError(f"{path}: {wrong}")
        return sidecar, path.with_suffix(".safetensors")

    def _stored(self, name: str) -> tuple[dict[str, Any], bytes]:
        """What is in a case's JSON file, and the bytes of the other."""
        sidecar, path = self._sidecar(name)
        data = _read(path)
        _verify(str(path), data, self.entries[name]["safetensors"])
        return sidecar, data

    def _load(self, name: str) -> Case:
        import safetensors.torch

        from mxfp4ref.goldens.case import verified_case

        sidecar, data = self._stored(name)
        path = self.root / f"{name}.safetensors"
        try:
            tensors = safetensors.torch.load(data)
        except (SafetensorError, LookupError, TypeError, ValueError, RuntimeError) as error:
            raise GoldenError(f"{path}: expected tensors, got {type(error).__name__}: {error}") from error
        return verified_case(name, sidecar, tensors)

    def verify(self) -> list[str]:
        """Everything that is wrong with the files under the root, one line each; empty if nothing is.

        Raises:
            GoldenError: there is no manifest any more, or it is damaged.
        """
        with locked(self.root):
            self.entries = self._manifest()
            return self._problems()

    def _problems(self) -> list[str]:
        problems = []
        for name in self.names():
            try:
                self.load(name)
            except GoldenError as error:
                problems.append(str(error))
        known = {f"{name}.{kind}" for name in self.entries for kind in FILE_KINDS}
        for path in sorted(path for path in files_below(self.root, links=False) if path.is_file()):
            relative = path.relative_to(self.root)
            if not is_other_file(relative) and relative.as_posix() not in known:
                problems.append(f"{path}: not in the manifest")
        return problems


def open_goldens(root: Path | str | None = None) -> Goldens:
    """The goldens under `root`, or those that `find_root` finds.

    Raises:
        GoldenError: no manifest there, or not one of this format; or one without a case, as an interrupted
            `regenerate` leaves it, with which everything would agree.
    """
    found = Goldens(find_root() if root is None else Path(root))
    if not found.entries:
        raise GoldenError(f"{found.root}: expected goldens, got a manifest without a case")
    return found


def find_root() -> Path:
    """Where the goldens are: $MXFP4REF_GOLDENS; a folder `goldens` in the working directory or above it, or
    beside the package; else the small suite that is part of the package.

    Raises:
        GoldenError: $MXFP4REF_GOLDENS is set to a folder without a manifest, or nothing was found.
    """
    named = os.environ.get("MXFP4REF_GOLDENS")
    if named:
        if not (Path(named) / "manifest.json").is_file():
            raise GoldenError(f"MXFP4REF_GOLDENS: expected a folder with a manifest.json, got {named!r}")
        return Path(named)
    above = Path.cwd().resolve()
    for folder in (above, *above.parents, _PACKAGE_PARENT):
        manifest = folder / "goldens" / "manifest.json"
        if manifest.is_file() and _is_ours(manifest):
            return manifest.parent
    if not (BUILTIN_ROOT / "manifest.json").is_file():
        raise GoldenError(
            "no goldens found: set MXFP4REF_GOLDENS to a folder with a manifest.json, or run `mxfp4ref regenerate` "
            "in a checkout"
        )
    return BUILTIN_ROOT


def is_other_file(relative: Path) -> bool:
    """Whether a path below a root belongs there without being part of a case."""
    unfinished = UNFINISHED.fullmatch(relative.name) is not None
    return unfinished or relative.parts[0] in _OTHER_FOLDERS or relative.as_posix() in _OTHER_FILES


def _is_ours(manifest: Path) -> bool:
    """Whether that is a manifest of this format, whatever else it may be: other projects have goldens too."""
    try:
        return _parse(manifest, _read(manifest)).get("format") == FORMAT
    except GoldenError:
        return False


def _read(path: Path) -> bytes:
    try:
        return read_file(path)
    except OSError as error:
        gone = isinstance(error, FileNotFoundError) and path.name == "manifest.json"
        hint = f"; to get goldens: {FETCH}" if gone else ""
        raise GoldenError(f"{path}: cannot be read: {error.strerror}{hint}") from error


def _parse(path: Path, data: bytes) -> dict[str, Any]:
    try:
        value = parse_json(data)
    except ValueError as error:
        raise GoldenError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise GoldenError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _verify(where: str, data: bytes, recorded: Mapping[str, Any]) -> None:
    if len(data) != recorded.get("bytes"):
        raise GoldenError(f"{where}: expected {recorded.get('bytes')} bytes, got {len(data)}: truncated?")
    digest = hashlib.sha256(data).hexdigest()
    if digest != recorded.get("sha256"):
        raise GoldenError(f"{where}: expected SHA-256 {recorded.get('sha256')}, got {digest}: damaged?")
