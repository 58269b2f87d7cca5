"""What the diagnoses of several cases say together."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from mxfp4ref.conformance.diagnosis import Diagnosis
from mxfp4ref.conformance.findings.finding import SEVERAL, STAGES, Finding, counted, in_words

__all__ = ["agreed", "name_defects", "unrefuted", "with_one_case"]

_MOST_TOLD = 3  # different sentences
_LEAST = 40  # wrong elements that explain a mistake by themselves
_SPECIAL_VALUES = re.compile("special|non_finite")  # cases whose numbers many mistakes give, beside others
_NUMBER = re.compile(r"\d[\d.,]*")
_ALTERNATIVE = re.compile(r"or |and [\d,]+ more ")  # to the part before it
_RIGHT = (" are right", " is right")
_BEFORE_FINALIZE = {"input", "fc1", "activation", "fc2"}
_REACHES = {
    "before finalize": "it lies before finalize",
    "other than the sum's weights": "it is not the weights of finalize's sum",
    "rounding": "every element lies within the interval of all correct evaluations",
}
# A part of a sentence that says what is right, and what stands before and after it.
_SAID_RIGHT = re.compile(r"(; |: )([^;:,]*\b(?:is|are) right)(, |(?=;|$))")
_STAGE_OF = {"GEMM1": "fc1", "activation": "activation", "GEMM2": "fc2", "sum": "finalize"}


def unrefuted(finding: Finding, findings: Sequence[Finding]) -> Finding:
    """The finding without what it says to be right, where another case says that it lies there."""
    refuting: list[Finding] = []

    def kept(match: re.Match[str]) -> str:
        right = {stage for word, stage in _STAGE_OF.items() if word in match[2]}
        if "all else" in match[2]:
            right = set(STAGES) - set(finding.stages)
        others = [f for f in findings if f.stages and set(f.stages) <= right]
        refuting.extend(others)
        return match[0] if not others else match[1] * bool(match[3])

    sentence = _SAID_RIGHT.sub(kept, finding.sentence)
    if finding.exact or not refuting:
        return finding
    other = refuting[0]
    where = f", {'perhaps ' * other.hedged}in {' or '.join(other.stages)}"
    return replace(
        finding, sentence=f"{sentence}; another case shows something else{where}: {_kind(other)}", hedged=True
    )


def agreed(diagnoses: Sequence[Diagnosis]) -> Finding:
    """The finding that most of the cases agree on, with in how many; else the stage, or the places, that most share.

    Args:
        diagnoses: of the cases that fail.
    """
    findings = [d.finding for d in diagnoses]
    if not findings:
        return Finding()
    return (
        _predicted(findings)
        or _evident(findings)
        or _several(findings)
        or Finding(_shared(findings), common=_common(diagnoses))
    )


def with_one_case(
    finding: Finding, diagnoses: Mapping[str, Diagnosis], refuted: Callable[[str], bool] = lambda case: False
) -> Finding:
    """The finding; where no bits of several cases are predicted, with what predicts all those of one by itself.

    Not with what is `refuted` by the other cases. What is read off other cases is left out where that may be it:
    it names causes which this case refutes.
    """
    plain = {case: d for case, d in diagnoses.items() if not _SPECIAL_VALUES.search(case)} or diagnoses
    amount = {case: int((d.bins > 0).sum()) for case, d in plain.items() if d.finding.exact}
    if finding.exact or finding.cases:
        return finding
    likely = (case for case in sorted(amount, key=lambda c: -amount[c]) if amount[case] >= _LEAST)
    if (case := next((case for case in likely if not refuted(case)), None)) is None:
        return finding
    alone = diagnoses[case].finding
    words = f"{case} by itself shows in every bit: {alone.sentence}"
    if not finding.stages or set(alone.stages) & set(finding.stages):
        return Finding(alone.stages, words)
    return replace(finding, sentence="; ".join(filter(None, (finding.sentence, words))))


def name_defects(exact: Iterable[Iterable[str] | None]) -> tuple[str, ...]:
    """The defects that are in every one of the given sets; None counts as all defects."""
    sets = [tuple(names) for names in exact if names is not None]
    return tuple(name for name in (sets[0] if sets else ()) if all(name in names for names in sets))


def _predicted(findings: list[Finding]) -> Finding | None:
    """The sentence that predicts every bit of most cases: of at least half, or where each has one that does."""
    exact = [f for f in findings if f.exact and f.sentence]
    counts = Counter(words for f in exact for words in _hypotheses(f))
    heads = dict.fromkeys(_hypotheses(f)[0] for f in exact)
    if not heads:
        return None
    words = max(heads, key=lambda head: counts[head])
    count, total = counts[words], len(findings)
    if 2 * count < total and len(exact) < total:
        return None
    agreeing = [f for f in exact if words in _hypotheses(f)]
    shared = [w for w in _hypotheses(agreeing[0]) if all(w in _hypotheses(f) for f in agreeing)]
    shared.remove(words)
    hypotheses = (words, *shared)
    sentence = in_words(hypotheses)
    if len({f.sentence for f in agreeing}) == 1:
        sentence = agreeing[0].sentence
    elif agreeing[0].kind == sentence:
        sentence = f"{sentence}; in the first of them: {_details(agreeing[0])}"
    cases = None if count == total else (count, total)
    different = cases is not None and len(exact) == total
    return Finding(
        _shared(findings if different else agreeing),
        sentence,
        different or count == total,
        cases,
        hypotheses=hypotheses,
    )


def _evident(findings: list[Finding]) -> Finding | None:
    """What at least half of the cases say alike, or up to three things that all say of one stage."""
    total = len(findings)
    told = Counter(f.sentence for f in findings if f.sentence).most_common()
    if not told:
        return None
    words, count = told[0]
    if count == total:
        return Finding(_shared(findings), words, hedged=any(f.hedged for f in findings))
    kinds = Counter(_kind(f) for f in findings if f.sentence)
    if kinds.most_common(1)[0][1] > count and (one := _of_one_kind(findings)):
        return one
    if 2 * count >= total and count > 1:
        same = [f for f in findings if f.sentence == words]
        hedged = any(f.hedged for f in same)
        return Finding(_shared(same), f"in {count} of {total} failing cases {words}", hedged=hedged)
    stages = _shared(findings)
    if stages and len(told) <= _MOST_TOLD:
        sentence = "; ".join(f"in {count} of {total} failing cases {words}" for words, count in told)
        return Finding(stages, sentence, hedged=any(f.hedged for f in findings))
    return _of_one_kind(findings)


def _of_one_kind(findings: list[Finding]) -> Finding | None:
    """What most of the cases say in kind, each with numbers of its own; with those of the first as an example."""
    kinds = Counter(_kind(f) for f in findings if f.sentence)
    kind, count = kinds.most_common(1)[0]
    same = [f for f in findings if f.sentence and _kind(f) == kind]
    if 2 * count <= len(findings) or not _shared(same):
        return None
    which = f"all {count}" if count == len(findings) else f"{count} of {len(findings)}"
    of = f"in {which} failing cases {kind}"
    example = _details(same[0])
    sentence = f"{of}{'; in the first of them: ' * bool(example)}{example}"
    return Finding(_shared(same), sentence, hedged=any(f.hedged for f in same))


def _several(findings: list[Finding]) -> Finding | None:
    """What most of the cases say, each something of its own: the parts of it that are said most often."""
    telling = [f for f in findings if f.sentence]
    if len(findings) == 1 or 2 * len(telling) <= len(findings):
        return None
    said: dict[str, list[str]] = {}  # by the words without their numbers, as each case says it
    for finding in telling:
        parts = (finding.hypotheses[0] if finding.hypotheses else _kind(finding)).split("; ")
        parts = [part for part in parts if not part.endswith(_RIGHT) and not _ALTERNATIVE.match(part)]
        own = {_NUMBER.sub("", part): part for part in parts}
        for words, part in own.items():
            said.setdefault(words, []).append(part)
    most = sorted(said.values(), key=len, reverse=True)
    if not most:
        return None
    told = [
        f"in {len(parts)} of {len(findings)}{' failing cases' * (i == 0)} {parts[0]}"
        + " (with numbers of their own)" * (len(set(parts)) > 1)
        for i, parts in enumerate(most[:_MOST_TOLD])
    ]
    more = ["and more, told of each case"] * (len(most) > _MOST_TOLD)
    sentence = f"{SEVERAL}: {'; '.join([*told, *more])}"
    return Finding(_shared(findings), sentence, kind=SEVERAL, hedged=any(f.hedged for f in telling))


def _details(finding: Finding) -> str:
    """What it says beside its kind, part by part."""
    general = _kind(finding).split("; ")
    own = [part for part in finding.sentence.split("; ") if part not in general]
    return "; ".join(
        next((part.removeprefix(one).lstrip(": ") for one in general if part.startswith(one)), part)
        for part in own
    )


def _kind(finding: Finding) -> str:
    return finding.kind or finding.sentence


def _hypotheses(finding: Finding) -> tuple[str, ...]:
    """Those that predict all; a sentence alone is one."""
    return finding.hypotheses or (finding.sentence,)


def _shared(findings: Sequence[Finding]) -> tuple[str, ...]:
    """The stages that all of them leave."""
    return tuple(s for s in findings[0].stages if all(s in f.stages for f in findings))


def _common(diagnoses: Sequence[Diagnosis]) -> str:
    """The stage that most of the cases share, and the pattern; "" without either."""
    stage = _of_most(diagnoses, _stages) or _of_most(diagnoses, _before_finalize)
    return "; ".join(filter(None, (stage, _of_most(diagnoses, _places))))


def _of_most(diagnoses: Sequence[Diagnosis], told: Callable[[Diagnosis], Sequence[str]]) -> str:
    """What more than half of them say of it; "" if nothing."""
    total = len(diagnoses)
    (words, count), *_ = [
        *Counter(words for d in diagnoses for words in dict.fromkeys(told(d))).most_common(1),
        ("", 0),
    ]
    if 2 * count <= total:
        return ""
    return f"in {count} of {counted(total, 'failing case')} {words}" if total > 1 else words


def _stages(diagnosis: Diagnosis) -> Sequence[str]:
    return [diagnosis.finding.where] if diagnosis.finding.stages else []


def _before_finalize(diagnosis: Diagnosis) -> Sequence[str]:
    stages = set(diagnosis.finding.stages)
    if stages and stages <= _BEFORE_FINALIZE and not diagnosis.finding.hedged:
        return [_REACHES["before finalize"]]
    return [_REACHES[diagnosis.reach]] if not stages and diagnosis.reach else []


def _places(diagnosis: Diagnosis) -> Sequence[str]:
    return diagnosis.places
