"""Files that may be anything, read if they are files and written whole or not at all; text from them, to be shown."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

from mxfp4ref._words import did_you_mean, shown

__all__ = [
    "UNFINISHED",
    "check_no_input",
    "check_outside",
    "check_replaceable",
    "files_below",
    "folders_below",
    "mismatch",
    "name_in_utf8",
    "naming",
    "parse_json",
    "printable",
    "quoted",
    "read_file",
    "replacing",
    "write_file",
    "write_tree",
]


_LARGEST = 1 << 30
UNFINISHED = re.compile(r"\.writing-[0-9a-f]{32}")  # the names of files that a killed process leaves


def read_file(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        OSError: it cannot be read, is no regular file (a pipe would be waited for, a device may never end), or is
            larger than any file that is read at once.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "expected a regular file", str(path))
        if status.st_size > _LARGEST:
            raise OSError(
                errno.EFBIG, f"expected at most {_LARGEST:,} bytes, got {status.st_size:,}", str(path)
            )
        with open(descriptor, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


def folders_below(root: Path, *, links: bool = True) -> Iterator[tuple[Path, list[str], list[str]]]:
    """A folder and all below, each with the names of its folders and files, sorted: as `os.walk`, topmost first.

    No folder is entered twice, whatever leads to it, and they may be nested as deeply as the system lets them.

    Args:
        root: where to begin.
        links: follow links to folders.

    Raises:
        OSError: a folder cannot be read.
    """
    seen = set()
    left = [root]
    while left:
        place = left.pop()
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(place) as found:
            entries = sorted((entry.name, _is_folder(entry), entry.is_symlink()) for entry in found)
        folders = [name for name, is_folder, _ in entries if is_folder]
        yield place, folders, [name for name, is_folder, _ in entries if not is_folder]
        entered = [name for name, is_folder, is_link in entries if is_folder and (links or not is_link)]
        left += [place / name for name in reversed(entered)]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def files_below(root: Path, *, links: bool = True) -> Iterator[Path]:
    """All files below a folder, in the order of `folders_below`, and with its errors."""
    return (place / name for place, _, files in folders_below(root, links=links) for name in files)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Inside, an error that tells no file, as Python's of a full disk, or an unfinished one, tells this one."""
    try:
        yield
    except OSError as error:
        if error.errno and (error.filename is None or UNFINISHED.search(str(error.filename))):
            error.filename = str(path)
        raise


