"""A conformance report in words: a line for each suite and case, and what there is to say of those that fail."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from mxfp4ref._files import printable
from mxfp4ref._words import shortened
from mxfp4ref.conformance.findings.attribution import ALL_TOKENS, OF_SLOTS
from mxfp4ref.conformance.findings.finding import WITHIN, counted, listed
from mxfp4ref.conformance.findings.patterns import EVERYWHERE
from mxfp4ref.conformance.kernels.adapters import OTHER_KIND
from mxfp4ref.conformance.reports.again import bounded_command, command, whole_command
from mxfp4ref.conformance.results import RECORDING, CaseResult, Report, in_which_way
from mxfp4ref.defects import DEFECTS

if TYPE_CHECKING:
    from mxfp4ref.conformance.diagnosis import Diagnosis

__all__ = [
    "PARTS",
    "by_suite",
    "case_lines",
    "common_patterns",
    "diagnosis_lines",
    "headline",
    "predicted",
    "tested",
    "to_text",
    "verdict_lines",
    "wrong_elements",
]

_DIGITS = 12  # of a SHA-256, which JSON and HTML have whole
_TOLD = ("mxfp4ref", "torch", "gpu")
_OF_CALLS = ("recorded with flashinfer", "ranks", "activation")
PARTS = ("kernel", "comparison", "diagnosis")
_FIRST, _DETAILED = 2, 5  # failing cases that are told in full: the first ones, and those of other kinds
_ALIKE = 3  # cases that are named of those that failed alike
_LISTED = 12  # failing cases beside these that have a line each; of more, each suite has one
_NAMED = 9  # three K tiles for each GEMM: so many are listed, and more, which are tactics, are counted
_MOST_PATTERNS, _PATTERNS = 4, 2  # of all cases together, and of these in the verdict of a terminal
_KINDS, _ROWS = 3, 6  # of the attribution table, and of each kind, on a terminal


def to_text(report: Report, *, verbose: bool = False) -> str:
    """The report for a terminal, without colours: suites, failing cases in detail, what was tested, the verdict.

    Args:
        report: what to show.
        verbose: a line for each passing case too, and all there is to say of each failing one; otherwise that is
            said of the first few and of the first of each other kind, and of the others a line.
    """
    lines = []
    for suite, results in by_suite(report):
        if not verbose and all(r.status == "skipped" and OTHER_KIND in r.message for r in results):
            continue  # none of which is for this kind of kernel: counted below
        passed = sum(r.ok and r.status != "skipped" for r in results)
        skipped = sum(r.status == "skipped" for r in results)
        failed = len(results) - passed - skipped
        over = f" ({n} passed over, within bounds)" if (n := report.passed_over(results)) else ""
        words = [f"{passed} passed", *([f"{failed} FAILED{over}"] if failed else [])]
        lines.append(f"{suite:12} {', '.join([*words, *([f'{skipped} skipped'] if skipped else [])])}")
        if verbose:
            lines += [f"    {headline(r)}" for r in results if r.ok]
    failing = [r for r in report.results if not r.ok]
    full = failing if verbose else _of_each_kind(failing)
    for result in full:
        said = case_lines(result, command(report, result), brief=not verbose)
        lines += ["", headline(result), *(f"    {line}" for line in said)]
    told = {id(result) for result in full}
    if others := [result for result in failing if id(result) not in told]:
        many = " by suite" * (len(others) > _LISTED)
        where = "; -v and reports in files tell all of each:"
        lines += ["", f"{counted(len(others), 'other failing case')}{many}{where}"]
        lines += [f"    {line}" for line in (_by_suite if many else _one_by_one)(others, full)]
    return printable("\n".join([*lines, "", *tested(report, full=verbose), "", *verdict_lines(report)]))


def _one_by_one(others: list[CaseResult], full: list[CaseResult]) -> Iterator[str]:
    """A line for each, or for those that say what one said that is told in full."""
    first = {result.message: result.case for result in reversed(full)}
    alike: dict[tuple[str, str], list[str]] = {}
    for result in others:
        before = first.setdefault(result.message, result.case)
        if not result.message or before == result.case:
            yield headline(result)
        elif result.diagnosis is not None:
            yield headline(replace(result, message=f"as {before}"))
        else:
            alike.setdefault((result.status, before), []).append(result.case)
    for (status, before), cases in alike.items():
        yield f"{len(cases)} {status} as {before}: {shortened(cases, _ALIKE)}"


def _by_suite(others: list[CaseResult], full: list[CaseResult]) -> Iterator[str]:
    """A line for each suite: how many fail in which way, which, and what is found in most of them."""
    suites: dict[str, list[CaseResult]] = {}
    for result in others:
        suites.setdefault(result.case.rpartition("/")[0], []).append(result)
    for suite, results in suites.items():
        names = shortened((r.case.rpartition("/")[2] for r in results), _ALIKE)
        within = sum(r.within_bounds is True for r in results)
        words = f"{suite}: {in_which_way(results)}{f', {within} within bounds' if within else ''}: {names}"
        (said, count), *_ = Counter(map(_said, results)).most_common(1)
        most = f"; {'all' if count == len(results) else f'{count} of them'}: {said}"
        yield words + most * bool(said and 2 * count >= len(results))


def _said(result: CaseResult) -> str:
    """What is found, without what is of this case alone, or the message, in a line."""
    found = result.diagnosis.finding if result.diagnosis is not None else None
    if found is None:
        return result.message.split("\n")[0]
    return found.kind or listed(found.sentence)[0]


def verdict_lines(report: Report) -> list[str]:
    """The verdict, a line for each of its sentences and for each change that would give the same bits.

    Where nothing predicts every bit, the patterns that most failing cases share follow.
    """
    lines = []
    for sentence in report.sentences:
        first, others = listed(sentence)
        lines.append(f"{first}{'.' * bool(others)}")
        if others:
            lines.append("The same bits would come from:")
            more = " in the HTML and JSON reports" * others[-1].startswith("and ")
            lines += [*(f"  - {other}" for other in others[:-1]), f"  - {others[-1]}{more}"]
    if not (report.defects or report.finding.exact):
        shared = [one for one in common_patterns(report) if one[0] not in report.verdict][:_PATTERNS]
        lines += [
            f"Pattern in {count} of {counted(all_of, 'failing case')}: {words}."
            for words, count, all_of in shared
        ]
    return lines


def common_patterns(report: Report) -> list[tuple[str, int, int]]:
    """What half of the failing cases or more have in common: the pattern, in how many of how many cases."""
    told = [r.diagnosis.patterns for r in report.results if r.diagnosis is not None]
    counts = Counter(words for patterns in told for words in patterns if not words.startswith(EVERYWHERE))
    most = counts.most_common(_MOST_PATTERNS)
    return [(words, n, len(told)) for words, n in most if 1 < n >= len(told) / 2]


def _of_each_kind(failing: list[CaseResult]) -> list[CaseResult]:
    """The first failing cases, and the first of each other kind: what went wrong, and what the finding says of it.

    First those that tell most; those that lie within bounds come last.
    """
    told: list[CaseResult] = []
    kinds: set[tuple[str, str]] = set()
    for result in sorted(failing, key=lambda result: result.untelling):
        kind = result.status, result.diagnosis.finding.sentence if result.diagnosis else ""
        if len(told) < (_FIRST if kind in kinds else _DETAILED):
            told.append(result)
            kinds.add(kind)
    return told


def tested(report: Report, *, full: bool) -> list[str]:
    """What was tested, with what, when, how long it took, and what was not; nothing of a report that has no date.

    With `full`, the goldens' SHA-256 is whole.
    """
    if not report.date:
        return []
    lines = []
    if (used := report.goldens) is not None:
        digest = used.sha256 if full else f"{used.sha256[:_DIGITS]}..."
        lines.append(f"goldens: {used.path} ({used.format}, {used.count}, manifest's SHA-256 {digest})")
    versions = [f"{name} {report.environment[name]}" for name in _TOLD if name in report.environment]
    lines.append(f"tested: {', '.join([*versions, report.date])}")
    if calls := [f"{name} {report.environment[name]}" for name in _OF_CALLS if name in report.environment]:
        lines.append(f"calls: {'; '.join(calls)}")
    skipped = (
        report.skipped if any(r.status != "skipped" for r in report.results) else ""
    )  # the verdict has it
    counts = _counts(report) if report.command == "conform" else ""  # in which that of a replay is
    if counts or skipped:
        lines.append(f"cases: {'; '.join(filter(None, (counts, skipped)))}")
    if (count := report.within_bounds) and not report.outside_bounds:
        of = f"{count} of {counted(sum(not r.ok for r in report.results), 'failing case')}"
        by = bounded_command(report) or "Options(mode='bounded')"
        lines.append(
            f"bounds: {of} {'lies' if count == 1 else 'lie'} {WITHIN}; what judges a kernel that sums so: {by}"
        )
    # Where outputs were recorded no kernel is run.
    recorded = all(r.kind == RECORDING and not r.kernel_seconds for r in report.results)
    parts = {name: sum(getattr(r, f"{name}_seconds") for r in report.results) for name in PARTS[recorded:]}
    parts["diagnosis"] += report.verdict_seconds
    shares = ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items())
    rest = report.seconds - sum(parts.values())
    beside = (
        ", of processes side by side"
        if rest < -0.1
        else f", start and other {rest:.1f}"
        if rest >= 0.1
        else ""
    )
    lines.append(f"seconds: {report.seconds:.1f} in all; {shares}{beside}")
    if report.left > report.unable and not report.unfinished:  # else the verdict has it
        again = whole_command(report)
        lines.append(f"not run: {counted(report.left, 'case')}{f'; to run all: {again}' if again else ''}")
    return lines


def _counts(report: Report) -> str:
    """What came of how many of the cases; these add up."""
    chosen = len(report.results) + report.left
    others = max(report.goldens.cases - chosen, 0) if report.goldens is not None else 0
    skipped = sum(r.status == "skipped" for r in report.results)
    failed = sum(not r.ok for r in report.results)
    over = report.passed_over(report.results)
    counts = {"passed": len(report.results) - skipped - failed, "failed": failed - over}
    counts |= {"failed within bounds, passed over": over, "skipped": skipped}
    counts |= {"not run": report.left - report.unable, "not run, of other kinds": report.unable}
    counts |= {"left out as too large": report.too_large, "not chosen": others - report.too_large}
    told = " + ".join(f"{count:,} {what}" for what, count in counts.items() if count > 0)
    return f"{chosen + others:,} = {told}"


def headline(result: CaseResult) -> str:
    """A case and its status in a line."""
    words = f"{result.case}: {result.status}"
    if result.elements and not result.ok:
        words += f" in {wrong_elements(result)}"
    if result.tiles:
        named = f"K tiles {', '.join(result.tiles)}"
        words += f" ({named if len(result.tiles) <= _NAMED else f'{len(result.tiles)} tactics'})"
    if result.within_bounds and not (result.diagnosis and result.diagnosis.finding.exact):
        words += f"; {WITHIN}"
    if result.status == "within bounds":
        words += f" ({result.differing:,} of {result.elements:,} elements differ)"
    # What follows further line ends of the message is not to be taken for a line of the report.
    return words + (": " + result.message.replace("\n", "\n        ") if result.message else "")


def wrong_elements(result: CaseResult) -> str:
    """How many elements of a failing case are wrong: in mode bounded, those outside their bounds."""
    of_runs = f" of {result.runs} runs" if result.runs > 1 else ""
    if not result.outside:
        return f"{result.differing:,} of {result.elements:,} elements{of_runs}"
    return f"{result.outside:,} of {result.elements:,} elements{of_runs} ({result.differing:,} differ)"


def case_lines(result: CaseResult, again: str = "", *, brief: bool = False) -> list[str]:
    """What there is to say of a failing case, a line each; `again` is the command that runs it again."""
    lines = [f"{'recorded call' if result.kind == RECORDING else 'this case tests'}: {result.why}"]
    last = [f"again: {again}"] if again else []
    if (found := result.diagnosis) is None:
        return lines + last
    part = [f"what follows is of {part}"] if (part := result.diagnosed_part) else []
    wrong = "outside bounds" * bool(result.outside)
    return [*lines, *part, *diagnosis_lines(found, wrong, brief=brief), *last]


def diagnosis_lines(found: Diagnosis, wrong: str = "", *, brief: bool = False) -> list[str]:
    """What a diagnosis says, a line each.

    Args:
        found: the diagnosis.
        wrong: says of the elements it is about what they are, if not all.
        brief: without what nobody needs who knows what is wrong, where every bit is predicted.
    """
    lines = []
    brief = brief and found.finding.exact
    if found.finding.sentence:
        sentence, others = listed(str(found.finding))
        lines.append(f"finding ({found.proof}): {sentence}")
        lines += [f"the same bits would come from: {other}" for other in others if not brief]
    lines.append(f"first: {found.output} {found.first}")
    if brief:
        return lines
    lines += [f"feeds it: {words}" for words in found.feeds]
    lines += [f"pattern: {words}" for words in found.patterns if words != EVERYWHERE]
    if found.stage and not found.finding.exact and found.stage != found.finding.sentence:
        lines.append(f"stage: {found.stage}")
    lines += [f"defect: {words}" for words in predicted(found)]
    return [*lines, *_attributed(found, wrong)]


def _attributed(found: Diagnosis, what: str) -> list[str]:
    """The kinds of places that tell most, a line each, with the places of which the largest share is wrong."""
    lines = []
    for by in list(dict.fromkeys(row.by for row in found.attribution))[:_KINDS]:
        rows = [row for row in found.attribution if row.by == by]
        rows.sort(key=lambda row: -row.differing / row.elements)
        wrong = [row for row in rows if row.differing]
        shown = [f"{row.place}: {row.differing:,} of {row.elements:,}" for row in wrong[:_ROWS]]
        apart = by.startswith(OF_SLOTS) and not by.endswith(ALL_TOKENS)
        none = "none of the tokens without a slot there" if apart else "none of the others"
        more = ["..."] if len(wrong) > _ROWS else [none] if len(wrong) < len(rows) else []
        lines.append(f"{what} by {by}: {'; '.join([*shown, *more])}".strip())
    return lines


def by_suite(report: Report) -> Iterator[tuple[str, list[CaseResult]]]:
    """The results of each suite, with its name."""
    suites: dict[str, list[CaseResult]] = {}
    for result in report.results:
        suites.setdefault(result.case.rsplit("/", 1)[0], []).append(result)
    yield from suites.items()


def predicted(found: Diagnosis) -> list[str]:
    """What each named defect predicts, a line each."""
    lines = []
    for p in found.predictions:
        how = "predicts exactly these bits" if p.exact else f"predicts {p.fraction:.1%} of the wrong bits"
        lines.append(f"{p.name} {how} ({DEFECTS[p.name].summary})")
    return lines
