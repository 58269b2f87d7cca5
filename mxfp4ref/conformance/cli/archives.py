"""The commands on goldens as one file: `goldens pack` writes it, `goldens fetch` unpacks it."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import click

from mxfp4ref._files import check_no_input, check_outside, files_below, quoted
from mxfp4ref.conformance.cli.command import Group
from mxfp4ref.conformance.cli.progress import progress
from mxfp4ref.conformance.cli.shared import goldens_option, usage_errors
from mxfp4ref.conformance.cli.terminal import echo
from mxfp4ref.goldens import open_goldens

__all__ = ["archive"]


@click.group("goldens", cls=Group)
def archive() -> None:
    """Get all goldens as one file, or write that file.

    What is installed with pip has a few cases only.

    \b
    mxfp4ref goldens fetch goldens.tar --sha256 HASH --into all_goldens
    """


@archive.command()
@click.argument("source")
@click.option(
    "--sha256", required=True, metavar="HASH", help="Of the file; nothing is unpacked of another one."
)
@click.option(
    "--into",
    "folder",
    required=True,
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="A folder that is not there yet, or is empty.",
)
def fetch(source: str, sha256: str, folder: Path) -> None:
    """Unpack goldens from SOURCE, a path or URL of a file that `goldens pack` wrote.

    \b
    mxfp4ref goldens fetch goldens.tar --sha256 HASH --into all_goldens

    DIR is there at the end with all files, which are verified, or not at all.

    Exit codes: 0 unpacked; 2 it could not be read, is another file, or DIR is not empty; 130 interrupted.
    """
    from mxfp4ref.goldens.archive import fetch_archive

    with usage_errors(), progress(first="fetching") as step:
        found = fetch_archive(source, sha256, folder, lambda size: step(f"{size / 2**20:.0f} MiB", 0))
    echo(f"{found.root}: {len(found.names())} cases")
    echo(f"to use them: export MXFP4REF_GOLDENS={quoted(str(found.root))}, or --goldens")


@archive.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path, allow_dash=True))
@goldens_option
def pack(file: Path, root: Path | None) -> None:
    """Write the goldens to FILE, a tar archive, and print its SHA-256 for `goldens fetch`.

    If FILE is -, the archive goes to stdout and all else to stderr.

    \b
    mxfp4ref goldens pack goldens.tar

    Equal goldens give equal bytes, on every machine.

    Exit codes: 0 written; 2 goldens are missing or damaged, or it could not be written.
    """
    from mxfp4ref.goldens.archive import write_archive

    with tempfile.TemporaryDirectory() as folder:
        to_stdout = file == Path("-")
        path = Path(folder, "goldens.tar") if to_stdout else file
        with usage_errors():
            found = open_goldens(root)
            check_no_input(path, files_below(found.root))
            check_outside("FILE", path, found.root)
            digest = write_archive(found, path)
        if to_stdout:
            with path.open("rb") as packed:
                shutil.copyfileobj(packed, sys.stdout.buffer)
        size = path.stat().st_size
    echo(f"{file}: {len(found.names())} cases, {size:,} bytes, SHA-256", err=to_stdout)
    echo(digest, err=to_stdout)