def parse_json(data: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is no JSON, nested too deeply, or an object in it has a key twice.
    """
    try:
        return json.loads(data, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} is there twice")
        found[key] = value
    return found


def mismatch(value: Any, wanted: Any, where: str) -> str:
    """Where a JSON value is not as wanted, in words; "" if it is.

    Args:
        value: what `parse_json` gave.
        wanted: a type, or several (`int | str`; a bool is no int); a tuple of allowed values; a list of one such, for
            any number of them, or of several, for exactly these; an object of them by key, where one that ends in "?"
            may be missing, and "*" is every other key.
        where: the value's name for the message.
    """
    if isinstance(wanted, dict):
        if not isinstance(value, dict):
            return f"{where}: expected an object, got {shown(value)}"
        named = {key.removesuffix("?"): want for key, want in wanted.items()}
        parts = [
            (item, named.get(key, wanted.get("*", object)), f"{where}.{key}") for key, item in value.items()
        ]
    elif isinstance(wanted, list):
        if not isinstance(value, list) or len(wanted) not in (1, len(value)):
            return f"{where}: expected a list{f' of {len(wanted)}' * (len(wanted) > 1)}, got {shown(value)}"
        every = wanted * len(value) if len(wanted) == 1 else wanted
        parts = [
            (item, want, f"{where}[{i}]") for i, (item, want) in enumerate(zip(value, every, strict=True))
        ]
    elif isinstance(wanted, tuple):
        listed = ", ".join(map(repr, wanted))
        fits = any(type(value) is type(choice) and value == choice for choice in wanted)
        return (
            "" if fits else f"{where}: expected {'one of ' * (len(wanted) > 1)}{listed}, got {shown(value)}"
        )
    else:
        types = get_args(wanted) or (wanted,)
        fits = isinstance(value, types) and not (isinstance(value, bool) and not {bool, object} & set(types))
        return (
            "" if fits else f"{where}: expected {' or '.join(t.__name__ for t in types)}, got {shown(value)}"
        )
    if wrong := next((wrong for part in parts if (wrong := mismatch(*part))), ""):
        return wrong
    missing = (
        [key for key in wanted if key not in ("*", *value) and key[-1] != "?"]
        if isinstance(wanted, dict)
        else []
    )
    if not missing:
        return ""
    near = [key for key in value if key not in named and did_you_mean(key, missing[:1])]
    meant = f"; {near[0]!r} is spelt nearly so" if near else ""
    return f"{where}: expected the key {missing[0]!r}, got {shown(list(value))}{meant}"


@contextmanager
def name_in_utf8(path: Path) -> Iterator[Path]:
    """A name of that file, inside only, for libraries that take no other than in UTF-8, as safetensors and torch.

    A file's name may be any bytes; the one of an open file or folder is not. To write, the last part has to be UTF-8.
    """
    text = str(path)
    if _is_utf8(text) or not Path("/proc/self/fd").is_dir():
        yield path
        return
    beside = _is_utf8(path.name)
    descriptor = os.open(path.parent if beside else path, os.O_RDONLY)
    try:
        yield Path(f"/proc/self/fd/{descriptor}", path.name if beside else "")
    finally:
        os.close(descriptor)


def _is_utf8(name: str) -> bool:
    return name.encode(errors="replace").decode() == name


def check_no_input(path: Path, inputs: Iterable[Path]) -> None:
    """Raise ValueError if a file that is to be written is one of the inputs, under whatever name, hard links too."""
    if path.exists():
        for other in inputs:
            if other.exists() and os.path.samefile(path, other):
                raise ValueError(f"{path}: expected another file than the input {other} to write to")


def check_outside(name: str, path: Path, goldens: Path) -> None:
    """Raise ValueError if what is to be written would lie among goldens, of which it is none."""
    if Path(os.path.realpath(path)).is_relative_to(os.path.realpath(goldens)):
        raise ValueError(f"{name}: expected one outside of the goldens in {goldens}, got {str(path)!r}")


def check_replaceable(path: Path, root: Path | None = None) -> None:
    """Raise OSError if a file cannot be written by `replacing`, as far as that can be known before."""
    if _is_device(path):
        return
    links = [path]
    if root is not None:
        links += [root / folder for folder in path.relative_to(root).parents if folder != Path()]
    for link in links:
        if link.is_symlink():
            leads = os.path.realpath(link)
            raise OSError(errno.ELOOP, f"expected no link to write to, it leads to {leads}", str(link))
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "expected a file to write to, it is a folder", str(path))
    if path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, "expected a file that may be written to", str(path))
    if path.parent.exists() and not os.access(path.parent, os.W_OK):
        raise PermissionError(errno.EACCES, "expected a folder that may be written to", str(path.parent))


def _is_device(path: Path) -> bool:
    """Whether it is there, and no file or folder: a pipe, too."""
    return path.exists() and not (path.is_file() or path.is_dir())


@contextmanager
def replacing(path: Path, root: Path | None = None) -> Iterator[Path]:
    """The name of a new file beside `path`, which takes its place at the end, in one step.

    An interruption or an error leaves what was there as it was. Pipes and devices are written to as they are.

    Args:
        path: what to write.
        root: a folder above it; what is missing between is created.

    Raises:
        OSError: it cannot be written, is a link or a folder, or a folder between it and `root` is a link.
    """
    if _is_device(path):
        with (
            tempfile.TemporaryDirectory() as folder
        ):  # not by its name, which libraries may give to another file
            yield Path(folder, "partial")
            with Path(folder, "partial").open("rb") as source, path.open("wb") as target:
                shutil.copyfileobj(source, target)
        return
    check_replaceable(path, root)
    if root is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".writing-{uuid.uuid4().hex}")
    try:
        with naming(path):
            yield partial
            if path.exists():
                os.chmod(partial, stat.S_IMODE(path.stat().st_mode))
            descriptor = os.open(partial, os.O_RDWR)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_file(path: Path, data: str | bytes, root: Path | None = None) -> None:
    """Write a file, text as UTF-8, whole or not at all; as `replacing`."""
    with replacing(path, root) as partial:
        partial.write_bytes(data.encode() if isinstance(data, str) else data)


def write_tree(root: Path, files: Mapping[Path, str | bytes]) -> None:
    """Write files below a root, each as `write_file`; none if one of them is there with other bytes.

    Raises:
        OSError: as of `replacing`, or somebody else's file would be lost.
    """
    for name, data in files.items():
        path, new = root / name, data.encode() if isinstance(data, str) else data
        if path.is_file() and not (path.stat().st_size == len(new) and read_file(path) == new):
            raise FileExistsError(
                errno.EEXIST, "expected no file, or one with the bytes that would be written", str(path)
            )
    for name, data in files.items():
        write_file(root / name, data, root)


def printable(text: str, *, lines: bool = True) -> str:
    """Text of which all can be seen, in several lines or, without `lines`, in one.

    Control characters, marks of direction and lone surrogates are escaped as in Python: they would command a
    terminal, or break an XML or UTF-8 file.
    """
    if text.isprintable():
        return text
    kept = "\n\t" if lines else ""
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)


def quoted(word: str) -> str:
    """For a shell, as text of which all can be seen: the bytes of a file's name that are none stand in $'...'."""
    if word.isprintable():
        return shlex.quote(word)
    parts = (
        c if c.isprintable() else "".join(f"\\x{byte:02x}" for byte in _encoded(c))
        for c in re.sub(r"[\\']", r"\\\g<0>", word)
    )
    return f"$'{''.join(parts)}'"


def _encoded(character: str) -> bytes:
    """In UTF-8; what stands for a byte of a file's name, as that byte."""
    return character.encode(
        "utf-8", "surrogateescape" if "\udc80" <= character <= "\udcff" else "surrogatepass"
    )
