"""How to run a case again: the command, with all that a run was given."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from mxfp4ref._files import quoted
from mxfp4ref.conformance.options import Options
from mxfp4ref.conformance.results import RECORDING, CaseResult, Report
from mxfp4ref.goldens import GoldenError, Goldens, find_root

__all__ = [
    "bounded_command",
    "case_command",
    "command",
    "conform_arguments",
    "full_command",
    "selection_arguments",
    "whole_command",
]

_LIMITS = ("--maxfail", "--max-calls")
_QUICK = ("--diagnosis", "quick")
_TIMEOUT = 600  # seconds, the command's default


def conform_arguments(
    kernel: str, options: Options, device: str | None, isolate: bool | None, goldens: Goldens | None
) -> tuple[str, ...]:
    """The arguments of `mxfp4ref conform` that run a kernel so; which cases, and what to write, is left to add."""
    given: list[str] = [kernel]

    def option(name: str, value: object, usual: object) -> None:
        if value not in (None, usual):
            given.extend((f"--{name}", f"{value:g}" if isinstance(value, float) else str(value)))

    option("device", device, None)
    option("mode", options.mode, "exact")
    option("intermediates", options.storage, "wider")
    option("confidence", options.confidence, None)
    option("timeout", options.timeout, _TIMEOUT)
    option("diagnosis", options.diagnosis, "full")
    given += ["--all-tactics"] * options.all_tactics + ["--no-repeat"] * (not options.repeat)
    if isolate is not None:
        given.append("--isolate" if isolate else "--no-isolate")
    if goldens is not None and goldens.root != _found():
        option("goldens", goldens.root, None)
    return tuple(given)


def selection_arguments(
    patterns: Iterable[str],
    earlier: Path | None,
    max_failures: int | None,
    jobs: int,
    excluded: Iterable[str] = (),
) -> tuple[str, ...]:
    """The arguments that choose the cases and say when to stop: those of a whole run, not of one case of it.

    Each is an option and its value.
    """
    given = [word for pattern in patterns for word in ("--case", pattern)]
    given += [word for pattern in excluded for word in ("--exclude", pattern)]
    given += [] if earlier is None else ["--last-failed", str(earlier)]
    given += [] if max_failures is None else ["--maxfail", str(max_failures)]
    return (*given, *(["--jobs", str(jobs)] if jobs > 1 else []))


def _found() -> object:
    try:
        return find_root()
    except GoldenError:
        return None


def command(report: Report, result: CaseResult | None = None) -> str:
    """The line that runs all, for a shell and "" of a kernel that is no name, or one case again."""
    if result is not None:
        return case_command(report.kernel, report.arguments, result)
    given = (report.command, *report.arguments, *report.selection)
    return report.line or (_shell(*given) if report.arguments else "")


def whole_command(report: Report) -> str:
    """The line that runs all chosen cases, however many fail; "" of a kernel that is no name."""
    if report.line:
        return report.line
    return _shell(report.command, *report.arguments, *_kept(report)) if report.arguments else ""


def full_command(report: Report) -> str:
    """The line that looks for what is wrong with `--diagnosis full`; "" of a run that did, or of no name."""
    given = _fully(report.arguments)
    if given == report.arguments:
        return ""
    return _of_pytest(report) or _shell(report.command, *given, *report.selection)


def _fully(arguments: tuple[str, ...]) -> tuple[str, ...]:
    """The same with a full diagnosis, where they ask for a quick one: what to do next is to look closer."""
    at = next((i for i in range(len(arguments)) if arguments[i : i + 2] == _QUICK), None)
    return arguments if at is None else (*arguments[:at], *arguments[at + 2 :])


def _of_pytest(report: Report, *, mode: str = "") -> str:
    """A session's own line, which chooses the same cases, with a full diagnosis, in this mode; "" of none."""
    words = shlex.split(report.line)
    quick = _fully(report.arguments) != report.arguments
    wanted = {"--mxfp4-diagnosis": "full" * quick, "--mxfp4-mode": mode}
    for name, value in wanted.items() if words else ():
        if value:
            words = [w for before, w in pairwise(["", *words]) if name not in (w.partition("=")[0], before)]
            words.append(f"{name}={value}")
    return " ".join(map(quoted, words))


def _kept(report: Report) -> list[str]:
    """The options that choose the cases, without those that limit how many fail or run."""
    options = zip(report.selection[::2], report.selection[1::2], strict=True)
    return [word for option in options if option[0] not in _LIMITS for word in option]


def bounded_command(report: Report) -> str:
    """The line that runs the chosen cases in mode bounded; "" of a kernel that is no name."""
    if not report.arguments:
        return ""
    given = (*_fully(report.arguments), *_kept(report))
    return _of_pytest(report, mode="bounded") or _shell("conform", *given, "--mode", "bounded")


def case_command(kernel: str, arguments: tuple[str, ...], result: CaseResult) -> str:
    """The line that runs one case again: for a shell or, of a kernel that is no name, for Python; "" of a recording.

    Args:
        kernel, arguments: as in `Report`.
        result: of the case.
    """
    if result.kind == RECORDING:
        return ""
    if not arguments:
        return f"run({kernel}, [open_goldens().load({result.case!r})])"
    return _shell("conform", *_fully(arguments), "--case", result.case, "--dump", "reproducers")


def _shell(*arguments: str) -> str:
    words = ["mxfp4ref", *arguments]
    if (first := ("--maxfail", "1")) in (pairs := list(pairwise(words))):
        at = pairs.index(first)
        words[at : at + 2] = ["-x"]
    return " ".join(map(quoted, words))
