"""What changed between two reports of a kernel, as they lie in files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mxfp4ref._files import printable
from mxfp4ref.conformance.findings.finding import counted
from mxfp4ref.conformance.reports.report_reading import WrittenReport

__all__ = ["Changes", "compare_reports"]


@dataclass(frozen=True)
class Changes:
    """What changed between two reports, in words; of cases "name: what".

    Attributes:
        conditions: what else is different, such as the goldens and the versions.
        failing: cases that fail now and passed.
        lost: cases that passed and are skipped now.
        first_failing: cases that fail now and were skipped or not run before.
        passing: cases that pass now and failed.
        changed: cases that fail or pass in another way, or other ones that are skipped in one report only.
        not_run: cases that only the old report has, as where the new run was of some of them.
        only_new: other cases that only the new report has.
        alike: how many cases are as they were: the same result, in the same elements, with the same finding.
        cases: how many the "old" report has, the "new" one, "both", and "either", in which each stands in one of the
            lists above or is as it was.
    """

    conditions: tuple[str, ...]
    failing: tuple[str, ...]
    lost: tuple[str, ...]
    first_failing: tuple[str, ...]
    passing: tuple[str, ...]
    changed: tuple[str, ...]
    not_run: tuple[str, ...]
    only_new: tuple[str, ...]
    alike: int
    cases: Mapping[str, int]

    @property
    def worse(self) -> int:
        """How many cases got worse: they passed, and fail or are skipped now."""
        return len(self.failing) + len(self.lost)


def compare_reports(old: WrittenReport, new: WrittenReport) -> Changes:
    """What changed from one report to another one.

    Raises:
        ValueError: no case ran in the new one, which says nothing of the kernel; or they have none in common.
    """
    if all(_state(result) == "skipped" for result in new.cases.values()):
        raise ValueError(f"{new.path}: expected a report in which a case ran, got none")
    if not old.cases.keys() & new.cases.keys():
        first, second = (printable(next(iter(report.cases), "none"), lines=False) for report in (old, new))
        raise ValueError(
            f"expected reports of the same cases, got {first}, ... in {old.path} and {second}, ... in {new.path}"
        )
    common = [case for case in old.cases if case in new.cases]
    if all(_state(report.cases[case]) == "skipped" for report in (old, new) for case in common):
        raise ValueError(
            f"expected a case that ran in {old.path} or {new.path} among those that both have, all were skipped"
        )
    found: dict[str, list[tuple[str, str, str]]] = {
        name: [] for name in Changes.__annotations__ if name not in ("conditions", "alike", "cases")
    }
    alike = 0
    for case in dict.fromkeys((*old.cases, *new.cases)):
        before, now = old.cases.get(case), new.cases.get(case)
        was, is_now = _state(before), _state(now)
        if is_now == "failed" and was != "failed":
            found["failing" if was == "passed" else "first_failing"].append((case, *_told(now)))
        elif was == "passed" and is_now == "skipped":
            found["lost"].append((case, *_told(now)))
        elif was == "failed" and is_now == "passed":
            found["passing"].append((case, *_told(now)))
        elif not is_now:
            words, why = _told(before)
            found["not_run"].append((case, f"it was {words}", why))
        elif not was:
            found["only_new"].append((case, *_told(now)))
        elif _told(before) != _told(now):
            (old_words, old_why), (words, why) = _told(before), _told(now)
            whys = f"before: {old_why}; now: {why or 'nothing is known'}" if old_why not in ("", why) else why
            found["changed"].append((case, f"{old_words}; now {words}", whys))
        else:
            alike += 1
    told = {name: tuple(_each_why_once(lines)) for name, lines in found.items()}
    counts = {"old": len(old.cases), "new": len(new.cases), "both": len(common)}
    counts["either"] = counts["old"] + counts["new"] - counts["both"]
    return Changes(tuple(_conditions(old, new)), **told, alike=alike, cases=counts)


def _each_why_once(cases: Iterable[tuple[str, str, str]]) -> Iterator[str]:
    """A line for each case, what came of it and why; in place of a reason that was told, of which case it was."""
    first: dict[str, str] = {}
    for case, words, why in cases:
        before = first.setdefault(why, case)
        yield f"{case}: {'; '.join(filter(None, (words, why and (why if before == case else f'as {before}'))))}"


def _state(result: Mapping[str, Any] | None) -> str:
    if result is None:
        return ""
    if not result["ok"]:
        return "failed"
    return "skipped" if result["status"] == "skipped" or not result["elements"] else "passed"


def _told(result: Mapping[str, Any] | None) -> tuple[str, str]:
    """What came of a case, and why."""
    if result is None:
        return "not run", ""
    if result["status"] == "skipped":  # why names the kernel
        return "skipped", ""
    words = str(result["status"]) + ", of no elements" * (result["ok"] and not result["elements"])
    if not result["ok"] and result["elements"]:
        outside = result.get("outside", 0)  # in mode bounded
        words += f" in {outside or result['differing']:,} of {result['elements']:,} elements"
        words += f" ({result['differing']:,} differ)" if outside else ""
    found = result.get("diagnosis", {}).get("finding", {})
    finding = next(
        iter(found.get("hypotheses", ())), found.get("sentence", "")
    )  # without what is not told from it
    return words, finding or result["message"].split("\n")[0]


def _conditions(old: WrittenReport, new: WrittenReport) -> Iterator[str]:
    for report, which in ((old, "the old"), (new, "the new")):
        if report.interrupted:
            yield f"{which} run was interrupted: {_not_run(report.left)}"
        elif report.left:
            yield f"{which} run stopped when enough had failed: {_not_run(report.left)}"
    facts = {"kernel": (old.kernel, new.kernel), "mode": (old.mode, new.mode)}
    facts["goldens"] = _goldens(old), _goldens(new)
    names = dict.fromkeys((*old.environment, *new.environment))
    facts |= {name: (old.environment.get(name, "?"), new.environment.get(name, "?")) for name in names}
    for name, (before, now) in facts.items():
        if before != now:
            yield f"other {name}: {before}; now {now}"
    if old.finding != new.finding:
        yield f"other finding: {old.finding or 'none'}; now {new.finding or 'none'}"


def _not_run(count: int) -> str:
    return f"{counted(count, 'case')} {'was' if count == 1 else 'were'} not run"


def _goldens(report: WrittenReport) -> str:
    """By content, wherever they lie."""
    used = report.goldens
    return f"{used['cases']} cases, manifest SHA-256 {used['sha256']}" if used else "not told"
