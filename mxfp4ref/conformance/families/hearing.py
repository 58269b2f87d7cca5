"""What the other cases that fail say of a hypothesis that predicts every bit of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from mxfp4ref.conformance.comparison import differing
from mxfp4ref.conformance.families.batches import one_thread
from mxfp4ref.conformance.families.distances import angle_between, ulps_apart
from mxfp4ref.conformance.families.hypothesis import Hypothesis, Pipeline
from mxfp4ref.conformance.families.search import Match
from mxfp4ref.model.call import MoeCall

__all__ = ["Failure", "Heard", "Kind", "hear", "kind_of", "refuted"]

_TELLING = 11  # cases, the most telling ones, after which what predicts one alone is heard no further
_SIMPLEST = 4  # of those that predict the same
_SUPPORTED = 0.5  # of the elements that are wrong, or would be, in a case of a kind
Kind = tuple[object, ...]


@dataclass(frozen=True)
class Failure:
    """A case that fails.

    Attributes:
        case: its id.
        pipeline: the right one, as `engine.prepared` makes it.
        got, want: `[M, H] bf16`.
        outside: `[M, H] bool`, in mode bounded, where it leaves its bounds.
        found: what predicts every bit of it, by a quick look.
    """

    case: str
    pipeline: Pipeline
    got: Tensor
    want: Tensor
    outside: Tensor | None = None
    found: tuple[Hypothesis, ...] = ()


@dataclass
class Heard:
    """A hypothesis that predicts every bit of some case, and what other failing cases say of it.

    Attributes:
        match: the hypothesis.
        cases: in which it predicts every bit.
        kinds: of these cases.
        mostly: the cases where it predicts most of the wrong bits, or all; of how many elements, and of how many.
        against: the cases where it predicts few of the wrong bits, or wrong ones.
        refuting: the kinds of these.
        all_heard: whether all cases were asked.
    """

    match: Match
    cases: list[str] = field(default_factory=list)
    kinds: set[Kind] = field(default_factory=set)
    mostly: dict[str, tuple[int, int]] = field(default_factory=dict)
    against: list[str] = field(default_factory=list)
    refuting: set[Kind] = field(default_factory=set)
    all_heard: bool = True

    @property
    def predicted(self) -> int:
        """How many wrong elements it predicts in the cases where these are most."""
        return sum(count for count, _ in self.mostly.values())

    @property
    def part(self) -> float:
        """Which part of the wrong elements of these cases that is."""
        return self.predicted / max(sum(total for _, total in self.mostly.values()), 1)


def hear(match: Match, failures: list[Failure]) -> Heard:
    """In which cases a hypothesis predicts every bit, and which kinds of cases refute it."""
    heard = Heard(match)
    with one_thread():
        for index, failure in enumerate(failures):
            output = match.hypothesis.run(failure.pipeline)
            if output is not None and output.shape == failure.got.shape:
                other = differing(output, failure.got)
                moved = differing(output, failure.want)
                concerned = moved | differing(failure.got, failure.want)
                count, total = int((concerned & ~other).sum()), int(concerned.sum())
                if bool(moved.any()) and count >= _SUPPORTED * total:
                    heard.mostly[failure.case] = count, total
                if not bool(other.any()):
                    heard.cases.append(failure.case)
                    heard.kinds.add(kind_of(failure.pipeline.call))
                elif bool(moved.any()) and count < _SUPPORTED * total:
                    heard.against.append(failure.case)
                    heard.refuting.add(kind_of(failure.pipeline.call))
            least = index - 4 if match.hypothesis.slow else 1 if index >= _TELLING else -1
            if len(heard.cases) <= least and 2 * len(heard.mostly) <= index:
                heard.all_heard = index == len(failures) - 1
                break
    return heard


def refuted(hypotheses: Sequence[Hypothesis], failures: list[Failure]) -> bool:
    """Whether each of those that predict every bit of some case makes more of the others worse than better.

    What is one of two mistakes brings others nearer to what came out, if it shows in them at all.
    """
    with one_thread():
        return bool(hypotheses) and all(_worsens(h, failures) for h in hypotheses[:_SIMPLEST])


def _worsens(hypothesis: Hypothesis, failures: list[Failure]) -> bool:
    nearer, farther = 0, 0
    for failure in failures[:_TELLING]:
        output = hypothesis.run(failure.pipeline)
        if output is None or not bool(differing(output, failure.want).any()):
            continue
        ulps, angles = (
            [measure(one, failure.got) for one in (output, failure.want)]
            for measure in (ulps_apart, angle_between)
        )
        better = ulps[0] < ulps[1] or angles[0] < angles[1]
        nearer, farther = nearer + better, farther + (not better)
    return farther > nearer


def kind_of(call: MoeCall) -> Kind:
    """What decides which code of a kernel a call takes: one kind may be wrong where another is not."""
    experts = call.experts
    given = (
        experts.swiglu_alpha,
        experts.swiglu_beta,
        experts.swiglu_limit,
        experts.fc1_biases,
        experts.fc2_biases,
    )
    return (call.activation, *(t is None for t in given), call.ep_size > 1, call.tp_size > 1)
