"""Which named defect predicts an output that differs: tried on one token and its experts, then on more.

Tokens do not influence each other, so that a defect that does not predict the bits of one token is refuted, however
large the call is. A layer of real size is 3 GB; one token's experts, and their neighbours, are 0.2 GB.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from mxfp4ref.conformance.comparison import differing
from mxfp4ref.conformance.families.named_stages import stages_of
from mxfp4ref.conformance.findings.finding import Finding, in_words
from mxfp4ref.conformance.findings.reduction import Part, clock_of, is_heavy, isolate, reduce_call
from mxfp4ref.conformance.kernels.stand_ins import defect_outputs
from mxfp4ref.defects import DEFECTS, gemm
from mxfp4ref.defects.definition import logical
from mxfp4ref.formats.humming_experts import HummingExperts
from mxfp4ref.model.call import MoeCall

__all__ = [
    "NOISE",
    "Prediction",
    "Progress",
    "Verdict",
    "closest",
    "named_finding",
    "predict",
    "predicted_by",
    "special_predictions",
    "try_defects",
]

Progress = Callable[[str, int], None]

_PROBES = 8  # tokens of which one has to give its expected row alone
_TOKENS = 8  # on which defects are ranked
_CONFIRMING = 64  # of a large call on which a defect has to be exact
_FOR_NAMES = 0.7  # of the time
_MOST_LISTED = 3
# A fraction of the wrong bits that a defect which has nothing to do with them does not reach: on fourteen unrelated
# mistakes in six golden cases the best of the list got 14 % where random elements were 1 ulp off, 1 % of most others.
NOISE = 0.25
_FEWEST = 8  # elements that agree; of few, some do by chance


@dataclass(frozen=True)
class Prediction:
    """How well a named defect predicts what came.

    Attributes:
        name: of `mxfp4ref.defects`.
        fraction: of the elements in which kernel or defect differ from the expected output, how many agree
            with each other in all bits.
        exact: whether all do.
    """

    name: str
    fraction: float
    exact: bool


@dataclass(frozen=True)
class Verdict:
    """What came of trying defects.

    Attributes:
        predictions: the exact ones, or else those that come closest.
        remarks: what was not tried or compared, in words.
    """

    predictions: tuple[Prediction, ...]
    remarks: tuple[str, ...] = ()


@dataclass
class _Score:
    """In how many elements the kernel or a defect is not as expected, and in how many of these they agree."""

    concerned: int = 0
    agreeing: int = 0

    def add(self, guess: Tensor, got: Tensor, want: Tensor) -> bool:
        """Count some more, and say whether all of these agree."""
        guess = guess.to(got.device)
        concern = differing(got, want) | differing(guess, want)
        agree = concern & ~differing(got, guess)
        self.concerned += int(concern.sum())
        self.agreeing += int(agree.sum())
        return torch.equal(agree, concern)

    def prediction(self, name: str) -> Prediction:
        return Prediction(name, self.agreeing / max(self.concerned, 1), self.agreeing == self.concerned)


def predict(
    inputs: object, outputs: Mapping[str, Tensor], expected: Mapping[str, Tensor], name: str
) -> Prediction | None:
    """How well the defect `name` predicts the outputs; None if it cannot show on these inputs."""
    predicted = defect_outputs(DEFECTS[name], inputs)
    if predicted is None or any(predicted[key].dtype != want.dtype for key, want in expected.items()):
        return None  # also a case of dequantisation to another dtype than the defects'
    score = _Score()
    for key, want in expected.items():
        score.add(predicted[key], outputs[key], want)
    return score.prediction(name)


def closest(predictions: Iterable[Prediction]) -> tuple[Prediction, ...]:
    """The exact ones; if there are none, the three with the most wrong bits, unless chance gives as many."""
    ranked = sorted(predictions, key=lambda p: (not p.exact, -p.fraction))
    exact = [p for p in ranked if p.exact]
    return tuple(exact or [p for p in ranked if p.fraction >= NOISE][:_MOST_LISTED])


def try_defects(
    call: MoeCall,
    output: Tensor,
    expected: Tensor,
    *,
    first: Sequence[str] = (),
    seconds: float,
    progress: Progress | None = None,
) -> Verdict:
    """The defects that predict every bit of an output that differs, or those that come closest.

    Args:
        call: the call, with MXFP4 weights.
        output, expected: `[M, H] bf16`.
        first: defects to try before all others, which are tried if none of these is exact.
        seconds: of the processor that the search may take on a call of real size, roughly. Smaller ones take what
            they take.
        progress: called before each defect, with its name and how many there are.
    """
    search = _Search(call, output, expected, seconds)
    probe = search.probe()
    if probe is None:
        return Verdict(
            (), (f"named defects were not tried: none of {_PROBES} tokens gives its expected row alone",)
        )
    target = "w4a8" if isinstance(call.experts, HummingExperts) else "moe"
    names = [name for name, defect in DEFECTS.items() if defect.target == target]
    names.sort(key=lambda name: name in vars(gemm))  # which take longest
    for group in ([name for name in first if name in names], names):
        exact = []
        for name in group:
            if name not in search.tried and not search.out_of_time(_FOR_NAMES):
                if progress is not None:
                    progress(name, len(names))
                if search.agrees(probe, name):
                    exact.append(name)
        search.remark_untried(group)
        if exact := search.confirm(exact, probe):
            return Verdict(tuple(Prediction(name, 1.0, True) for name in exact), tuple(search.remarks))
    return Verdict(search.closest(), tuple(search.remarks))


class _Search:
    """One output that differs, and what of it has been compared."""

    def __init__(self, call: MoeCall, output: Tensor, expected: Tensor, seconds: float) -> None:
        self.call, self.output, self.expected = call, output, expected
        self.heavy, self.clock = is_heavy(call), clock_of(call)
        self.start, self.seconds = self.clock(), seconds
        wrong = differing(output, expected).sum(1).cpu()
        order = wrong.argsort(descending=True, stable=True).tolist()
        self.wrong = [token for token in order if wrong[token]]
        self.right = [token for token in order if not wrong[token]]
        self.tried: dict[str, _Score | None] = {}  # None where it cannot show
        self.remarks: list[str] = []

    def out_of_time(self, share: float = 1.0) -> bool:
        return self.heavy and self.clock() - self.start > share * self.seconds

    def remark_untried(self, names: list[str]) -> None:
        if left := [name for name in names if name not in self.tried]:
            shown = ", ".join(left[:_MOST_LISTED]) + (", ..." if len(left) > _MOST_LISTED else "")
            self.remarks.append(
                f"{len(left)} of {len(names)} named defects were not tried for lack of time: {shown}"
            )

    def probe(self) -> Part | None:
        """The token with the most wrong elements that can be taken out of the call."""
        for token in self.wrong[:_PROBES]:
            if (part := self.isolate(token)) is not None:
                return part
        return None if self.heavy else self.whole()

    def isolate(self, token: int) -> Part | None:
        part = isolate(self.call, token, self.expected[token])
        return None if part is None else replace(part, call=logical(part.call))

    def whole(self) -> Part:
        return Part(logical(self.call), torch.arange(self.call.num_tokens, device="cpu"))

    def agrees(self, part: Part, name: str) -> bool:
        """Whether a defect gives the kernel's bits there."""
        got, want = self.output[part.tokens], self.expected[part.tokens]
        self.tried.setdefault(name, None)
        predicted = defect_outputs(DEFECTS[name], part.call)
        if predicted is None and self.tried[name] is None:
            return not bool(differing(got, want).any())  # where a defect cannot show all is right
        score = self.tried[name] = self.tried[name] or _Score()
        return score.add(want if predicted is None else predicted["output"][part.first :], got, want)

    def confirm(self, names: list[str], probe: Part) -> list[str]:
        """Which of those that agree on the probe do so on the other tokens too, right ones included."""
        compared = len(probe.tokens)
        for part in self.others(probe):
            if not names or self.out_of_time():
                break
            names = [name for name in names if self.agrees(part, name)]
            compared += len(part.tokens)
        if names and compared < self.call.num_tokens:
            self.remarks.append(f"named defects were compared on {compared} of {self.call.num_tokens} tokens")
        return names

    def others(self, probe: Part) -> Iterator[Part]:
        """More to compare: the whole call, or token by token, wrong and right ones in turn."""
        if not self.heavy:
            if len(probe.tokens) < self.call.num_tokens:
                yield self.whole()
            return
        rest = [token for pair in zip_longest(self.wrong, self.right) for token in pair if token is not None]
        rest = [token for token in rest if token not in probe.tokens.tolist()]
        for token in rest[: _CONFIRMING - len(probe.tokens)]:
            if (part := self.isolate(token)) is not None:
                yield part

    def closest(self) -> tuple[Prediction, ...]:
        """None being exact, those that come closest."""
        scores = {name: score for name, score in self.tried.items() if score is not None}
        if not self.heavy:
            tokens = torch.tensor(sorted(self.wrong[:_TOKENS]), device="cpu")
            on_device = tokens.to(self.call.input.device)
            part = Part(logical(reduce_call(self.call, on_device, neighbours=True)), tokens)
            self.tried.clear()
            for name in scores:
                self.agrees(part, name)
            scores = {name: score for name, score in self.tried.items() if score is not None}
        found = (
            replace(score.prediction(name), exact=False)
            for name, score in scores.items()
            if score.agreeing >= _FEWEST
        )
        return closest(found)


