"""Goldens in one file: written so that equal goldens are equal bytes, and unpacked whole or not at all.

It is a tar archive without compression, since other versions of a compressor give other bytes. The files are those
that the manifest lists, and what else belongs to goldens; owners, times and modes are left out.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import io
import os
import re
import shutil
import stat
import tarfile
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from mxfp4ref._files import UNFINISHED, folders_below, naming, read_file, replacing
from mxfp4ref._lock import locked
from mxfp4ref._validate import shown
from mxfp4ref.goldens.manifest import FILE_KINDS
from mxfp4ref.goldens.store import GoldenError, Goldens, is_other_file, open_goldens

__all__ = ["fetch_archive", "write_archive"]

_LARGEST = 1 << 30  # bytes of an archive
_CHUNK = 1 << 20
_SECONDS = 60  # without a byte of a download
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_CASE = re.compile(rf"[a-z0-9_]+/[a-z0-9_]+\.({'|'.join(FILE_KINDS)})")
_PART = re.compile(r"[A-Za-z0-9_.-]+")
_SCHEMES = ("https", "http", "file")

Progress = Callable[[int], None]


def write_archive(goldens: Goldens, path: Path) -> str:
    """Write all files of the goldens to a tar archive; its SHA-256.

    Raises:
        GoldenError: a file is missing or damaged, or one that no case needs is a link.
        OSError: the archive cannot be written.
    """
    with locked(goldens.root):
        goldens = Goldens(goldens.root)
        if problems := goldens.verify():
            raise GoldenError(f"{goldens.root}: expected the files of the manifest: {problems[0]}")
        with replacing(path) as partial, partial.open("xb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
                for name in _files_of(goldens):
                    data = read_file(goldens.root / name)
                    about = tarfile.TarInfo(name)
                    about.size = len(data)
                    archive.addfile(about, io.BytesIO(data))
            file.flush()
            with partial.open("rb") as written:
                return hashlib.file_digest(written, "sha256").hexdigest()


def _files_of(goldens: Goldens) -> list[str]:
    """What is to be packed, sorted."""
    cases = [f"{name}.{kind}" for name in goldens.entries for kind in FILE_KINDS]
    below = [
        place / name
        for place, folders, files in folders_below(goldens.root, links=False)
        for name in (*folders, *files)
        if is_other_file((place / name).relative_to(goldens.root))
    ]
    if link := next((p for p in below if p.is_symlink()), None):
        raise GoldenError(
            f"{link}: expected no link, it leads to {os.readlink(link)!r}; put a file in its place"
        )
    files = (p.relative_to(goldens.root) for p in below if p.is_file() and not UNFINISHED.fullmatch(p.name))
    others = [p.as_posix() for p in files]
    if odd := [name for name in others if not _usual(name)]:
        raise GoldenError(f"{goldens.root}: expected names of letters, digits and _.-, got {shown(odd[0])}")
    return sorted({*cases, *others})


def _usual(name: str) -> bool:
    """Whether a name is the same file on every system."""
    return all(_PART.fullmatch(part) and part.strip(".") for part in name.split("/"))


def fetch_archive(source: str, sha256: str, folder: Path, progress: Progress = lambda size: None) -> Goldens:
    """Unpack an archive that `write_archive` wrote into a folder, whole or not at all.

    Args:
        source: its path or URL.
        sha256: of the archive, in hexadecimal; nothing is unpacked of one that has another.
        folder: that is not there yet, or empty.
        progress: called with the number of bytes that have come, again and again.

    Raises:
        ValueError: `sha256` or `source` is something else, or the archive has another SHA-256 or other files in it.
        GoldenError: what was unpacked is no goldens.
        OSError: it cannot be read or written, or the folder has something in it or cannot be replaced, as a mount
            point and the working directory.
    """
    if not _SHA256.fullmatch(sha256):
        raise ValueError(f"sha256: expected 64 hexadecimal digits, got {shown(sha256)}")
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise FileExistsError(f"{folder}: expected a folder that is not there yet, or is empty")
    folder = folder.absolute()
    if not folder.parent.is_dir():
        raise FileNotFoundError(f"{folder}: there is no folder {folder.parent}")
    with naming(folder), _beside(folder) as place:
        if folder.exists():
            _check_replaceable(folder, place)
        archive, unpacked = place / "archive", place / "goldens"
        found = _copy(source, archive, progress)
        if found != sha256.lower():
            raise ValueError(f"{source}: expected an archive with SHA-256 {sha256.lower()}, got {found}")
        unpacked.mkdir()
        _unpack(archive, unpacked, source)
        try:
            problems = open_goldens(unpacked).verify()
        except GoldenError as error:
            problems = [str(error)]
        if problems:
            raise GoldenError(f"{source}: {problems[0].replace(f'{unpacked}{os.sep}', '')}")
        if folder.exists():
            os.chmod(unpacked, stat.S_IMODE(folder.stat().st_mode))
        try:
            os.replace(unpacked, folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise FileExistsError(f"{folder}: somebody else has put something there meanwhile") from error
    return Goldens(folder)


def _check_replaceable(folder: Path, place: Path) -> None:
    """Refuse an empty folder in whose place, at the end, another one could not be put; tried with one as empty."""
    what = "the working directory" if os.path.samefile(folder, os.curdir) else ""
    if not what:
        empty = place / "empty"
        empty.mkdir()
        os.chmod(empty, stat.S_IMODE(folder.stat().st_mode))
        try:
            os.replace(empty, folder)
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.EXDEV, errno.EINVAL):
                raise
            what = "a mount point"
    if what:
        raise OSError(
            errno.EBUSY,
            f"expected a folder that can be replaced, it is {what}; write {folder / 'goldens'}",
            str(folder),
        )


@contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """A new folder beside another one, removed at the end."""
    place = folder.parent / f".writing-{uuid.uuid4().hex}"
    place.mkdir()
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _copy(source: str, target: Path, progress: Progress) -> str:
    """Copy a file or what a URL gives; its SHA-256."""
    digest, size = hashlib.sha256(), 0
    with _opened(source) as stream, naming(target), target.open("xb") as file:
        while chunk := _chunk(stream, source):
            size += len(chunk)
            if size > _LARGEST:
                raise ValueError(f"{source}: expected at most {_LARGEST:,} bytes, got more")
            digest.update(chunk)
            file.write(chunk)
            progress(size)
        missing = getattr(stream, "length", None)  # of a download that has ended early
    if missing:
        raise OSError(f"{source}: ended after {size:,} bytes, {missing:,} before its end")
    return digest.hexdigest()


def _chunk(stream: IO[bytes], source: str) -> bytes:
    try:
        return stream.read(_CHUNK)
    except (OSError, http.client.HTTPException) as error:
        raise _unreadable(source, error) from error


def _unreadable(source: str, error: Exception) -> OSError:
    words = error if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
    return OSError(f"{source}: cannot be read: {words}")


def _opened(source: str) -> IO[bytes]:
    scheme, separator, _ = source.partition("://")
    if separator and scheme.lower() not in _SCHEMES:
        raise ValueError(f"source: expected a path or a URL of {', '.join(_SCHEMES)}, got {shown(source)}")
    if separator and scheme.lower() != "file":
        try:
            stream: IO[bytes] = urllib.request.urlopen(source, timeout=_SECONDS)
        except (OSError, http.client.HTTPException) as error:
            raise _unreadable(source, error) from error
        return stream
    path = Path(urllib.request.url2pathname(urllib.parse.urlsplit(source).path) if separator else source)
    if not path.is_file():
        raise FileNotFoundError(f"{source}: there is no such file")
    return path.open("rb")


def _unpack(archive: Path, folder: Path, source: str) -> None:
    """Write the files of an archive below a folder: nothing but plain files of the names that goldens have."""
    try:
        with tarfile.open(archive, "r:") as members:
            for member in members:
                parts = member.name.split("/")
                if not (
                    member.isreg()
                    and not member.issparse()  # a few bytes that say that they are many
                    and _usual(member.name)
                    and (_CASE.fullmatch(member.name) or is_other_file(Path(*parts)))
                ):
                    raise ValueError(f"{source}: expected files of goldens only, got {shown(member.name)}")
                stream = members.extractfile(member)
                assert stream is not None
                path = folder.joinpath(*parts)
                if path.exists():
                    raise ValueError(f"{source}: expected each file once, got {member.name} twice")
                path.parent.mkdir(parents=True, exist_ok=True)
                with naming(path), path.open("xb") as file:
                    shutil.copyfileobj(stream, file)
    except tarfile.TarError as error:
        raise ValueError(f"{source}: expected a tar archive, got {type(error).__name__}: {error}") from error
