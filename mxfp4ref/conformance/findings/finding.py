"""What a diagnosis found out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

__all__ = [
    "OTHERS",
    "OTHER_EXPERTS",
    "SEVERAL",
    "SPECIAL",
    "STAGES",
    "UNKNOWN",
    "WITHIN",
    "Evidence",
    "Finding",
    "added",
    "alternatives",
    "counted",
    "in_words",
    "listed",
    "of_nan_bits",
    "of_specials",
    "others_than",
]

STAGES = (
    *("input", "slots", "fc1", "activation", "fc2", "finalize"),
    *("routing", "quantize", "dequantize", "layout"),
)

OTHER_EXPERTS = "slots are computed by other experts"  # the kind of a finding
SEVERAL = (
    "two or more mistakes, or one that shows in several ways"  # the kind of what cases say that do not agree
)
# Between what predicts every bit of some cases, and what is known of the others.
OTHERS = "; in the others "


WITHIN = "within the bounds of a correct evaluation in another order"
_ALTERNATIVES = 5  # that a sentence names
_OPENING = 3  # words, by which they are told from more of the same
_NUMBERS = 4  # beside the first one, that are told
_NUMBER = re.compile(r"(?<![\w.^-])\d+(?:\.\d+)?(?:e[+-]?\d+)?(?![\w^])")
_FILLERS = {"is", "are", "the", "and", "in", "of", "activation"}
_ALSO = ". The same bits would come from: "  # what follows comes last, and is numbered if there are several


def in_words(hypotheses: Sequence[str]) -> str:
    """Hypotheses that predict the same bits, as a sentence: the first, and that it is not told from the others."""
    first, *others = _by_number(hypotheses)
    return first + alternatives(first, others)


def alternatives(first: str, others: Sequence[str]) -> str:
    """That others give the same bits as the first, as a sentence after it: those that open otherwise come first."""
    of_opening = Counter[tuple[str, ...]]()
    place = []
    for other in (others := others_than(first, others)):
        of_opening[opening := tuple(other.split()[:_OPENING])] += 1
        place.append(of_opening[opening])
    if len(others) < 2:
        return _ALSO + others[0] if others else ""
    apart = [other for _, other in sorted(zip(place, others, strict=True), key=lambda pair: pair[0])]
    more = f"; and {len(others) - _ALTERNATIVES} more" if len(others) > _ALTERNATIVES else ""
    return _ALSO + "; ".join(f"({n}) {one}" for n, one in enumerate(apart[:_ALTERNATIVES], 1)) + more


def _by_number(hypotheses: Sequence[str]) -> list[str]:
    """Those that differ in one number told as one, at the place of the first: "rows below 8 (or 16, 32)"."""
    alike: dict[tuple[str, ...], list[list[str]]] = {}
    for words in dict.fromkeys(hypotheses):
        alike.setdefault(tuple(_NUMBER.split(words)), []).append(_NUMBER.findall(words))
    told = []
    for between, numbers in alike.items():
        varied = [place for place, some in enumerate(zip(*numbers, strict=True)) if len(set(some)) > 1]
        if len(varied) == 1:
            (place,) = varied
            others = [one[place] for one in numbers[1:]]
            more = f"{', '.join(others[:_NUMBERS])}{', ...' * (len(others) > _NUMBERS)}"
            numbers = [[*numbers[0]]]
            numbers[0][place] += f" (or {more})"
        told += ["".join(chain(*zip(between, (*one, ""), strict=True))) for one in numbers]
    return told


def others_than(first: str, others: Sequence[str]) -> list[str]:
    """Those that say more than the first one, which may be that of a named defect, in other words."""
    told = {*first.replace(",", "").split()} - _FILLERS
    return [other for other in others if not {*other.replace(",", "").split()} - _FILLERS <= told]


def added(sentence: str, words: str) -> str:
    """A sentence with words after it, but before what would give the same bits, which comes last."""
    first, also, others = sentence.partition(_ALSO)
    return first + words.partition(_ALSO)[0] + also + others


def listed(words: str) -> tuple[str, list[str]]:
    """Words without what would give the same bits, and that, one by one."""
    first, _, others = words.partition(_ALSO)
    items = re.split(r"(?:^|; )\(\d\) |; (?=and \d+ more$)", others.removesuffix("."))
    return first, [item for item in items if item]


def counted(count: int, noun: str) -> str:
    """ "1 token", "2 tokens"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


