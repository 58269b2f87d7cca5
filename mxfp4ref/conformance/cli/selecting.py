"""Which golden cases a command runs, and which files a kernel is in."""

from __future__ import annotations

import fnmatch
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from importlib.machinery import PathFinder
from pathlib import Path

from mxfp4ref._files import printable
from mxfp4ref._words import did_you_mean, duration
from mxfp4ref.conformance import memory
from mxfp4ref.conformance.cli.shared import UsageError
from mxfp4ref.conformance.cli.terminal import echo
from mxfp4ref.conformance.pace import Pace
from mxfp4ref.goldens import GoldenError, Goldens

__all__ = ["failed_in", "in_advance", "pace_of", "select", "sources", "too_large"]

_WHOLE_SIZE = "models/"  # the suite of layers that take GiB of memory
_LONG = 20.0  # seconds of a run, of which is told in advance


def select(goldens: Goldens, patterns: Iterable[str], option: str) -> list[str]:
    """The cases that an option chooses, in the goldens' order."""
    names = goldens.names()
    chosen: set[str] = set()
    for pattern in patterns:
        found = [name for name in names if fnmatch.fnmatch(name, pattern) or name.split("/")[0] == pattern]
        if not found:
            hint = did_you_mean(pattern, [*goldens.suites, *names])
            raise UsageError(
                f"{option}: {pattern!r} matches none of the {len(names)} cases in {goldens.root}{hint}"
            )
        chosen.update(found)
    return [name for name in names if name in chosen]


def too_large(goldens: Goldens, names: Iterable[str], spec: str, device: str | None) -> dict[str, str]:
    """The layers of whole size among cases that a kernel may have no memory for, each with why it is left out.

    A kernel on a CPU that gets weights in logical layout is taken to dequantise all experts to float32.
    """
    from mxfp4ref.conformance.kernels.loading import is_stand_in

    if is_stand_in(spec) or (available := memory.free()) is None:
        return {}
    dequantises = spec.startswith(("plain:", "logical:")) and device in (None, "cpu")
    how = ", all experts dequantised to float32," if dequantises else ""
    needs = {
        name: memory.needed(goldens.load(name), dequantised=dequantises)
        for name in names
        if name.startswith(_WHOLE_SIZE)
    }
    return {
        name: f"it may need {count / 2**30:.1f} GiB{how} and {available / 2**30:.1f} GiB are free"
        for name, count in needs.items()
        if count > available
    }


def pace_of(goldens: Goldens, names: Sequence[str], spec: str) -> Pace:
    """How long these cases will take."""
    from mxfp4ref.conformance.kernels.loading import is_stand_in

    sizes = {}
    for name in names:
        with suppress(GoldenError):  # running it says what is wrong with it
            sizes[name] = goldens.about(name)["bytes"]
    return Pace(names, sizes, stand_in=is_stand_in(spec))


def in_advance(pace: Pace, option: str, max_failures: int | None) -> list[str]:
    """A line that says how long the cases take, if that is long; `option` leaves out layers of whole size."""
    if (seconds := pace.left) < _LONG:
        return []
    words = f"{pace.count} cases take {'up to' if max_failures else 'about'} {duration(seconds)}"
    if pace.largest:
        words += f", most of it for {pace.largest}; {option} leaves out layers of whole size"
    return [words]


def failed_in(path: Path, goldens: Goldens, chosen: list[str], run: tuple[str, str]) -> list[str]:
    """Those of the chosen cases that failed in an earlier report; `run` is the kernel and the mode of this one."""
    from mxfp4ref.conformance.reports.report_reading import read_report

    earlier = read_report(path)
    failed = [case for case, result in earlier.cases.items() if not result["ok"]]
    if unknown := [case for case in failed if case not in goldens.entries]:
        raise UsageError(
            f"--last-failed: {path}: {len(unknown)} of the {len(failed)} cases that failed are not in "
            f"{goldens.root}, the first: {unknown[0]}"
        )
    if not (names := [name for name in chosen if name in failed]):
        raise UsageError(f"--last-failed: none of the {len(chosen)} cases failed in {path}; nothing to run")
    then = {"kernel": (earlier.arguments or [earlier.kernel])[0], "mode": earlier.mode}
    now = dict(zip(then, run, strict=True))
    if earlier.goldens:
        then["goldens"], now["goldens"] = earlier.goldens["sha256"], goldens.sha256
    if others := [f"{name} {then[name]}, not {now[name]}" for name in then if then[name] != now[name]]:
        words = printable("; ".join(others), lines=False)
        echo(f"--last-failed: {path} is of {words}", err=True)
    if earlier.left:
        echo(f"--last-failed: {earlier.left} more cases were not run then, and are not now", err=True)
    return names


def sources(spec: str) -> Iterator[Path]:
    """The files of a kernel's module and of the packages that it lies in; nothing is imported."""
    *_, module = spec.rpartition(":")[0].split(":")
    if module.endswith(".py"):
        yield Path(module)
        return
    places: Sequence[str] = [*sys.path, os.getcwd()]
    parts = module.split(".")
    for count in range(1, len(parts) + 1):
        found = PathFinder.find_spec(".".join(parts[:count]), places) if parts[count - 1] else None
        if found is None:
            return
        if found.origin is not None:
            yield Path(found.origin)
        places = found.submodule_search_locations or ()
