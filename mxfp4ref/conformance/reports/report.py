"""A conformance report as JSON or JUnit XML; `report_text` has it in words, `html_report` as HTML."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from typing import Any
from xml.etree import ElementTree

from mxfp4ref._files import printable
from mxfp4ref.conformance.comparison import FAR
from mxfp4ref.conformance.findings.finding import Finding
from mxfp4ref.conformance.reports.again import command
from mxfp4ref.conformance.reports.report_text import PARTS, case_lines, headline
from mxfp4ref.conformance.results import CaseResult, Report

__all__ = ["FORMAT", "to_json", "to_junit"]

FORMAT = "mxfp4ref-report-2"
_EVERY = "every_wrong_bit_of_this_output"


def to_json(report: Report) -> str:
    """The report as a JSON object; its keys are the attributes of `Report`, `CaseResult` and `Diagnosis`.

    But for what a finding predicts, which says of how much: it is not to be taken for the verdict.
    """
    value = {
        "format": FORMAT,
        "kernel": report.kernel,
        "mode": report.mode,
        "ok": report.ok,
        "verdict": report.verdict,
        "finding": _finding(report.finding) | {"predicts": _predicted(report)},
        "interrupted": report.interrupted,
        "cases": {
            "chosen": len(report.results) + report.left,
            "ran": sum(r.status != "skipped" for r in report.results),
            "passed": sum(r.ok and r.status != "skipped" for r in report.results),
            "failed": sum(not r.ok for r in report.results),
            "passed_over": report.passed_over(report.results),  # of those that failed
            "skipped": sum(r.status == "skipped" for r in report.results),
            "not_run": report.left,
        },
        "left": report.left,
        "goldens": report.goldens and asdict(report.goldens),
        "date": report.date,
        "arguments": [*report.arguments, *report.selection],
        "command": command(report),
        "seconds": round(report.seconds, 3),
        "verdict_seconds": round(report.verdict_seconds, 3),
        "environment": dict(report.environment),
        "results": [_result(r, report.mode) for r in report.results],
    }
    return json.dumps(value, indent=1) + "\n"


def _finding(found: Finding) -> dict[str, Any]:
    return {name: value for name, value in asdict(found).items() if name not in ("exact", "cases")}


def _predicted(report: Report) -> dict[str, Any]:
    """Of how many of the failing cases the finding predicts every wrong bit, and which named defects do of all."""
    failing, found = sum(not r.ok for r in report.results), report.finding
    some = found.cases[0] if found.cases else failing * found.exact
    return {
        "every_wrong_bit_of": failing if report.defects else some,
        "failing_cases": failing,
        "named_defects_of_all": list(report.defects),
    }


def to_junit(report: Report) -> str:
    """The report as JUnit XML: a test case for each golden case, a suite for all."""
    failed = [r for r in report.results if not r.ok]
    errors = sum(r.status not in ("differs", "outside bounds") for r in failed)
    suite = ElementTree.Element(
        "testsuite",
        name="mxfp4ref",
        tests=str(len(report.results) + report.interrupted),
        failures=str(len(failed) - errors),
        errors=str(errors + report.interrupted),
        skipped=str(sum(r.status == "skipped" or r.proves_nothing for r in report.results)),
        time=f"{report.seconds:.3f}",
    )
    facts = {"verdict": report.verdict, "date": report.date, **report.environment}
    if report.goldens is not None:
        facts |= {f"goldens.{name}": str(value) for name, value in asdict(report.goldens).items()}
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in facts.items():
        ElementTree.SubElement(properties, "property", name=name, value=value)
    if report.interrupted:
        case = ElementTree.SubElement(suite, "testcase", classname="mxfp4ref", name="interrupted", time="0")
        ElementTree.SubElement(case, "error", message=report.verdict, type="interrupted")
    for result in report.results:
        group, _, name = result.case.rpartition("/")
        case = ElementTree.SubElement(
            suite, "testcase", classname=f"mxfp4ref.{group}", name=name, time=f"{result.seconds:.3f}"
        )
        if result.status == "skipped":
            ElementTree.SubElement(case, "skipped", message=result.message)
        elif result.proves_nothing:
            ElementTree.SubElement(case, "skipped", message=f"{result.status}, but {result.message}")
        elif not result.ok:
            tag = "failure" if result.status in ("differs", "outside bounds") else "error"
            element = ElementTree.SubElement(case, tag, message=headline(result), type=result.status)
            element.text = "\n".join(case_lines(result, command(report, result)))
        elif result.message:
            ElementTree.SubElement(case, "system-out").text = result.message
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    return printable(ElementTree.tostring(root, encoding="unicode", xml_declaration=True)) + "\n"


def _result(result: CaseResult, mode: str) -> dict[str, Any]:
    value: dict[str, Any] = {
        name: getattr(result, name)
        for name in (
            *("case", "kind", "status", "ok", "elements", "differing", "outside", "message"),
            *("runs", "diagnosed_run", "within_bounds"),
        )
    }
    if mode == "exact" and not result.outside:
        del value["outside"]  # which is not asked
    value |= {"tiles": list(result.tiles)}
    value |= {
        f"{p}seconds": round(getattr(result, f"{p}seconds"), 4) for p in ("", *(f"{n}_" for n in PARTS))
    }
    value |= {f.name: getattr(result, f.name) for f in fields(result)[len(fields(CaseResult)) :]}
    if (found := result.diagnosis) is not None:
        ulps = found.first.ulps
        value["diagnosis"] = {
            **{f.name: getattr(found, f.name) for f in fields(found) if f.name not in ("bins", "experts")},
            "first": asdict(found.first) | {"ulps": None if ulps >= FAR else ulps},
            "finding": _finding(found.finding) | {"predicts": {_EVERY: found.finding.exact}},
            "predictions": [
                {"name": p.name, "fraction": p.fraction, _EVERY: p.exact} for p in found.predictions
            ],
            "attribution": [asdict(row) for row in found.attribution],
            "ulps": [  # the last but one has no limit, the last is that with a NaN
                {"up_to": None if top >= FAR - 1 else top, "nan": top == FAR, "elements": count}
                for top, count in found.ulps
            ],
        }
    return value
