"""A conformance report as text, JSON, JUnit XML or one self-contained HTML file."""

from __future__ import annotations

import base64
import importlib
import io
import json
from dataclasses import asdict, fields
from importlib.resources import files
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import torch
from torch import Tensor

from mxfp4ref.conformance.again import command
from mxfp4ref.conformance.comparison import FAR
from mxfp4ref.conformance.report_text import PARTS, by_suite, case_lines, headline, predicted, to_text
from mxfp4ref.conformance.results import PASSING, CaseResult, Report
from mxfp4ref.defects import DEFECTS

if TYPE_CHECKING:
    from mxfp4ref.conformance.diagnosis import Diagnosis

__all__ = ["FORMAT", "case_lines", "check_html", "headline", "to_html", "to_json", "to_junit", "to_text"]

FORMAT = "mxfp4ref-report-2"

_RED = "#b3261e"
_MAP_ROWS, _MAP_COLUMNS = 64, 512  # a picture's cells; larger outputs are pooled


def to_json(report: Report) -> str:
    """The report as a JSON object; its keys are the attributes of `Report`, `CaseResult` and `Diagnosis`."""
    value = {
        "format": FORMAT,
        "kernel": report.kernel,
        "mode": report.mode,
        "ok": report.ok,
        "verdict": report.verdict,
        "defects": list(report.defects),
        "finding": asdict(report.finding),
        "interrupted": report.interrupted,
        "cases": {
            "chosen": len(report.results) + report.left,
            "ran": sum(r.status != "skipped" for r in report.results),
            "failed": sum(not r.ok for r in report.results),
        },
        "left": report.left,
        "goldens": report.goldens and asdict(report.goldens),
        "date": report.date,
        "arguments": list(report.arguments),
        "seconds": round(report.seconds, 3),
        "verdict_seconds": round(report.verdict_seconds, 3),
        "environment": dict(report.environment),
        "results": [_result(r) for r in report.results],
    }
    return json.dumps(value, indent=1) + "\n"


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
        skipped=str(sum(r.status == "skipped" for r in report.results)),
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
        elif not result.ok:
            tag = "failure" if result.status in ("differs", "outside bounds") else "error"
            element = ElementTree.SubElement(case, tag, message=headline(result), type=result.status)
            element.text = "\n".join(case_lines(result, command(report, result)))
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def to_html(report: Report) -> str:
    """The report as one HTML file with its pictures in it.

    Raises:
        ModuleNotFoundError: jinja2 or matplotlib is not installed (`pip install mxfp4ref[report]`).
    """
    check_html()
    jinja2 = importlib.import_module("jinja2")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = files("mxfp4ref.conformance").joinpath("templates/report.html.j2").read_text(encoding="utf-8")
    html: str = environment.from_string(source).render(
        report=report,
        suites=[_suite_row(suite, results) for suite, results in by_suite(report)],
        failures=[_failure(report, r) for r in report.results if not r.ok],
        passing=PASSING,
        headline=headline,
        defects=[DEFECTS[name] for name in report.defects],
    )
    return html


def check_html() -> None:
    """Raise ModuleNotFoundError, with the way to install it, if what an HTML report needs is missing."""
    try:
        importlib.import_module("jinja2")
        importlib.import_module("matplotlib")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"an HTML report needs {error.name}: pip install 'mxfp4ref[report]'"
        ) from error


def _result(result: CaseResult) -> dict[str, Any]:
    value: dict[str, Any] = {
        name: getattr(result, name)
        for name in ("case", "kind", "status", "ok", "elements", "differing", "outside", "message")
    }
    value |= {"tiles": list(result.tiles)}
    value |= {
        f"{p}seconds": round(getattr(result, f"{p}seconds"), 4) for p in ("", *(f"{n}_" for n in PARTS))
    }
    value |= {f.name: getattr(result, f.name) for f in fields(result)[len(fields(CaseResult)) :]}
    if (found := result.diagnosis) is not None:
        ulps = found.first.ulps
        value["diagnosis"] = {
            **{f.name: getattr(found, f.name) for f in fields(found) if f.name != "mask"},
            "first": asdict(found.first) | {"ulps": None if ulps >= FAR else ulps},
            "finding": asdict(found.finding),
            "predictions": [asdict(p) for p in found.predictions],
            "attribution": [asdict(row) for row in found.attribution],
            "ulps": [{"up_to": None if top >= FAR else top, "elements": count} for top, count in found.ulps],
        }
    return value


def _suite_row(suite: str, results: list[CaseResult]) -> dict[str, Any]:
    ran = [r for r in results if r.status != "skipped"]
    return {
        "name": suite,
        "passed": sum(r.ok for r in ran),
        "failed": sum(not r.ok for r in ran),
        "skipped": len(results) - len(ran),
        "elements": sum(r.elements for r in ran),
        "differing": sum(r.differing for r in ran),
        "seconds": sum(r.seconds for r in ran),
        "results": results,
    }


def _failure(report: Report, result: CaseResult) -> dict[str, Any]:
    found = result.diagnosis
    return {
        "result": result,
        "headline": headline(result),
        "found": found,
        "predicted": predicted(found) if found is not None else [],
        "command": command(report, result),
        "map": _mismatch_map(found) if found is not None else "",
        "histogram": _ulp_histogram(found) if found is not None else "",
    }


def _mismatch_map(found: Diagnosis) -> str:
    """Tokens down, columns across; a cell is as dark as the share of its elements that differ."""
    mask = found.mask.reshape(found.mask.shape[0], -1) if found.mask.dim() > 1 else found.mask.reshape(1, -1)
    shares = _pool(mask, _MAP_ROWS, _MAP_COLUMNS)
    figure, axes = _figure(6.4, 3.0)
    colours = importlib.import_module("matplotlib.colors")
    colormap = colours.LinearSegmentedColormap.from_list("differing", ("#ffffff", _RED))
    rows, columns = mask.shape
    axes.imshow(
        shares.numpy(),
        cmap=colormap,
        vmin=0,
        vmax=1,
        aspect="auto",
        interpolation="nearest",
        extent=(-0.5, columns - 0.5, rows - 0.5, -0.5),
    )
    names = ("token", "column") if found.output == "output" else ("row", "column")
    axes.set_ylabel(names[0])
    axes.set_xlabel(names[1])
    axes.yaxis.get_major_locator().set_params(integer=True)
    return _picture(figure)


def _ulp_histogram(found: Diagnosis) -> str:
    figure, axes = _figure(4.2, 3.0)
    labels = ["≤ 1", "2", "≤ 4", "≤ 16", "≤ 256", "more", "NaN"]
    counts = [count for _, count in found.ulps]
    axes.bar(labels, counts, color=_RED)
    axes.set_yscale("symlog")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("elements")
    axes.set_xlabel("distance in ulp")
    return _picture(figure)


def _pool(mask: Tensor, rows: int, columns: int) -> Tensor:
    shape = (min(rows, mask.shape[0]), min(columns, mask.shape[1]))
    return torch.nn.functional.adaptive_avg_pool2d(mask[None].to(torch.float32), shape)[0]


def _figure(width: float, height: float) -> tuple[Any, Any]:
    figure_module = importlib.import_module("matplotlib.figure")  # no pyplot: no display, no global state
    figure = figure_module.Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _picture(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
