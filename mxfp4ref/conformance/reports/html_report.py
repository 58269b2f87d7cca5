"""A conformance report as one HTML file that needs nothing else: no network, no fonts, scripts only to filter."""

from __future__ import annotations

import hashlib
import importlib
import re
from base64 import b64encode
from collections import Counter
from functools import cache
from typing import Any

from mxfp4ref._files import printable
from mxfp4ref.conformance.diagnosis import Diagnosis
from mxfp4ref.conformance.findings.finding import listed
from mxfp4ref.conformance.reports.again import command
from mxfp4ref.conformance.reports.pictures import LEGEND, PAPER, darkened, mismatch_maps
from mxfp4ref.conformance.reports.report_text import by_suite, common_patterns, predicted, tested
from mxfp4ref.conformance.results import CaseResult, Report
from mxfp4ref.defects import DEFECTS

__all__ = ["check_html", "environment", "thread_url", "to_html"]

_OWNERS = {
    "compressed-tensors": "vllm-project/compressed-tensors",
    "flashinfer": "flashinfer-ai/flashinfer",
    "Megatron-LM": "NVIDIA/Megatron-LM",
    "NeMo Automodel": "NVIDIA-NeMo/Automodel",
    "sglang": "sgl-project/sglang",
    "torchao": "pytorch/ao",
    "TransformerEngine": "NVIDIA/TransformerEngine",
    "transformers": "huggingface/transformers",
    "triton": "triton-lang/triton",
    "vllm": "vllm-project/vllm",
}


def to_html(report: Report) -> str:
    """The report as one HTML file with its pictures in it.

    Raises:
        ModuleNotFoundError: jinja2 is not installed (`pip install mxfp4ref[report]`).
    """
    jinja = environment()
    script = jinja.loader.get_source(jinja, "report.js")[0]
    failures = [_failure(n, r, report) for n, r in enumerate(report.results, 1) if not r.ok]
    anchors = {id(f["result"]): f["anchor"] for f in failures}
    html: str = jinja.get_template("report.html.j2").render(
        report=report,
        ran=sum(r.status != "skipped" for r in report.results),
        script=script,
        script_hash=b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        again=command(report),
        tested=[line.split(": ", 1) for line in tested(report, full=True)],
        suites=[_suite(suite, results, report.passed_over(results)) for suite, results in by_suite(report)],
        failures=failures,
        anchor=lambda result: anchors[id(result)],
        sentences=[listed(sentence) for sentence in report.sentences],
        listed=listed,
        shares=_shares,
        common=common_patterns(report),
        defects=[DEFECTS[name] for name in report.defects],
        thread_url=thread_url,
        legend=LEGEND,
        paper=PAPER,
        darkened=darkened(),
    )
    return printable(html)


def check_html() -> None:
    """Raise ModuleNotFoundError, with the way to install it, if what an HTML report needs is missing."""
    try:
        importlib.import_module("jinja2")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"an HTML report needs {error.name}: pip install 'mxfp4ref[report]'"
        ) from error


def thread_url(seen_in: str) -> str:
    """The public thread that `repository#number`, of a defect's `seen_in`, stands for; "" where it is none."""
    found = re.match(r"(.+)#(\d+)\b", seen_in)
    if found is None or found[1] not in _OWNERS:
        return ""
    return f"https://github.com/{_OWNERS[found[1]]}/issues/{found[2]}"


def environment() -> Any:
    """jinja2's, with the templates of reports; with the error of `check_html`."""
    check_html()
    return _environment()


@cache  # compiling the templates takes longer than all else
def _environment() -> Any:
    jinja2 = importlib.import_module("jinja2")
    return jinja2.Environment(
        loader=jinja2.PackageLoader("mxfp4ref.conformance"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _suite(name: str, results: list[CaseResult], passed_over: int) -> dict[str, Any]:
    ran = [r for r in results if r.status != "skipped"]
    return {
        "name": name,
        "passed": sum(r.ok for r in ran),
        "failed": sum(not r.ok for r in ran),
        "passed_over": passed_over,
        "skipped": len(results) - len(ran),
        "elements": sum(r.elements for r in ran),
        "differing": sum(r.differing for r in ran),
        "seconds": sum(r.seconds for r in ran),
        "results": results,
    }


def _failure(number: int, result: CaseResult, report: Report) -> dict[str, Any]:
    found = result.diagnosis
    named = dict(zip((p.name for p in found.predictions), predicted(found), strict=True)) if found else {}
    sentence = found.finding.sentence if found else ""
    exact = found is not None and bool(found.exact)
    return {
        "anchor": f"case-{number}",
        "result": result,
        "found": found,
        "exact": [line for name, line in named.items() if exact and name not in sentence],
        "nearest": [] if exact else list(named.values()),
        "command": command(report, result),
        "maps": mismatch_maps(found.bins, found.experts) if found is not None else [],
        "distances": _distances(found) if found is not None else [],
        "differing": sum(count for _, count in found.ulps) if found is not None else 0,
    }


def _shares(found: Diagnosis) -> list[tuple[str, str, int, int, str]]:
    """Rows of the attribution table: those with a share, and one of each kind for all in which nothing differs."""
    rows, right = [], Counter[str]()
    for row in found.attribution:
        right[row.by] += row.elements * (not row.differing)
    for by in dict.fromkeys(row.by for row in found.attribution):
        wrong = [row for row in found.attribution if row.by == by and row.differing]
        for row in wrong:
            percent = 100 * row.differing / row.elements
            share = "< 1" if percent < 1 else "> 99" if 99 < percent < 100 else f"{percent:.0f}"
            rows.append((by, row.place, row.differing, row.elements, f"{share} %"))
        if right[by]:
            rows.append((by, "all others" if wrong else "all", 0, right[by], "none"))
    return rows


def _distances(found: Diagnosis) -> list[tuple[Any, int, float]]:
    """Each class of the legend with its elements and the length of its bar, in parts of the longest."""
    counts = [count for _, count in found.ulps]
    return [(one, n, n / max(*counts, 1)) for one, n in zip(LEGEND, counts, strict=True)]
