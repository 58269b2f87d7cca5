"""What came of a conformance run: a result for each case, and the verdict on the kernel."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise

from mxfp4ref._choices import MODES
from mxfp4ref._files import printable
from mxfp4ref._shown import Shown
from mxfp4ref.conformance.case_result import PASSING, RECORDING, STATE, CaseResult
from mxfp4ref.conformance.diagnosis import Finding
from mxfp4ref.conformance.families.hypothesis import UNKNOWN
from mxfp4ref.conformance.findings.finding import (
    SEVERAL,
    SPECIAL,
    WITHIN,
    added,
    alternatives,
    counted,
    listed,
)
from mxfp4ref.conformance.goldens_used import GoldensUsed
from mxfp4ref.conformance.kernels.adapters import OTHER_KIND, SKIPPED_BEFORE
from mxfp4ref.conformance.kernels.importing import call_form
from mxfp4ref.defects import DEFECTS

__all__ = ["MODES", "PASSING", "RECORDING", "CaseResult", "Report", "in_which_way", "now"]

_REASON = 300  # letters of a message that a verdict has
_REASONS = 5  # that are told of skipped cases
# How what a kernel raises begins that is called in another form than it is written for.
_OF_CALLS = tuple(f"{name}Error" for name in ("Attribute", "Index", "Key", "Type", "Value"))
_TELLING = 4  # failing cases that are named where nothing else is known


@dataclass(frozen=True, repr=False)
class Report(Shown):
    """The results of a run.

    Attributes:
        kernel: its name.
        mode: "exact" or "bounded".
        results: one for each case.
        defects: the named defects each of which predicts all outputs that differ, in every bit.
        seconds: of the whole run.
        environment: versions and machine.
        finding: what is wrong, in words, and in which stage, as far as all cases together say.
        left: how many of the chosen cases were not run, since enough had failed or the run was interrupted.
        unable: how many of these are none that the kernel runs, of other kinds.
        too_large: how many of the goldens' cases were not chosen since they may not fit into memory.
        interrupted: whether the run was: then there is no verdict.
        goldens: which; None for cases that were given by themselves.
        date: when the run began: UTC, ISO 8601.
        command: of `mxfp4ref`, that ran it.
        arguments: of the command, kernel first, to run it so again; empty where there are none, as for a function.
        selection: further ones, options with a value each, which chose the cases; empty for all.
        verdict_seconds: for the diagnosis of all cases together.
        line: the shell's line that ran it, where that was no command of `mxfp4ref`.
    """

    kernel: str
    mode: str
    results: tuple[CaseResult, ...]
    defects: tuple[str, ...] = ()
    seconds: float = 0.0
    environment: Mapping[str, str] = field(default_factory=dict)
    finding: Finding = UNKNOWN
    left: int = 0
    unable: int = 0
    too_large: int = 0
    interrupted: bool = False
    goldens: GoldensUsed | None = None
    date: str = ""
    arguments: tuple[str, ...] = ()
    selection: tuple[str, ...] = ()
    verdict_seconds: float = 0.0
    line: str = ""
    command: str = "conform"

    def __post_init__(self) -> None:
        object.__setattr__(self, "kernel", printable(self.kernel, lines=False))
        environment = {name: printable(value, lines=False) for name, value in self.environment.items()}
        object.__setattr__(self, "environment", environment)

    def __str__(self) -> str:
        """What the command prints."""
        from mxfp4ref.conformance.reports.report_text import to_text

        return to_text(self)

    @property
    def ok(self) -> bool:
        """Whether every case passed, any had elements that were compared, and the run came to its end."""
        return self.compared and not self.interrupted and all(r.ok for r in self.results)

    @property
    def compared(self) -> bool:
        """Whether that is so of any case; else there is no verdict."""
        return any(r.compared for r in self.results)

    @property
    def judged(self) -> str:
        """The result in a few words."""
        if not self.ok:
            return "interrupted, no verdict" if self.interrupted else "does not conform"
        if self.proves_nothing:
            return "equal, but this proves nothing"
        nothing = sum(r.proves_nothing for r in self.results)
        if self.goldens is not None and self.goldens.missing:
            return "conforms on a few cases only"
        return "conforms" + (f", but {nothing:,} of {len(self.results):,} prove nothing" if nothing else "")

    @property
    def proves_nothing(self) -> bool:
        """Whether all passed, and any kernel would have."""
        return self.ok and all(r.proves_nothing for r in self.results if r.status != "skipped")

    @property
    def verdict(self) -> str:
        """The result in a sentence or two, or a few more."""
        return " ".join(self.sentences)

    @property
    def sentences(self) -> list[str]:
        """The verdict's: what came of it, then what is wrong and how far that was looked for, if anything is."""
        alone = [f"{r.case} is right when run alone: {STATE}." for r in self.results if STATE in r.message]
        others = filter(None, (self.culprit.strip(), self.further.strip(), self.unfinished))
        return [self.outcome, *alone[:1], *others]

    @property
    def outcome(self) -> str:
        """The result without what is wrong."""
        ran = [r for r in self.results if r.status != "skipped"]
        failed = sum(not r.ok for r in ran)
        of = f"{failed} of {counted(len(ran), 'case')}"
        if self.interrupted and not ran:
            return f"{self.kernel}: interrupted before any case was run: no verdict."
        if self.interrupted:
            return f"{self.kernel}: interrupted, no verdict; {of} failed{self._scope}."
        if not ran:
            return f"{self.kernel} ran on no case{f': {self.skipped}' if self.skipped else ''}."
        if not self.compared:
            cases = counted(len(ran), "case")
            return f"{self.kernel} ran on {cases} without an element to compare: no verdict."
        if not failed:
            how = "equals the expected bits" if self.mode == "exact" else "stays within the bounds"
            which = f"all {len(ran)} cases" if len(ran) > 1 else "the one case that ran"
            unseen = "" if self.goldens is None else self.goldens.unseen
            few = " on a few cases only" * bool(unseen)
            return f"{self.kernel} conforms{few}: it {how} in {which}{self._scope}.{unseen}"
        fail = "fails" if failed == 1 else "fail"
        return f"{self.kernel} does not conform: {of} {fail}{self._how}{self._scope}."

    @property
    def unfinished(self) -> str:
        """Where a run stopped, from outside or since enough had failed: what was left undone, and how to do it."""
        from mxfp4ref.conformance.reports.again import full_command, whole_command

        failed = len(self._failing)
        if self.interrupted:
            together = sum(r.diagnosis is not None for r in self._failing) > 1 and not full_command(self)
            run = "was" if self._others == 1 else "were"
            undone = [f"{counted(self._others, 'case')} {run} not run"] if self._others else []
            undone += ["what fails was not diagnosed together"] if together else []
            again = f"; to run all: {line}" if (line := whole_command(self)) else "."
            words = " and ".join(undone)
            return f"{words[0].upper()}{words[1:]}{again}" if undone else ""
        if not self._others:
            return ""
        few = "the one case" if failed == 1 else f"the {failed:,} cases"
        others = counted(self._others, "other case")
        if "--maxfail" not in self.selection:
            return f"Judged from {few} that failed; {others} not run may tell more."
        option = "-x" if ("--maxfail", "1") in pairwise(self.selection) else "--maxfail"
        again = f": {whole_command(self)}" if self.arguments else "."
        return f"Judged from {few} that failed; without {option}, {others} may tell more{again}"

    @property
    def _others(self) -> int:
        """How many cases were not run that the kernel runs."""
        return self.left - self.unable

    @property
    def skipped(self) -> str:
        """How many cases were skipped and why, the most frequent reason first; "" if none were."""
        skipped = [r for r in self.results if r.status == "skipped"]
        reasons = Counter(" ".join(r.message.split()) for r in skipped if OTHER_KIND not in r.message)
        others = len(skipped) - reasons.total()
        words = []
        for reason, count in reasons.most_common(_REASONS):
            before = self.command != "conform" or any(known in reason for known in SKIPPED_BEFORE)
            by = "" if before else " by the kernel"
            words.append(f"{count:,} skipped{by}: {reason}")
        if more := reasons.total() - sum(count for _, count in reasons.most_common(_REASONS)):
            words.append(f"{more:,} for {counted(len(reasons) - _REASONS, 'other reason')}")
        of_other_kinds = [f"{others:,} skipped, of kinds that it does not run"] * (others > 0)
        return "; ".join(words + of_other_kinds)

    @property
    def _failing(self) -> list[CaseResult]:
        return [r for r in self.results if not r.ok]

    @property
    def _how(self) -> str:
        """How many fail in which way, if not all do in one, and how many of them were passed over."""
        words = [in_which_way(self._failing)] if len({r.status for r in self._failing}) > 1 else []
        words += [f"{n} of them passed over, within bounds"] if (n := self.passed_over(self.results)) else []
        return f" ({'; '.join(words)})" if words else ""

    def passed_over(self, results: Iterable[CaseResult]) -> int:
        """How many of these fail, and no limit of failures counted them: they lie within bounds."""
        limited = "--maxfail" in self.selection
        return sum(not r.ok and not r.fails_outright for r in results) if limited else 0

    @property
    def _scope(self) -> str:
        """Of how many the cases that ran are some; "" if they are all."""
        ran = sum(r.status != "skipped" for r in self.results)
        if self.goldens is not None:
            return self.goldens.scope(ran)
        given = len(self.results) + self.left
        return f", of {given}" if ran < given else ""

    @property
    def within_bounds(self) -> int:
        """How many failing cases a kernel that only sums in another order may fail so, in mode exact.

        0 where it is known to do more than that, as by a mistake that predicts every bit.
        """
        known = self.defects or (self.finding.exact and not self.finding.cases)
        return 0 if known else sum(r.within_bounds is True for r in self.results)

    @property
    def outside_bounds(self) -> int:
        """How many are known to fail as no kernel does that only sums in another order."""
        return sum(r.within_bounds is False for r in self.results)

    @property
    def culprit(self) -> str:
        """What is wrong, as sentences after others; "" if nothing is known."""
        from mxfp4ref.conformance.reports.again import bounded_command

        count, found = self.within_bounds, self.finding
        if not count:
            return self._culprit
        if count == len(self._failing):
            again = bounded_command(self)
            unknown = f". Some mistakes do too: mode bounded goes on to what tells, of the {self._others} not run yet"
            accepts = unknown if self._others else "; mode bounded accepts it"
            words = f" All that differs lies {WITHIN}{accepts}{f': {again}' if again else ''}."
            return words + (self._culprit if found.sentence else "")
        out = f", {self.outside_bounds} outside those of any order" * (self.outside_bounds > 0)
        rest = f"what follows is of the others.{self._culprit or ' Nothing is known.'}"
        return f" {count} of these lie{'s' * (count == 1)} {WITHIN}{out}; {rest}"

    @property
    def _culprit(self) -> str:
        found = self.finding
        one = self._others and len(self._failing) == 1  # which what is wrong elsewhere may explain as well
        every = "In this one case every wrong bit" if one else "Every wrong bit"
        if self.defects:
            which = " or ".join(self.defects)
            summary = DEFECTS[self.defects[0]].summary
            more = "" if len(self.defects) == 1 else " (these cases do not tell them apart)"
            others = [words for words in found.hypotheses if words.split(":")[0] not in self.defects]
            _, special, rest = found.sentence.partition(f"; {SPECIAL}")
            said = f"{summary}{special}{listed(rest)[0]}{alternatives(summary, others)}"
            return f" {every} is that of {which}{more}: {said}."
        where = f"; {found.where}" if found.stages else ""
        if found.sentence and found.cases:
            of = f"{found.cases[0]} of {counted(found.cases[1], 'failing case')}"
            of += " that were searched" * (found.cases[1] < len(self._failing) - self.within_bounds)
            if found.exact:
                return f" Each is explained in every bit, by different sentences; {of} by this: {found.sentence}."
            return f" Every wrong bit in {of} is predicted by this: {added(found.sentence, where)}."
        if found.sentence and found.exact:
            return f" {every} is predicted by this: {found.sentence}."
        of_some = found.stages == ("routing",) and re.match(r"in \d", found.sentence)
        if found.kind == SEVERAL or of_some:
            return f" No one sentence explains all: {added(found.sentence, where)}."
        if found.sentence and found.stages == ("routing",):
            return f" Up to roundings, this explains all ids and weights: {found.sentence}."
        if found.sentence:
            none = "No single change that was tried predicts every bit of all that fails"
            return f" {none}. The best evidence: {added(found.sentence, where)}."
        if known := found.common or found.where:
            return f" What is wrong is unknown; {known}.{self._most_telling}"
        if any(r.diagnosis for r in self.results):
            return f" What is wrong is unknown.{self._most_telling}"
        first = next((r for r in self._failing if r.message), None)
        if first is None:
            return ""
        said = f"{first.status}: {_beginning(first.message)}."
        ran = [(r.status, r.message) for r in self.results if r.status != "skipped"]
        of_calls = first.status == "raised" and first.message.startswith(_OF_CALLS)
        if of_calls and len(set(ran)) == 1 and (len(ran) > 1 or self.left):
            which = "All are alike" if len(ran) > 1 else first.case
            return f" {which}: {said} {call_form(self.kernel)}".rstrip()
        return f" {first.case}: {said}"

    @property
    def _most_telling(self) -> str:
        """Which failing cases to look at where nothing is known, of as many suites as may be; "" where one fails."""
        failing = [r for r in self._failing if r.diagnosis is not None]
        failing.sort(key=lambda r: (*r.untelling, -r.differing / max(r.elements, 1)))
        firsts = {r.case.split("/")[0]: r.case for r in reversed(failing)}
        names = [*reversed(firsts.values()), *(r.case for r in failing)]
        told = ", ".join([*dict.fromkeys(names)][:_TELLING])
        return f" Of those that fail these tell most: {told}." if len(failing) > 1 else ""

    @property
    def further(self) -> str:
        """After a quick diagnosis that does not explain every bit of a call, or of one, the line of the full one."""
        from mxfp4ref.conformance.reports.again import full_command

        calls = [r for r in self._failing if r.diagnosis is not None and r.kind in ("moe", RECORDING)]
        again = full_command(self)
        if not calls or not again:
            return ""
        if self.defects or self.finding.exact:
            alone = f" A quick diagnosis of one case; a full one tells what else predicts its bits: {again}"
            return alone * (len(calls) == 1)
        return f" This was a quick diagnosis; a full one tries more: {again}"


def in_which_way(failing: Iterable[CaseResult]) -> str:
    """ "3 differ, 1 raised"."""
    counts = Counter(r.status for r in failing)
    return ", ".join(
        f"{n} {'differ' if status == 'differs' and n > 1 else status}" for status, n in counts.items()
    )


def _beginning(message: str) -> str:
    """A message in a line; of a long one as many whole parts as a verdict has room for."""
    words = " ".join(message.split())
    if len(words) <= _REASON:
        return words
    ends = [end.start() for end in re.finditer(r"[.;:,] ", words[:_REASON])]
    return f"{words[: ends[-1]] if ends else words[:_REASON].rpartition(' ')[0]} ... (all of it stands above)"


def now() -> str:
    """For a report's date: UTC, ISO 8601."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
