"""The search among hypotheses: which predicts every bit, everywhere or in a part, alone or with another one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby, islice

import torch
from torch import Tensor

from mxfp4ref.conformance.comparison import differing
from mxfp4ref.conformance.families.batches import each
from mxfp4ref.conformance.families.concerned import kinds_concerned, slots_concerned
from mxfp4ref.conformance.families.distances import angle_between, last_place, share, surprise, ulps_apart
from mxfp4ref.conformance.families.hypothesis import (
    FAILURES,
    Hypothesis,
    Pipeline,
    SlotRows,
    local_of,
    roughly,
)
from mxfp4ref.conformance.families.limited import in_columns, in_rows, in_slots, in_slots_alone
from mxfp4ref.conformance.families.named import NUMBER_OF_NAMES
from mxfp4ref.conformance.families.places import kinds_of_tokens, named_columns, named_tokens
from mxfp4ref.conformance.findings.reach import is_spread
from mxfp4ref.conformance.findings.reduction import clock_of, is_heavy, reduce_call
from mxfp4ref.conformance.heartbeat import trying
from mxfp4ref.model.call import MoeCall
from mxfp4ref.sm90 import fp32

__all__ = ["FEWEST_BITS", "SURELY", "Match", "Search"]

_CLOSE = 0.3  # of how far off the right output is
_A_ROUNDING, _LARGEST = 1.2, 12.0  # times the roundings, on average and of one element
_FAR_OFF, _LARGER = 8.0, 4.0  # times the roundings that are left; times, that rows are than the right ones
SURELY = 0.95  # of the wrong elements predicted in every bit, and the others up to roundings: nothing else is tried
_MOSTLY = 0.8  # of the wrong elements, predicted in every bit
_SPARED = 0.97  # of the right elements, which have to stay so
_PLACES = 4  # that are told, of a change that holds in a part
FEWEST_BITS = 40  # that a match has to explain; see `surprise`


@dataclass(frozen=True)
class Match:
    """A hypothesis and what came of it.

    Attributes:
        hypothesis: with its place in it.
        exact: whether it predicts every bit of the output, wrong and right ones.
        plain: the hypothesis without words on this output, where `hypothesis` says how much of it is predicted.
    """

    hypothesis: Hypothesis
    exact: bool
    plain: Hypothesis | None = None


@dataclass
class Search:
    """One output that differs, and what has been found out about it.

    Attributes:
        pipeline: the right one, or one whose mistake is known.
        got, want: `[M, H] bf16`.
        until: `clock_of(call)()` at which to stop: what is found does not depend on what else the machine does.
        tried: how many hypotheses were.
        near: those that explain a part, and how far off they leave the output, from 0 to 1.
        close: those that explain all but roundings of the part that was looked at.
        partly: those that predict most of its wrong elements in every bit.
        tables: whether a solved table predicts all.
        progress: called with the name of each named defect and how many there are.
    """

    pipeline: Pipeline
    got: Tensor
    want: Tensor
    until: float
    tried: int = 0
    near: list[tuple[float, Hypothesis]] = field(default_factory=list)
    close: list[Hypothesis] = field(default_factory=list)
    partly: list[Hypothesis] = field(default_factory=list)
    tables: bool = False
    progress: Callable[[str, int], None] | None = None

    def __post_init__(self) -> None:
        self.clock = clock_of(self.pipeline.call)
        self.wrong = differing(self.got, self.want)
        self.local = local_of(self.pipeline)
        self.tokens = self._probe_tokens()
        part = self.pipeline if self.whole else replace(self.pipeline, call=self._part_of(self.pipeline.call))
        if not self.whole and not part.gives(self.want[self.tokens]):
            self.tokens, part = torch.arange(len(self.got)), self.pipeline  # rows show where they lie
        self.part = part
        self.part_got, self.part_want = self.got[self.tokens], self.want[self.tokens]
        self.part_right = ~self.wrong[self.tokens]
        self.base = ulps_apart(self.part_want, self.part_got), angle_between(self.part_want, self.part_got)
        self.base_of_all = ulps_apart(self.want, self.got), angle_between(self.want, self.got)

    def _part_of(self, call: MoeCall) -> MoeCall:
        return reduce_call(call, self.tokens, neighbours=True) if is_heavy(call) else call.select(self.tokens)

    @cached_property
    def rows(self) -> SlotRows:
        """Of the whole call; without the mistake that is known, where that computes the output as a whole."""
        return SlotRows.of(replace(self.pipeline, run_call=None))

    @property
    def whole(self) -> bool:
        return len(self.tokens) == len(self.got)

    def out_of_time(self) -> bool:
        return self.clock() > self.until

    @contextmanager
    def share(self, part: float) -> Iterator[None]:
        """Inside, only this part of the time that is left may be taken."""
        now = self.clock()
        with self._stopping_at(min(self.until, now + part * (self.until - now))):
            yield

    @contextmanager
    def extra(self, seconds: float) -> Iterator[None]:
        """Inside, so many seconds from now may be taken."""
        with self._stopping_at(max(self.until, self.clock() + seconds)):
            yield

    @contextmanager
    def _stopping_at(self, until: float) -> Iterator[None]:
        before, self.until = self.until, until
        try:
            yield
        finally:
            self.until = before

    def _probe_tokens(self) -> Tensor:
        """The wrong token that tells most: many wrong elements, few slots, no NaN."""
        amount = self.wrong.sum(1)
        finite = (self.got.isfinite() & self.want.isfinite()).all(1)
        score = amount.to(torch.float64) * torch.where(finite, 1.0, 0.25) / (2 + (self.local >= 0).sum(1))
        return score.argmax().view(1).cpu()

    def _predictions(
        self, hypotheses: Iterable[Hypothesis]
    ) -> Iterator[tuple[Hypothesis, Tensor | None, bool, bool]]:
        """Each hypothesis' output, whether it fits in some slots, and of the whole call (True) or of its part."""
        known, part = self.pipeline.run_call is None, not self.whole
        for (cheap, across), some in groupby(
            hypotheses, lambda h: (known and h.cheap, part and h.across_tokens)
        ):
            if cheap or across:
                yield from ((h, self._by_itself(h, cheap), False, cheap) for h in some)
            else:
                for h, rows, partly in each(self.part, some, self._in_some_slots):
                    yield h, rows, bool(partly), self.whole

    def _by_itself(self, h: Hypothesis, cheap: bool) -> Tensor | None:
        """Its output, of the rows of all slots; or the part's, which takes numbers of tokens beyond it."""
        try:
            if not cheap:
                changed = h.change(self.pipeline)
                return replace(changed, call=changed.call.select(self.tokens)).run()
            if h.of_output is not None:
                return h.of_output(self.want)
            if h.of_rows is not None:
                return h.of_rows(self.rows).output(self.pipeline)
            return self.rows.output(h.change(self.pipeline))
        except FAILURES:
            return None

    def _nearness(self, output: Tensor, *, of_all: bool) -> float:
        """How far off an output leaves the kernel's, as a share of how far off the right one is; by ulps or by angle.

        The angle tells a change that another one, such as a factor, hides from the ulps.
        """
        got, (ulps, angle) = (self.got, self.base_of_all) if of_all else (self.part_got, self.base)
        return min(ulps_apart(output, got) / max(ulps, 1e-9), angle_between(output, got) / max(angle, 1e-9))

    def run(self, hypotheses: Iterable[Hypothesis], *, enough: int = 1 << 30) -> list[Match]:
        """Those that predict every wrong bit; the others that come nearer to the output are kept in `near`."""
        found, variants, family = list[Match](), list[Hypothesis](), ""
        for hypothesis, output, partly, of_all in self._predictions(hypotheses):
            if self.out_of_time() or len(found) >= enough:
                break
            self.tried += 1
            if family != (family := hypothesis.family):
                trying("two mistakes at once" if family == "two" else family)
            if hypothesis.name and self.progress is not None:
                self.progress(hypothesis.name, NUMBER_OF_NAMES)
            got, right = (self.got, ~self.wrong) if of_all else (self.part_got, self.part_right)
            if output is None or output.shape != got.shape:
                continue
            equal = ~differing(output, got)
            fits = bool((equal | right).all())
            if (fits and (matches := self.confirm(hypothesis))) or (
                (fits or partly) and not hypothesis.cheap and (matches := self._in_slots(hypothesis))
            ):
                found, self.tables = [*found, *matches], self.tables or hypothesis.table
            elif fits and not self.whole and not hypothesis.cheap:  # roundings may show in other tokens only
                self.close.append(hypothesis)
                variants += hypothesis.variants
            elif not fits:
                distance = self._nearness(output, of_all=of_all)
                if distance < 0.8 and hypothesis.family != "two":
                    self.near.append((distance, hypothesis))
                    variants += hypothesis.variants
                if not hypothesis.name and share(equal, ~right) >= _MOSTLY - 0.1:
                    self.partly.append(hypothesis)
                if distance < _CLOSE and self._up_to_roundings(output, of_all=of_all):
                    self.close.append(hypothesis)
        return found or (self.run(variants, enough=enough) if variants else found)

    @cached_property
    def few(self) -> bool:
        """Whether so little is wrong that some small part of a family always predicts it."""
        return surprise(self.got, self.want) < FEWEST_BITS

    @cached_property
    def _noise(self) -> Tensor:
        """Standard deviations of the roundings of rows and sum to bf16, in two kernels, `[M, H]`."""
        parts = (last_place(self.rows.y) * self.rows.weights[..., None]).square().sum(1)
        return ((parts + last_place(self.want).square()) / 6).sqrt() + 1e-300

    def _up_to_roundings(self, output: Tensor, *, of_all: bool) -> bool:
        """Whether an output is the kernel's but for roundings, which the right one is far from."""
        noise, parts = self._noise, [output, self.got, self.want]
        if not of_all:
            noise, parts[1:] = noise[self.tokens], [t[self.tokens] for t in parts[1:]]
        predicted, got, want = (fp32.widen(t.contiguous()).double() for t in parts)
        size, right = (t.square().mean(1, keepdim=True) for t in (predicted, want))
        larger = (size - _LARGER**2 * right).clamp(min=0) / 3 * 2.0**-16  # and so rounded more coarsely
        off, before = (predicted - got) / (noise.square() + larger).sqrt(), (want - got) / noise
        if not bool(off.isfinite().all() & before.isfinite().all()):
            return False
        rest, error = (float(t.square().mean().sqrt()) for t in (off, before))
        return (
            rest <= _A_ROUNDING and error >= _FAR_OFF * max(rest, 1.0) and float(off.abs().max()) <= _LARGEST
        )

    def _outputs(self, hypotheses: Iterable[Hypothesis]) -> Iterator[tuple[Hypothesis, Tensor]]:
        """Each of other words with its output of the whole call, while there is time."""
        for hypothesis in {h.words: h for h in hypotheses}.values():
            output = hypothesis.run(self.pipeline)
            if output is not None and not self.out_of_time():
                yield hypothesis, output

    def almost(self, *, least: float = 0.0) -> list[Match]:
        """Those that predict the whole output up to roundings, those with the fewest first; `least` in every bit."""
        found = []
        for hypothesis, output in self._outputs(self.close):
            if self._up_to_roundings(output, of_all=True):
                part = float((~differing(output, self.got))[self.wrong].double().mean())
                said = roughly(hypothesis, "up to roundings", part, self.rows)
                found.append((part, Match(said, False, hypothesis)))
        found.sort(key=lambda pair: -pair[0])
        return [match for part, match in found if part >= max(0.9 * found[0][0], least)]

    def nearly(self) -> list[Match]:
        """The one that predicts most bits, a change of which some detail is another; none without.

        Nor where one of another stage comes near, or NaN, which many mistakes give, is all that is wrong.
        """
        if bool(self.got[self.wrong].isnan().all()):
            return []
        found: list[tuple[float, Hypothesis]] = []
        for hypothesis, output in self._outputs(self.partly):
            equal = ~differing(output, self.got)
            part = share(equal, self.wrong)
            if part >= _MOSTLY and share(equal, ~self.wrong) >= _SPARED:
                found.append((part, hypothesis))
        part, best = max(found, key=lambda pair: pair[0], default=(0.0, None))
        if best is None or any(
            1 - other < 2 * (1 - part) for other, h in found if not set(h.stages) & set(best.stages)
        ):
            return []
        return [Match(roughly(best, "or nearly so", part), False, best)]

    def confirm(self, hypothesis: Hypothesis) -> list[Match]:
        """On the whole call, everywhere or in a part that has words, or in each of several that it may be."""
        output = hypothesis.run(self.pipeline)
        if output is None:
            return []
        equal = ~differing(output, self.got)
        if bool(equal.all()):
            return [Match(hypothesis, True)]
        if not bool((equal | ~self.wrong).all()) or self.few:
            return []
        moved = differing(output, self.want)
        limited = self._limited(hypothesis, applied=moved & equal, spared=moved & ~equal)
        return [Match(one, True) for one in limited]

    def _limited(self, hypothesis: Hypothesis, applied: Tensor, spared: Tensor) -> list[Hypothesis]:
        """A hypothesis that holds in some tokens or some columns only, the likeliest first."""
        call = self.pipeline.call
        tokens, others = applied.any(1), spared.any(1)
        if not bool((tokens & others).any()):
            given = call, self.local, tokens, tokens | others
            found = list(in_slots_alone(hypothesis, kinds_of_tokens(*given), self.pipeline, self.got))
            found += [in_rows(hypothesis, *named) for named in islice(named_tokens(*given), _PLACES)]
            return found
        columns, rest = applied.any(0), spared.any(0)
        if not bool((columns & rest).any()):
            named = named_columns(columns, columns | rest)
            zeros = not bool(self.got[applied].any())  # which many things give
            told = not zeros or hypothesis.words.endswith("everything is zero")
            if told and named and hypothesis.stages[0] in ("fc2", "finalize", "slots"):
                limited = in_columns(hypothesis, *named, self.pipeline.call)
                if zeros and not is_spread(call, self.got, self.want, self.wrong, self.tokens.tolist()):
                    limited = replace(limited, stages=())  # columns of the activation may be zero, too
                return [limited]
        return []

    def _in_some_slots(self, y: Tensor) -> list[bool]:
        """Of each of some rows, `[P, k, H]`, whether the part that is looked at has them in some of its slots."""
        if y.shape[1] == 1 or self.few:
            return [False] * len(y)
        rows, count = self.rows, len(y)
        given = (t[self.tokens].expand(count, *t.shape[1:]) for t in (rows.y, rows.local, rows.weights))
        want, got = (t.expand(count, -1) for t in (self.part_want, self.part_got))
        concerned, fits = slots_concerned(self.part, SlotRows(rows.pipeline, *given), y, want, got)
        found: list[bool] = (fits & (concerned == 0).any(1)).tolist()
        return found

    def _in_slots(self, hypothesis: Hypothesis) -> list[Match]:
        """The hypothesis in the kinds of slots for which it predicts every bit of the whole call."""
        try:
            changed = hypothesis.change(self.pipeline)
            if self.few or changed.run_call is not None or changed.after is not None:
                return []
            y = SlotRows.of(changed).y
            concerned, fits = slots_concerned(self.pipeline, self.rows, y, self.want, self.got)
        except FAILURES:
            return []
        if not bool(fits.all()) or not bool((concerned == 0).any()):
            return []
        kinds = islice(kinds_concerned(self.pipeline.call, self.local, concerned), _PLACES)
        return [Match(in_slots(hypothesis, *kind), True) for kind in kinds]

    def leaves_another(self, output: Tensor) -> bool:
        """Whether something else is wrong besides what gives this output.

        Not where this one is wrong only where the kernel's is right: then it concerns less than was thought.
        """
        rest = differing(output, self.got)
        return bool((rest & self.wrong).any()) and surprise(self.got, output) >= FEWEST_BITS
