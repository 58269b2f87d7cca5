"""From one output that differs to a finding: evidence first, then hypotheses in the order that it suggests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial, wraps
from itertools import chain

from torch import Tensor

from mxfp4ref.conformance.families import FAMILIES
from mxfp4ref.conformance.families.batches import one_thread
from mxfp4ref.conformance.families.blank import (
    constant_alone,
    numbers_alone,
    of_blank,
    of_constant,
    wherever_from,
)
from mxfp4ref.conformance.families.by_place import hypotheses_by_place
from mxfp4ref.conformance.families.evidence import gather, look_closer
from mxfp4ref.conformance.families.hypotheses.code_parts import code_part_hypotheses, small_weight_hypotheses
from mxfp4ref.conformance.families.hypotheses.columns_of_tiles import tile_column_hypotheses
from mxfp4ref.conformance.families.hypotheses.decodings import decoding_hypotheses, table_hypotheses
from mxfp4ref.conformance.families.hypotheses.fragment_maps import fragment_map_hypotheses, swizzled_weights
from mxfp4ref.conformance.families.hypotheses.fragments import fragment_hypotheses
from mxfp4ref.conformance.families.hypotheses.lane_scales import lane_scale_hypotheses
from mxfp4ref.conformance.families.hypotheses.memory_readings import matrix_readings
from mxfp4ref.conformance.families.hypotheses.more_activations import more_activations
from mxfp4ref.conformance.families.hypotheses.orders_of_k import order_hypotheses, repeat_hypotheses
from mxfp4ref.conformance.families.hypotheses.outputs import (
    factor_hypotheses,
    inner_hypotheses,
    output_hypotheses,
)
from mxfp4ref.conformance.families.hypotheses.overlapping_blocks import overlapping_block_hypotheses
from mxfp4ref.conformance.families.hypotheses.permuted import permuted_hypotheses
from mxfp4ref.conformance.families.hypotheses.preparations import preparation_hypotheses
from mxfp4ref.conformance.families.hypotheses.prepared_weights import prepared_weight_hypotheses
from mxfp4ref.conformance.families.hypotheses.promotions import promotion_hypotheses
from mxfp4ref.conformance.families.hypotheses.quantised import quantised_hypotheses
from mxfp4ref.conformance.families.hypotheses.regions import (
    half_hypotheses,
    k_hypotheses,
    row_hypotheses,
    rows_at,
)
from mxfp4ref.conformance.families.hypotheses.roundings import rounding_hypotheses
from mxfp4ref.conformance.families.hypotheses.tensors import layout_hypotheses
from mxfp4ref.conformance.families.hypothesis import Finding, Hypothesis, Pipeline
from mxfp4ref.conformance.families.named import named_hypotheses
from mxfp4ref.conformance.families.search import SURELY, Match, Search
from mxfp4ref.conformance.families.solved.code_tables import code_table_hypotheses
from mxfp4ref.conformance.families.solved.lost_rows import none_right
from mxfp4ref.conformance.families.solved.mixed_rows import mixed_row_hypotheses
from mxfp4ref.conformance.families.solved.skipped_slots import skipped_hypotheses
from mxfp4ref.conformance.families.solved.solved_constants import constant_hypotheses
from mxfp4ref.conformance.families.solved.taken_rows import taken_hypotheses
from mxfp4ref.conformance.families.solved.uniform_factors import clamps, uniform_factors
from mxfp4ref.conformance.families.solved.weight_rules import weight_rules
from mxfp4ref.conformance.families.solved.whose import whose_hypotheses
from mxfp4ref.conformance.families.soon import for_a_share, is_gross, is_small, soon
from mxfp4ref.conformance.families.telling import told
from mxfp4ref.conformance.families.twos import SIMPLE, either_of_two, nearest_of_two, second_of_two
from mxfp4ref.conformance.findings.finding import Evidence
from mxfp4ref.conformance.findings.guarded import guarded, guarded_each
from mxfp4ref.conformance.findings.reduction import clock_of, is_heavy
from mxfp4ref.model.call import MoeCall

__all__ = ["Result", "investigate", "nameless"]

_FOR_ALMOST = 3.0  # seconds
_FOR_ORDERS = 0.25  # of the time that is left, before the long lists
_WEIGHTS = FAMILIES["routing weights"]
_WHOSE = ("another expert's", "ids", "ranks")  # families that may have the rule of a table of experts
_Generator = Callable[[MoeCall], Iterable[Hypothesis]]
_PLAIN: tuple[_Generator, ...] = (
    *SIMPLE,
    permuted_hypotheses,
    more_activations,
    rounding_hypotheses,
    quantised_hypotheses,
    output_hypotheses,
)


@dataclass(frozen=True)
class Result:
    """What is known of one output that differs.

    Attributes:
        matches: the hypotheses that predict it, the simplest first.
        evidence: what was solved, the strongest first.
        finding: what to tell.
        tried: how many hypotheses.
        complete: whether there was time for all of them.
    """

    matches: tuple[Match, ...]
    evidence: tuple[Evidence, ...]
    finding: Finding
    tried: int
    complete: bool


def investigate(
    pipeline: Pipeline,
    got: Tensor,
    want: Tensor,
    *,
    seconds: float,
    first: Iterable[Hypothesis] = (),
    thorough: bool = True,
    known: Evidence | None = None,
    progress: Callable[[str, int], None] | None = None,
    outside: Tensor | None = None,
) -> Result:
    """What is wrong with an output.

    Args:
        pipeline: the right one; its experts in logical layout, not strict.
        got, want: `[M, H] bf16`, which differ.
        seconds: that may be taken, roughly.
        first: hypotheses to try before all others; if any fits no other is tried.
        thorough: whether also what takes long is: parts of weights, kinds of slots, two changes at once.
        known: what is known already, such as of an intermediate that the kernel returned.
        progress: called with the name of each named defect that is tried, and how many there are.
        outside: `[M, H] bool`, in mode bounded where it leaves its bounds: rows without any are no evidence.
    """
    heavy = is_heavy(pipeline.call)
    with nullcontext() if heavy else one_thread():
        until = clock_of(pipeline.call)() + seconds
        search = Search(pipeline, got, want, until, progress=progress)
        evidence: list[Evidence] = []
        found = search.run(first)
        wrong = search.wrong if outside is None else search.wrong & outside.any(1, keepdim=True)
        if not found:
            evidence = [known] if known else gather(pipeline, got, want, wrong, outside)
            zero = next((e for e in evidence if e.zeros), None)
            if zero is not None and none_right(want, search.wrong):
                # Much gives zeros; where sums cancel but for their roundings, those that round otherwise do.
                weights = (h for h in named_hypotheses(pipeline.call) if h.name in _WEIGHTS.members)
                orders = (order_hypotheses, rounding_hypotheses)
                every = chain(weights, *(one(pipeline.call) for one in orders))
                found = [m for m in search.run(every if zero.rounding else ()) if m.exact]
                finding = of_blank(zero, sorted(found, key=lambda m: m.hypothesis.cost))
                return Result(tuple(found), tuple(evidence), finding, search.tried, not search.out_of_time())
            closer = False
            for tier in _tiers(pipeline.call, search, evidence):
                if heavy:  # the named ones have been tried, and what needs no GEMM is tried first
                    tier = iter(sorted(filter(_by_token, tier), key=lambda h: not h.cheap))
                found = search.run(tier, enough=3 if heavy else 1 << 30)
                if found:
                    break
                if thorough and not closer and not known:
                    closer, evidence[:] = True, look_closer(pipeline, got, wrong, evidence)
                    if (
                        not heavy
                        and not _certain(evidence)
                        and (found := guarded(soon, search, _stages_left(evidence)) or [])
                    ):
                        break
                if search.out_of_time():
                    break
        if not found and not heavy and thorough and not known:
            with search.extra(_FOR_ALMOST):
                found = guarded(nearest_of_two, search, partial(second_of_two, pipeline.call)) or []
        if not found and not heavy:
            with search.extra(_FOR_ALMOST):
                found = search.almost(least=SURELY)
        if not found and thorough and not heavy and not search.few and known is None:
            found = [] if _certain(evidence) else guarded(_thorough, search, evidence) or []
        if not found and not search.few:
            with search.extra(_FOR_ALMOST):
                found = search.almost() or guarded(search.nearly) or []
    # Much gives zeros, or NaN, but not in these rows only.
    blank = next((e for e in evidence if e.zeros or (e.lost and none_right(want, search.wrong))), None)
    if blank is not None and blank.zeros:
        likely = ["dropped slots", "ranks", "named", *["order of sums", "rounding"] * blank.rounding]
        found = [m for m in found if m.hypothesis.family in likely]
    # Then what is said of NaN is more likely than what makes one here.
    of_nan = blank is not None and blank.lost
    matches = sorted(
        found,
        key=lambda m: (not m.exact, of_nan and "nan" not in m.hypothesis.words.lower(), m.hypothesis.cost),
    )
    if blank is None and any(m.exact for m in matches) and constant_alone(got, want):
        matches = [m for m in matches if m.exact]
        if (same := of_constant(pipeline, got, want, matches)) is not None:
            matches = [replace(m, exact=False) for m in matches]
            return Result(tuple(matches), tuple(evidence), same, search.tried, not search.out_of_time())
        matches = wherever_from(matches)
    if blank is None:
        finding = told(matches, evidence, [pipeline.call])
    else:
        finding = of_blank(blank, matches, numbers=blank.lost and numbers_alone(pipeline.call))
    return Result(tuple(matches), tuple(evidence), finding, search.tried, not search.out_of_time())


def _by_token(hypothesis: Hypothesis) -> bool:
    """Whether a few tokens of a call show it: it does not depend on where a row lies among others."""
    h = hypothesis
    kinds = ("dropped slots", "rows of an expert", "permuted slots")
    return not (h.name or h.family in kinds or h.across_tokens)


def _tiers(call: MoeCall, search: Search, evidence: list[Evidence]) -> Iterator[Iterator[Hypothesis]]:
    """Groups of hypotheses; all of one are tried before the next."""
    only = _stages_left(evidence)

    def wanted(hypotheses: Iterable[Hypothesis], slow: bool | None = None) -> Iterator[Hypothesis]:
        for h in hypotheses:
            if (not only or h.name or only & set(h.stages)) and (slow is None or h.slow == slow):
                yield h

    def of(*generators: _Generator) -> Iterator[Hypothesis]:
        return chain.from_iterable(guarded_each(generator, call) for generator in generators)

    factor = [h for f in uniform_factors(search.got, search.want, search.wrong) for h in factor_hypotheses(f)]
    limit = clamps(search.got, search.want, search.wrong)
    known = of(named_hypotheses)  # before all others, for a quick diagnosis too
    small = is_small(search)
    gross = cache(lambda: not is_heavy(call) and is_gross(search))  # asked only when their turn comes

    def unless_gross(generator: _Generator) -> _Generator:
        return wraps(generator)(lambda call: () if gross() else generator(call))

    plain = of(*(unless_gross(one) if one is rounding_hypotheses else one for one in _PLAIN))
    plain = plain if small else chain(plain, of(code_part_hypotheses))
    by_place = guarded_each(hypotheses_by_place, call, search.wrong)
    given = search.rows, search.got, search.wrong
    by_rows = (guarded_each(one, search.pipeline, *given) for one in (taken_hypotheses, whose_hypotheses))
    solved = () if is_heavy(call) else chain.from_iterable(by_rows)
    of_sum = chain(guarded_each(weight_rules, *given), guarded_each(skipped_hypotheses, *given))
    plain = (h for h in wanted(plain, slow=False) if not search.tables or h.family in _WHOSE)
    yield chain(limit, wanted(factor), solved, of_sum, wanted(known, slow=False), by_place, plain)
    only = _stages_left(evidence)  # which may be more by now
    if not is_heavy(call):
        yield wanted(guarded_each(constant_hypotheses, search.pipeline, *given[1:]))
        if not small and (not only or only & {"fc1", "fc2"}):
            yield wanted(guarded_each(code_table_hypotheses, search.pipeline, *given[1:]))
    slow = chain(wanted(of(unless_gross(order_hypotheses))), wanted(of(named_hypotheses), slow=True))
    small |= any(e.rounding for e in evidence)
    if small:
        yield slow
    elif not is_heavy(call):  # roundings of a coarse format look like more than that
        yield for_a_share(search, slow, _FOR_ORDERS)
    yield wanted(  # what explains most per second, by the held-out kernels
        of(
            repeat_hypotheses,
            *([] if is_heavy(call) else [promotion_hypotheses, lane_scale_hypotheses]),
            overlapping_block_hypotheses,
            inner_hypotheses,
            tile_column_hypotheses,
            half_hypotheses,
            matrix_readings,
            prepared_weight_hypotheses,
            preparation_hypotheses,
            layout_hypotheses,
            k_hypotheses,
        )
    )
    if not small and not is_heavy(call):
        yield wanted(guarded_each(mixed_row_hypotheses, search.pipeline, *given))
        yield wanted(fragment_map_hypotheses(call, search.wrong))
    yield wanted(
        of(
            fragment_hypotheses,
            swizzled_weights,
            small_weight_hypotheses,
            decoding_hypotheses,
            table_hypotheses,
        )
    )
    if not small:
        yield slow
    if only and not _certain(evidence):  # should the evidence mislead, and as the first of two changes
        rest = guarded_each(either_of_two, call)
        yield (h for h in rest if not h.name and not only & set(h.stages))


def nameless(call: MoeCall, wrong: Tensor) -> Iterator[Hypothesis]:
    """Those that are tried at first, without a name: what one case shows, they may predict as well as one with it."""
    generators = (generator(call) for generator in _PLAIN)
    return (h for h in chain(hypotheses_by_place(call, wrong), *generators) if not h.slow)


def _thorough(search: Search, evidence: list[Evidence]) -> list[Match]:
    call, only = search.pipeline.call, _stages_left(evidence)
    inner = next((e.inner for e in evidence if e.inner is not None), None)
    passes: list[Callable[[], list[Match]]] = [
        *([lambda: search.run(rows_at(call, *inner))] if inner and call.experts.gated else []),
        lambda: search.run(left(row_hypotheses(call)), enough=12),
        lambda: nearest_of_two(search, partial(either_of_two, call)),
    ]

    def left(hypotheses: Iterable[Hypothesis]) -> Iterator[Hypothesis]:
        return (h for h in hypotheses if not only or only & set(h.stages))

    for number, one in enumerate(passes):
        with search.share(0.5 if number < len(passes) - 1 else 1.0):
            if found := one():
                return found
    return []


def _certain(evidence: list[Evidence]) -> bool:
    """Whether what happened is known but for a name: as where the weights and experts of the sum were solved."""
    return any(e.final for e in evidence)


def _stages_left(evidence: list[Evidence]) -> set[str]:
    """The stages that the evidence leaves; none where it leaves all."""
    certain = {stage for e in evidence if e.strength >= 3 for stage in e.stages}
    if certain:
        return certain
    weak = next((e for e in evidence if e.strength == 2 and e.stages), None)
    if weak is None:
        return set()
    return set(weak.stages) | ({"slots"} if "fc2" in weak.stages else set())


def prepared(call: MoeCall) -> Pipeline:
    """A call as hypotheses take it."""
    from mxfp4ref.defects.definition import logical

    return Pipeline(replace(logical(call), strict=False))