def predicted_by(
    target: str, inputs: Any, outputs: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> tuple[Prediction, ...]:
    """How well the named defects of a stage, other than a whole call, predict what came; the closest."""
    names = (n for n, defect in DEFECTS.items() if defect.target == target)
    found_by = (predict(inputs, outputs, expected, n) for n in names)
    return closest(p for p in found_by if p is not None)


def special_predictions(
    inputs: MoeCall, outputs: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> tuple[Prediction, ...]:
    """The named defects that predict every bit, of those that concern NaN and infinities alone.

    Not that scale byte 255 is NaN, since an infinite weight is as soon as it is multiplied by 0.
    """
    moe = (name for name, defect in DEFECTS.items() if defect.target == "moe" and name != "scale_ocp_ends")
    names = (name for name in moe if re.search(r"\b(NaN|Inf)", DEFECTS[name].summary))
    found_by = (predict(inputs, outputs, expected, name) for name in names)
    return tuple(p for p in found_by if p is not None and p.exact)


def named_finding(predictions: tuple[Prediction, ...]) -> Finding:
    """What named defects that predict every bit say; nothing where none does."""
    exact = [p.name for p in predictions if p.exact]
    if not exact:
        return Finding()
    defect = DEFECTS[exact[0]]
    hypotheses = tuple(f"{name}: {DEFECTS[name].summary}" for name in exact)
    return Finding(stages_of(defect.name), in_words(hypotheses), True, hypotheses=hypotheses)
