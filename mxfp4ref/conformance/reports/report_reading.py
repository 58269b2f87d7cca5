"""Reading a report that was written as JSON, by this version or an earlier one."""

from __future__ import annotations

import codecs
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mxfp4ref._files import mismatch, parse_json, read_file
from mxfp4ref._words import shown
from mxfp4ref.conformance.reports.report import FORMAT
from mxfp4ref.conformance.results import PASSING

__all__ = ["WrittenReport", "is_report", "read_report"]

_BYTE_ORDER_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # as some shells redirect
_BEGINNINGS = {
    b"PK\3\4": "a zip archive, as torch.save and numpy.savez write it",
    b"\x80": "a pickle",
    b"\x93NUMPY": "a numpy array",
    b"GGUF": "a GGUF file",
    b"<": "an HTML or XML file",
}
_FORMATS = ("mxfp4ref-report-1", FORMAT)
_FINDING = {"stages": [str], "sentence": str, "exact?": bool, "hypotheses?": [str], "*": object}
_RESULT = {
    "case": str,
    "status": str,
    "ok": bool,
    "elements": int,
    "differing": int,
    "outside?": int,
    "message": str,
    "diagnosis?": {"finding?": _FINDING, "*": object},
    "*": object,
}
_GOLDENS = {"path": str, "format": str, "sha256": str, "cases": int, "of?": int}
_REPORT = {
    "format": _FORMATS,
    "kernel": str,
    "mode": str,
    "verdict": str,
    "environment": {"*": str},
    "results": [_RESULT],
    "finding?": _FINDING,
    "left?": int,
    "interrupted?": bool,
    "goldens?": object,
    "date?": str,
    "arguments?": [str],
    "*": object,
}


@dataclass(frozen=True)
class WrittenReport:
    """A report in a file.

    Attributes:
        path: the file.
        kernel, mode, verdict, environment, left, interrupted, date, arguments: as in `results.Report`; what an
            earlier version did not write is empty.
        goldens: as `goldens_used.GoldensUsed`, by name; empty where it is not known.
        finding: the verdict's, in words.
        cases: for each case what `results.CaseResult` has, by name.
    """

    path: Path
    kernel: str
    mode: str
    verdict: str
    environment: Mapping[str, str]
    cases: Mapping[str, Mapping[str, Any]]
    goldens: Mapping[str, Any] = field(default_factory=dict)
    finding: str = ""
    left: int = 0
    interrupted: bool = False
    date: str = ""
    arguments: tuple[str, ...] = ()


def read_report(path: Path) -> WrittenReport:
    """The report in a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no report, or one of a format that this version does not know.
    """
    content = read_file(path)
    try:
        value = parse_json(content)
    except ValueError as error:
        came = _kind_of(content) or f"no JSON: {error}"
        raise ValueError(f"{path}: expected a report, as conform --json writes it, got {came}") from None
    wrong = mismatch(value, _REPORT, "report")
    if wrong and not (isinstance(value, dict) and str(value.get("format")).startswith("mxfp4ref-")):
        wrong = f"expected a report, as conform --json writes it, got other JSON ({wrong})"
    if not wrong and value.get("goldens") is not None:
        wrong = mismatch(value["goldens"], _GOLDENS, "report.goldens")
    if not wrong and len({result["case"] for result in value["results"]}) < len(value["results"]):
        wrong = "report.results: expected each case once"
    for result in () if wrong else value["results"]:
        if result["ok"] != (result["status"] in PASSING):
            said = f"{shown(result['status'])} and ok {result['ok']}"
            wrong = f"report.results: {shown(result['case'])} has status {said}"
    wrong = wrong or _negative(value) or next(filter(None, map(_contradiction, value["results"])), "")
    if wrong:
        raise ValueError(f"{path}: {wrong}")
    known = {name: value[name] for name in ("left", "interrupted", "date") if name in value}
    return WrittenReport(
        path=path,
        **{name: value[name] for name in ("kernel", "mode", "verdict", "environment")},
        cases={result["case"]: result for result in value["results"]},
        goldens=value.get("goldens") or {},
        finding=value.get("finding", {}).get("sentence", ""),
        arguments=tuple(value.get("arguments", ())),
        **known,
    )


def _kind_of(content: bytes) -> str:
    """What a file of another kind is, in words; "" where that is not known."""
    if not content:
        return "an empty file"
    if 0 < int.from_bytes(content[:8], "little") <= len(content) - 8 and content[8:9] == b"{":
        return "tensors (a safetensors file)"
    return next((words for start, words in _BEGINNINGS.items() if content.lstrip().startswith(start)), "")


def _contradiction(result: Mapping[str, Any]) -> str:
    """Which of a case's numbers its status, or how many elements it has, rules out, in words; "" if none is."""
    status, elements = result["status"], result["elements"]
    most = {"equal": (0, 0), "within bounds": (elements, 0)}.get(status, (elements, elements))
    for name, limit in zip(("differing", "outside"), most, strict=True):
        if (count := result.get(name, 0)) > limit:
            said = f"{name}={shown(count)} with status {status} and elements={elements}"
            return f"report.results: {shown(result['case'])} has {said}"
    return ""


def _negative(report: dict[str, Any]) -> str:
    """Which number of cases or elements cannot be one, in words; "" if all can."""
    goldens = report.get("goldens") or {}
    counts = {"left": report.get("left", 0)} | {f"goldens.{n}": goldens.get(n, 0) for n in ("cases", "of")}
    for i, result in enumerate(report["results"]):
        counts |= {
            f"results[{i}].{name}": result[name]
            for name in ("elements", "differing", "outside")
            if name in result
        }
    return next(
        (f"report.{name}: expected 0 or more, got {shown(n)}" for name, n in counts.items() if n < 0), ""
    )


def is_report(path: Path) -> bool:
    """Whether a file says that it is a report, of whatever format."""
    if not path.is_file():  # a pipe, which may never end
        return False
    try:
        with path.open("rb") as file:
            if not file.read(64).lstrip().startswith((b"{", *_BYTE_ORDER_MARKS)):
                return False
        value = parse_json(read_file(path))
    except (OSError, ValueError):
        return False
    return isinstance(value, dict) and str(value.get("format")).startswith("mxfp4ref-report")
