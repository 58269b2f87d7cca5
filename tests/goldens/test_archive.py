"""Goldens in one file: equal bytes for equal goldens, unpacked whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import resource
import shutil
import socket
import stat
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from click.testing import CliRunner

from mxfp4ref.__main__ import commands
from mxfp4ref.goldens import GoldenError, Goldens, open_goldens
from mxfp4ref.goldens.archive import fetch_archive, write_archive
from mxfp4ref.goldens.manifest import manifest_bytes

CASES = ("finalize/slot_order", "layout/swap_halves")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two cases, with what else belongs to goldens."""
    source, root = open_goldens(), tmp_path_factory.mktemp("packed") / "goldens"
    for name in CASES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        for kind in ("json", "safetensors"):
            shutil.copy(source.root / f"{name}.{kind}", root / f"{name}.{kind}")
    (root / "manifest.json").write_bytes(manifest_bytes({name: source.entries[name] for name in CASES}))
    (root / "hardware").mkdir()
    (root / "hardware" / "a-gpu.jsonl").write_text("{}\n")
    return root


@pytest.fixture(scope="module")
def archive(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    path = tmp_path_factory.mktemp("archive") / "goldens.tar"
    return path, write_archive(Goldens(root), path)


def files_in(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_equal_goldens_are_equal_bytes(root: Path, archive: tuple[Path, str], tmp_path: Path) -> None:
    path, digest = archive
    assert hashlib.sha256(path.read_bytes()).hexdigest() == digest
    copy = tmp_path / "copy"
    for name in sorted(files_in(root), reverse=True):  # in another order, at another time, with other modes
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((root / name).read_bytes())
        os.chmod(copy / name, 0o600)
        os.utime(copy / name, (1, 1))
    (copy / f".writing-{'0' * 32}").write_text("left by a process that was killed")
    assert write_archive(Goldens(copy), tmp_path / "second.tar") == digest


def test_what_is_damaged_is_not_packed(root: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    (copy / f"{CASES[0]}.json").write_text("{}")
    with pytest.raises(GoldenError, match=r"slot_order.json: expected \d+ bytes"):
        write_archive(Goldens(copy), tmp_path / "a.tar")
    shutil.copy(root / f"{CASES[0]}.json", copy / f"{CASES[0]}.json")
    (copy / "hardware" / "my gpu.jsonl").write_text("{}\n")
    with pytest.raises(GoldenError, match=r"got 'hardware/my gpu\.jsonl'"):  # which no fetch would take
        write_archive(Goldens(copy), tmp_path / "a.tar")
    assert os.listdir(tmp_path) == ["copy"]


def test_unpacked_from_a_path(root: Path, archive: tuple[Path, str], tmp_path: Path) -> None:
    sizes: list[int] = []
    found = fetch_archive(str(archive[0]), archive[1].upper(), tmp_path / "got", sizes.append)
    assert files_in(found.root) == files_in(root)
    assert sizes[-1] == archive[0].stat().st_size
    assert os.listdir(tmp_path) == ["got"]
    (tmp_path / "empty").mkdir(mode=0o700)
    assert fetch_archive(str(archive[0]), archive[1], tmp_path / "empty").names() == list(CASES)
    assert (tmp_path / "empty").stat().st_mode & 0o777 == 0o700


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def address(archive: tuple[Path, str]) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(archive[0].parent))) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_unpacked_from_a_url(address: str, archive: tuple[Path, str], tmp_path: Path) -> None:
    assert fetch_archive(f"{address}/goldens.tar", archive[1], tmp_path / "got").names() == list(CASES)
    with pytest.raises(OSError, match=r"missing\.tar: cannot be read: HTTP Error 404"):
        fetch_archive(f"{address}/missing.tar", archive[1], tmp_path / "other")
    assert os.listdir(tmp_path) == ["got"]


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (b"no HTTP\r\n\r\n", "cannot be read: BadStatusLine"),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n100\r\nabc",
            "cannot be read: IncompleteRead",
        ),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nabc", "ended after 3 bytes, 97 before its end"),
    ],
)
def test_what_answers_may_be_anything(tmp_path: Path, reply: bytes, message: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            with server.accept()[0] as connection:
                connection.recv(1 << 16)
                connection.sendall(reply)

        thread = threading.Thread(target=answer)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/goldens.tar"
        with pytest.raises(OSError, match=message):
            fetch_archive(url, "0" * 64, tmp_path / "got")
        thread.join()
    assert os.listdir(tmp_path) == []


def test_a_source_is_a_file(archive: tuple[Path, str], tmp_path: Path) -> None:
    """A pipe would be waited for; what cannot be an address is said."""
    os.mkfifo(tmp_path / "pipe")
    for source in (str(tmp_path / "pipe"), (tmp_path / "pipe").as_uri()):
        with pytest.raises(FileNotFoundError, match="there is no such file"):
            fetch_archive(source, archive[1], tmp_path / "got")
    with pytest.raises(OSError, match="cannot be read: InvalidURL"):
        fetch_archive("http://127.0.0.1:port/", archive[1], tmp_path / "got")
    assert fetch_archive(archive[0].as_uri(), archive[1], tmp_path / "got").names() == list(CASES)


def test_a_sparse_file_is_none_of_goldens(archive: tuple[Path, str], tmp_path: Path) -> None:
    """A few bytes of an archive may stand for a terabyte of zeros."""
    path, (about, data) = tmp_path / "bad.tar", member("hardware/zeros")
    path.write_bytes(archive[0].read_bytes())
    about.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.map": "0,1"}
    about.pax_headers["GNU.sparse.size"] = str(1 << 20)
    with tarfile.open(path, "a", format=tarfile.PAX_FORMAT) as members:
        members.addfile(about, io.BytesIO(data))
    with pytest.raises(ValueError, match="expected files of goldens only, got 'hardware/zeros'"):
        fetch_archive(str(path), hashlib.sha256(path.read_bytes()).hexdigest(), tmp_path / "got")


def test_another_archive_is_not_unpacked(archive: tuple[Path, str], tmp_path: Path) -> None:
    path, digest = archive
    for other, message in (("0" * 64, f"SHA-256 {'0' * 64}, got {digest}"), ("abc", "64 hexadecimal digits")):
        with pytest.raises(ValueError, match=message):
            fetch_archive(str(path), other, tmp_path / "got")
    with pytest.raises(ValueError, match="source: expected a path or a URL of https"):
        fetch_archive("ftp://here/goldens.tar", digest, tmp_path / "got")
    assert os.listdir(tmp_path) == []


def test_no_archive_goes_into_the_goldens(root: Path) -> None:
    """They would not be as their manifest says any more."""
    result = CliRunner().invoke(commands, ["goldens", "pack", str(root / "a.tar"), "--goldens", str(root)])
    assert (result.exit_code, "expected one outside of the goldens" in result.output) == (2, True)
    assert not (root / "a.tar").exists()


def test_nothing_is_replaced(archive: tuple[Path, str], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("mine", "mine/file", "link"):
        with pytest.raises(FileExistsError, match="expected a folder that is not there yet, or is empty"):
            fetch_archive(str(archive[0]), archive[1], tmp_path / name)
    assert files_in(tmp_path) == {"mine/file": b"mine"}
    assert not (tmp_path / "nowhere").exists()


def test_two_who_unpack_into_one_folder(archive: tuple[Path, str], tmp_path: Path) -> None:
    """The second one says so, in words of its own."""

    def another(size: int) -> None:
        if not (tmp_path / "got").exists():
            fetch_archive(str(archive[0]), archive[1], tmp_path / "got")

    with pytest.raises(FileExistsError, match=r"got: somebody else has put something there meanwhile$"):
        fetch_archive(str(archive[0]), archive[1], tmp_path / "got", another)
    assert os.listdir(tmp_path) == ["got"]
    assert not open_goldens(tmp_path / "got").verify()


def test_a_folder_that_cannot_be_replaced_is_refused_at_once(
    archive: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(size: int) -> None:
        raise AssertionError("nothing is to be read")

    def busy(source: Path, target: Path) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    empty = tmp_path / "empty"
    empty.mkdir()
    with monkeypatch.context() as patch:
        patch.chdir(empty)
        with pytest.raises(OSError, match=r"it is the working directory; write \S+/empty/goldens"):
            fetch_archive(str(archive[0]), archive[1], Path("."), read)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", busy)
        with pytest.raises(OSError, match=r"it is a mount point; write \S+/empty/goldens"):
            fetch_archive(str(archive[0]), archive[1], empty, read)
    assert (os.listdir(tmp_path), os.listdir(empty)) == (["empty"], [])
    empty.chmod(0o750)
    fetch_archive(str(archive[0]), archive[1], empty)
    assert stat.S_IMODE(empty.stat().st_mode) == 0o750


@pytest.mark.parametrize("target", ["secret", "folder", "nowhere"])
def test_links_are_not_packed(root: Path, tmp_path: Path, target: str) -> None:
    """What they lead to is not of the goldens, and may be nobody else's business."""
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "folder").mkdir()
    (copy / "hardware" / "b.jsonl").symlink_to(tmp_path / target)
    with pytest.raises(GoldenError, match=rf"hardware/b\.jsonl: expected no link, it leads to '.*{target}'"):
        write_archive(Goldens(copy), tmp_path / "a.tar")
    assert not (tmp_path / "a.tar").exists()


def member(
    name: str, data: bytes = b"x", kind: bytes = tarfile.REGTYPE, link: str = ""
) -> tuple[tarfile.TarInfo, bytes]:
    about = tarfile.TarInfo(name)
    about.size, about.type, about.linkname = len(data), kind, link
    return about, data


@pytest.mark.parametrize(
    "bad",
    [
        member("../finalize/slot_order.json"),
        member("hardware/../../evil"),
        member("/hardware/evil"),
        member("hardware/..\\..\\evil"),
        member("hardware//evil"),
        member("setup.py"),
        member("finalize/slot_order.py"),
        member("README.md", b"", tarfile.SYMTYPE, "/etc/passwd"),
        member("README.md", b"", tarfile.LNKTYPE, "manifest.json"),
        member("hardware", b"", tarfile.DIRTYPE),
        member("hardware/device", b"", tarfile.CHRTYPE),
    ],
    ids=lambda bad: f"{bad[0].name} {bad[0].type!r}",
)
def test_an_archive_holds_files_of_goldens_only(
    archive: tuple[Path, str], tmp_path: Path, bad: tuple[tarfile.TarInfo, bytes]
) -> None:
    path = tmp_path / "bad.tar"
    path.write_bytes(archive[0].read_bytes())
    with tarfile.open(path, "a") as members:
        members.addfile(bad[0], io.BytesIO(bad[1]))
    with pytest.raises(ValueError, match="expected files of goldens only, got"):
        fetch_archive(str(path), hashlib.sha256(path.read_bytes()).hexdigest(), tmp_path / "got")
    assert os.listdir(tmp_path) == ["bad.tar"]


@pytest.mark.parametrize("what", ["twice", "truncated", "not tar", "incomplete", "foreign"])
def test_nothing_half_is_left(archive: tuple[Path, str], tmp_path: Path, what: str) -> None:
    path, data = tmp_path / "bad.tar", archive[0].read_bytes()
    if what == "not tar":
        data = b"no archive" * 1000
    if what == "truncated":
        data = data[: len(data) // 2]
    path.write_bytes(data)
    if what in ("twice", "incomplete", "foreign"):
        entries = dict(open_goldens().entries)
        manifest = manifest_bytes({name: entries[name] for name in (*CASES, "gemm/ordinary")})
        added = {
            "twice": member("README.md"),
            "incomplete": member("manifest.json", manifest),
            "foreign": member("layout/other.json"),
        }[what]
        with tarfile.open(archive[0]) as old, tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as new:
            for one in old:
                if one.name != added[0].name:
                    new.addfile(one, old.extractfile(one))
            for _ in range(2 if what == "twice" else 1):
                new.addfile(added[0], io.BytesIO(added[1]))
    with pytest.raises((ValueError, GoldenError)) as raised:
        fetch_archive(str(path), hashlib.sha256(path.read_bytes()).hexdigest(), tmp_path / "got")
    assert ".writing-" not in str(raised.value)
    assert os.listdir(tmp_path) == ["bad.tar"]


@pytest.mark.parametrize("size", [1000, 70_000])
def test_a_full_disk_is_told_with_the_folder(archive: tuple[Path, str], tmp_path: Path, size: int) -> None:
    path, digest = archive
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))  # which Python answers by an error
    try:
        with pytest.raises(OSError, match=rf"File too large: '{tmp_path / 'new'}'"):
            fetch_archive(str(path), digest, tmp_path / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [*tmp_path.iterdir()] == []


def test_an_interruption_leaves_nothing(archive: tuple[Path, str], tmp_path: Path) -> None:
    def interrupt(size: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_archive(str(archive[0]), archive[1], tmp_path / "got", interrupt)
    assert os.listdir(tmp_path) == []


def test_commands(
    root: Path, archive: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def invoke(*arguments: str | Path) -> tuple[int, str]:
        result = CliRunner().invoke(commands, ["goldens", *map(str, arguments)])
        return result.exit_code, result.output

    code, output = invoke("pack", tmp_path / "a.tar", "--goldens", root)
    assert (code, output.splitlines()[-1]) == (0, archive[1])
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        result = CliRunner().invoke(commands, ["goldens", "pack", "-", "--goldens", str(root)])
        assert result.exit_code == 0, result.output
        assert result.stdout_bytes == (tmp_path / "a.tar").read_bytes()
        assert result.stderr.splitlines()[-1] == archive[1]
        assert os.listdir() == ["a.tar"]
    into = tmp_path / "with space"
    code, output = invoke("fetch", tmp_path / "a.tar", "--sha256", archive[1], "--into", into)
    assert code == 0
    assert f"2 cases\nto use them: export MXFP4REF_GOLDENS='{into}'" in output
    assert json.loads((into / "manifest.json").read_bytes())["cases"].keys() == set(CASES)
    code, output = invoke("fetch", tmp_path / "a.tar", "--sha256", archive[1], "--into", into)
    assert (code, "expected a folder that is not there yet" in output) == (2, True)
    code, output = invoke("pack", into / "manifest.json", "--goldens", into)
    assert (code, "expected another file than the input" in output) == (2, True)