@dataclass(frozen=True)
class Finding:
    """What to tell the engineer.

    Attributes:
        stages: of `STAGES`, those in which the change may lie by the evidence: one, at most two, none if unknown.
        sentence: what is wrong, in words; "" if unknown.
        exact: whether every bit that differs is predicted.
        cases: where the sentence predicts every bit of some failing cases only, of how many, and of how many in all.
            With `exact`, the others are predicted by other sentences.
        common: what most failing cases share where no sentence is known: a stage, or the places that differ.
        hypotheses: of a prediction, in words all that predict the same bits, the simplest first.
        kind: what the sentence says without the numbers of its own case; "" where it has none.
        hedged: whether its stages are no more than possible: it predicts most bits only, or something else could give
            them.
    """

    stages: tuple[str, ...] = ()
    sentence: str = ""
    exact: bool = False
    cases: tuple[int, int] | None = None
    common: str = ""
    hypotheses: tuple[str, ...] = ()
    kind: str = ""
    hedged: bool = False

    @property
    def where(self) -> str:
        """ "it lies in fc1 or activation", or that it may; "" if unknown."""
        lies = "it may lie in" if self.hedged else "it lies in"
        return f"{lies} {' or '.join(self.stages)}" if self.stages else ""

    def __str__(self) -> str:
        where = f" [{'perhaps ' * self.hedged}{' or '.join(self.stages)}]" if self.stages else ""
        return added(self.sentence, where) if self.sentence else ""


UNKNOWN = Finding()
SPECIAL = "special values alone are wrong, all else lies within bounds"
_HANDLED = (
    "where a NaN or an infinity goes in or a sum overflows, it is handled otherwise than by the SM90 kernel, as "
    "where scale byte 255 is NaN, Inf is multiplied by 0, or a clamp keeps NaN"
)


def of_specials(cases: Sequence[str] = (), named: Finding = UNKNOWN) -> Finding:
    """That of cases in which special values alone are wrong, with the arguments that leave them out.

    `named` is what predicts every bit of them, if anything does.
    """
    without = "".join(f" --exclude {case}" for case in cases)
    leave = f"; to leave {'them' if cases[1:] else 'it'} out:{without}" * bool(cases)
    if not named.exact:
        return Finding((), f"{SPECIAL}: {_HANDLED}{leave}", kind=SPECIAL)
    return replace(named, sentence=added(named.sentence, f"; {SPECIAL}{leave}"))


def of_nan_bits(bits: Sequence[int]) -> Finding:
    """That of outputs that are right but for the bits of NaN, which these are."""
    written = ", ".join(f"0x{one:04X}" for one in bits[:_ALTERNATIVES]) + ", ..." * (
        len(bits) > _ALTERNATIVES
    )
    sentence = (
        f"every number is right, and NaN is written as {written}, not as the SM90 kernel's 0x7FFF; "
        "`mxfp4ref.sm90.fp32.to_bf16` rounds as that does, and mode bounded takes any NaN for another"
    )
    return Finding(("finalize",), sentence, len(bits) == 1, kind="NaN is written with other bits")


@dataclass(frozen=True)
class Evidence:
    """One thing that follows from an output that differs.

    Attributes:
        stages: where the change must lie.
        sentence: what follows, for the engineer.
        strength: 4 where it explains every row up to roundings, 3 where it was solved and shows what happens, 2 where
            it was solved, 1 where places say it.
        inner: the activation's columns that are wrong, from the first to the last, where they were solved.
        kind: as of a `Finding`.
        lost: whether it says that rows are no numbers, as a whole.
        zeros: whether it says no more than that rows are zero.
        rounding: whether what it says may be no more than roundings before GEMM2, which another order changes too.
        hedged: as of a `Finding`.
    """

    stages: tuple[str, ...]
    sentence: str
    strength: int
    inner: tuple[int, int] | None = None
    kind: str = ""
    lost: bool = False
    zeros: bool = False
    rounding: bool = False
    hedged: bool = False

    @classmethod
    def of_kind(
        cls,
        stages: tuple[str, ...],
        kind: str,
        details: str,
        strength: int,
        inner: tuple[int, int] | None = None,
    ) -> Evidence:
        """With the kind before the details in its sentence."""
        return cls(stages, f"{kind}: {details}", strength, inner, kind)

    @property
    def final(self) -> bool:
        """Whether there is nothing left to search for in parts of tensors, or by two changes."""
        alone = self.strength == 3 and set(self.stages) <= {"finalize", "slots"}
        return self.strength == 4 or alone or self.lost

    def finding(self) -> Finding:
        return Finding(self.stages, self.sentence, kind=self.kind, hedged=self.hedged)
