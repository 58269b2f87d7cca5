"""What an output that differs proves by itself: solved, not searched, and as far as bf16 shows.

The weighted sum is linear in the experts' outputs, and GEMM2 in the activation. Where the equations are more than the
unknowns, and have a solution within the roundings, the solution is what the kernel must have used.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from mxfp4ref.conformance.comparison import differing, ulp_distance
from mxfp4ref.conformance.families.another_order import unless_in_another_order
from mxfp4ref.conformance.families.distances import last_place
from mxfp4ref.conformance.families.hypotheses.output_memory import rows_of_the_input
from mxfp4ref.conformance.families.hypothesis import Pipeline, SlotRows, local_of, slot_outputs
from mxfp4ref.conformance.families.places import named_columns, residue_in_words
from mxfp4ref.conformance.families.sampled import Sample, samples
from mxfp4ref.conformance.families.solved.added_rows import added_rows
from mxfp4ref.conformance.families.solved.column_maps import column_map
from mxfp4ref.conformance.families.solved.error_space import Space
from mxfp4ref.conformance.families.solved.expert_sums import other_sums
from mxfp4ref.conformance.families.solved.formula import Formula, fitted
from mxfp4ref.conformance.families.solved.lost_rows import lost_rows
from mxfp4ref.conformance.families.solved.mixed_up import mixed_up
from mxfp4ref.conformance.families.solved.moved_columns import moved_columns
from mxfp4ref.conformance.families.solved.output_function import function_of_output
from mxfp4ref.conformance.families.solved.output_rows import another_stride, rows_of_others
from mxfp4ref.conformance.families.solved.pursuit import biases_of
from mxfp4ref.conformance.families.solved.second_gemm import second_gemm
from mxfp4ref.conformance.families.solved.skipped_slots import of_skipped_slots
from mxfp4ref.conformance.families.solved.solved_constants import solved_constant
from mxfp4ref.conformance.families.solved.wrong_experts import wrong_experts
from mxfp4ref.conformance.families.solved.zero_rows import zero_rows
from mxfp4ref.conformance.findings.finding import Evidence, counted
from mxfp4ref.conformance.findings.guarded import guarded, guarded_each
from mxfp4ref.conformance.findings.reach import is_spread, reached
from mxfp4ref.conformance.findings.reduction import is_heavy, local_experts
from mxfp4ref.model.call import MoeCall
from mxfp4ref.sm90 import fp32
from mxfp4ref.sm90.fp32 import bf16_to_fp64

__all__ = ["gather", "look_closer"]

_TOKENS = 6  # that are looked at
_GROSS = 32  # ulp
_BY_CHANCE = 1e-6  # and below: not so
_BINADES = 40  # that no sum of products spans
_LEAST = 2.0**-125  # twice the least float32 and bf16 number that is not subnormal
_NORMAL, _HALF = 2.0**-126, 2.0**-133 * 0.501  # the least normal number; half a unit of subnormal ones
_FEWEST, _ALMOST_ALL = 4, 0.9  # elements that are subnormal, and the part of them that has to be explained
_SAME = (
    "they hold the same numbers in every wrong row, which depend on no input: overwritten, or not written; "
)
_PARTLY = 0.05  # of the errors, from which a function of up and gate is not excluded


def gather(
    pipeline: Pipeline, got: Tensor, want: Tensor, wrong: Tensor, outside: Tensor | None = None
) -> list[Evidence]:
    """What takes no more than a forward or two, the strongest first.

    Args:
        pipeline: the right one.
        got, want: `[M, H] bf16`.
        wrong: `[M, H] bool`.
        outside: `[M, H] bool`, in mode bounded where it leaves its bounds: of single elements and columns all others
            are right.
    """
    found: list[Evidence] = []
    local = local_of(pipeline)
    tokens = _telling(got, want, wrong, local)
    if (tiny := _near_underflow(got, want, wrong)) is not None:
        return [_kept_subnormals(pipeline, got, wrong) or tiny]
    if (kept := guarded(rows_of_the_input, pipeline.call, got, wrong)) is not None:
        return [kept]
    if (moved := guarded(moved_columns, got, want, wrong)) is not None:
        return [moved]
    if (function := guarded(function_of_output, got, want)) is not None:
        return [function]
    found += guarded_each(_rows, pipeline, got, want, wrong)
    if not found and (skipped := guarded(_skipped, pipeline, got, wrong, local)) is not None:
        return [skipped]
    if not found and (added := guarded(added_rows, pipeline.call, got, want, wrong)) is not None:
        return [added]
    alone = wrong if outside is None else wrong & outside
    single = list(guarded_each(_single, pipeline.call, got, want, alone))
    found += single or guarded_each(_columns, pipeline, got, want, alone, tokens)
    if not found:
        solved = list(guarded_each(other_sums, pipeline, got, wrong, local, tokens))
        solved = solved or list(guarded_each(second_gemm, pipeline, got, wrong, local, tokens))
        found = unless_in_another_order(pipeline.call, got, wrong, solved)
    return sorted(found, key=lambda e: -e.strength)


def _skipped(pipeline: Pipeline, got: Tensor, wrong: Tensor, local: Tensor) -> Evidence | None:
    if not bool((local < 0).any()) or is_heavy(pipeline.call):
        return None
    return of_skipped_slots(SlotRows.of(pipeline), got, wrong)


def look_closer(pipeline: Pipeline, got: Tensor, wrong: Tensor, found: list[Evidence]) -> list[Evidence]:
    """With what takes seconds, where the stage is not known well; arguments as of `gather`, and what it found."""
    staged = any(e.stages for e in found)
    if any(e.zeros or e.final or e.strength >= (3 if e.stages else 2) for e in found):
        return found
    some = samples(pipeline, got, wrong, local_of(pipeline))
    solved = unless_in_another_order(
        pipeline.call, got, wrong, _solved(pipeline, got, some, wrong, staged=staged)
    )
    constant = None if any(e.strength > 2 for e in solved) else guarded(solved_constant, pipeline.call, some)
    return [constant, *found] if constant is not None else [*solved, *found]


def _solved(
    pipeline: Pipeline, got: Tensor, some: list[Sample], wrong: Tensor, *, staged: bool
) -> list[Evidence]:
    """What the errors of many tokens say; `staged` if a stage is known."""
    found = guarded(mixed_up, pipeline, got, wrong, some) or guarded(column_map, pipeline.call, some)
    if found is not None:
        return [found]
    return list(guarded_each(_of_space, pipeline.call, some, staged=staged))


def _of_space(call: MoeCall, some: list[Sample], *, staged: bool) -> Iterator[Evidence]:
    """Where the errors lie, if no table was solved."""
    space = Space.of(some)
    formula = fitted(some, call.experts.swiglu_limit) if space is not None and space.inside else None
    if formula is not None and formula.proved:
        yield _other_function(formula)
    elif space is not None and not staged:
        biased = call.experts.fc1_biases is not None
        where = space.placed(biased=biased, function=formula is None or formula.explained > _PARTLY)
        only = guarded(wrong_experts, call, some)
        words = f"only slots of {only} are off, as far as the errors' sizes say"
        if where:
            yield replace(where, sentence=f"{where.sentence}; {words}") if only else where
        elif only:
            yield Evidence((), words, 1)


def _other_function(formula: Formula) -> Evidence:
    own = ", which differs by expert," if formula.by_expert else ""
    values = f"; it gives {formula.values}" if formula.values else ""
    values += f"; it seems to be the right one but where {formula.where}" if formula.where else ""
    return Evidence.of_kind(
        ("activation", "fc1"),
        f"the activation that GEMM2 got is another function{own} of the right GEMM1's output",
        f"the formula, its parameters, or a factor on GEMM1's result{values}",
        2,
    )


def _telling(got: Tensor, want: Tensor, wrong: Tensor, local: Tensor) -> list[int]:
    """Wrong tokens whose numbers can be calculated with, those with few slots first."""
    usable = wrong.any(1) & (got.isfinite() & want.isfinite()).all(1) & (local >= 0).any(1)
    order = ((local >= 0).sum(1) * 4096 - wrong.sum(1).clamp(max=4095)).argsort(stable=True)
    return [t for t in order.tolist() if usable[t]][:_TOKENS]


def _rows(pipeline: Pipeline, got: Tensor, want: Tensor, wrong: Tensor) -> Iterator[Evidence]:
    """Whole rows that are zero, no numbers, or another token's."""
    rows = wrong.any(1)
    if zero := list(zero_rows(pipeline, got, want, rows)):
        yield from zero
        return
    lost = ~got.isfinite() & want.isfinite()
    others = wrong & ~lost.any(1, keepdim=True)
    if bool(lost.any()) and (not bool(others.any()) or _near_underflow(got, want, others) is not None):
        yield from lost_rows(pipeline.call, got, want, lost)
        return
    if (moved := rows_of_others(got, want, rows) or another_stride(got, want)) is not None:
        yield moved


def _near_underflow(got: Tensor, want: Tensor, wrong: Tensor) -> Evidence | None:
    """Differences that are as small as the least numbers, and tell nothing of where they come from."""
    far = (fp32.widen(got[wrong]).double() - fp32.widen(want[wrong]).double()).abs()
    if not bool((far <= _LEAST).all()):  # nor where one is no number
        return None
    return Evidence(
        (),
        f"{counted(len(far), 'element')} {'differs' if len(far) == 1 else 'differ'} by no more than 2^-125, where "
        "numbers underflow: subnormal ones are kept or flushed at another place, or something is rounded there",
        2,
    )


def _kept_subnormals(pipeline: Pipeline, got: Tensor, wrong: Tensor) -> Evidence | None:
    """Subnormal numbers, which the kernel's weighted sum flushes, where they are what a sum gives that keeps them."""
    size = bf16_to_fp64(got).abs()
    kept = wrong & (size > 0) & (size < _NORMAL)
    if int(kept.sum()) < _FEWEST or is_heavy(pipeline.call):
        return None
    rows = SlotRows.of(pipeline)
    terms = bf16_to_fp64(rows.y.contiguous()) + biases_of(rows, rows.local.clamp(min=0))
    weights = torch.where(rows.local >= 0, rows.weights, 0.0).double()
    off = (bf16_to_fp64(got) - (terms * weights[..., None]).sum(1)).abs()[kept]
    if not float((off <= _HALF).float().mean()) > _ALMOST_ALL:
        return None
    return Evidence(
        ("finalize",),
        f"{int(kept.sum()):,} of {counted(int(wrong.sum()), 'element')} that differ are subnormal, as where the "
        "weighted sum keeps subnormal numbers: the SM90 kernel flushes them to zero (ftz)",
        3,
    )


def _single(call: MoeCall, got: Tensor, want: Tensor, wrong: Tensor) -> list[Evidence]:
    """One element that is far off, where its row and other tokens show that nothing that it depends on is."""
    if int(wrong.sum()) != 1 or float(ulp_distance(got[wrong], want[wrong]).max()) < _GROSS:
        return []
    token, column = wrong.nonzero()[0].tolist()
    local = local_experts(call)
    experts, others = local[token][local[token] >= 0], torch.cat((local[:token], local[token + 1 :]))
    if not bool(torch.isin(experts, others).all()) or not is_spread(call, got, want, wrong, [token]):
        return []
    return [
        Evidence(
            (),
            f"a single element differs, [{token}, {column}]: damaged, or written by something else; its row and the "
            "tokens that share its experts are right",
            2,
        )
    ]


def _columns(
    pipeline: Pipeline, got: Tensor, want: Tensor, wrong: Tensor, tokens: list[int]
) -> Iterator[Evidence]:
    """Wrong elements in some columns only, where what is before GEMM2 would show in others too."""
    if not tokens:
        return
    call, columns, part = pipeline.call, wrong.any(0), wrong[tokens]
    bounded = bool(
        (differing(got, want) & ~wrong)[tokens].any()
    )  # what differs within its bounds is not wrong
    far = _roundings(pipeline, got[tokens], want[tokens], tokens)[part]
    if float(far.mean()) < 1.5 and len(tokens) > 1:
        if is_spread(call, got, want, wrong, tokens, visible=0):
            yield from _scattered(wrong)
        return
    could = reached(call, want, wrong)
    share = part.sum(1) / could[tokens].sum(1)
    if float(far.median()) < _GROSS or float(share.max()) > 0.8:
        return
    if not is_spread(call, got, want, wrong, tokens):
        return
    named = named_columns(columns)
    if named and not bool((could.any(0) & ~named[1](len(columns)).to(columns.device)).any()):
        named = None
    after = (
        "GEMM1 and the activation are right, it is in GEMM2's rows of those columns (weights, scales), the fc2 bias, "
        "or the writing of the output"
    )
    if named and float(part[:, columns].float().mean()) > 0.3:
        kind = f"the output differs {named[0]} only"
        details = after + _garbage(got[wrong], want[wrong])
        yield Evidence.of_kind(("fc2", "finalize"), kind, details, 2)
    elif float(share.mean()) < 0.3 and (words := residue_in_words(columns)):
        kind = f"single elements differ, all of them {words}"
        same = bool((got[wrong.any(1)][:, columns] == got[tokens[0], columns]).all())
        yield Evidence.of_kind(("fc2", "finalize"), kind, _SAME * same + after, 2)
    elif float(share.mean()) < 0.3:
        yield Evidence(
            (),
            f"{int(wrong.sum()):,} single elements are far off, without a pattern of columns, and all others of "
            f"their rows {'lie within bounds' if bounded else 'are right'}: what is before GEMM2 would show in more "
            "columns; elements were overwritten, not written, or damaged",
            2,
        )


def _roundings(pipeline: Pipeline, got: Tensor, want: Tensor, tokens: list[int]) -> Tensor:
    """How many units in the last place these tokens' elements are off: of the output, or of a larger term of its sum.

    Where a sum cancels, a rounding of one of its terms is many units of the output.
    """
    far = ulp_distance(got, want).double()
    if is_heavy(pipeline.call):
        return far
    some = replace(pipeline, call=pipeline.call.select(torch.tensor(tokens, device=got.device)))
    terms = fp32.widen(slot_outputs(some).contiguous()) * some.call.token_final_scales[..., None]
    one, other = (fp32.widen(t.contiguous()).double() for t in (got, want))
    larger = torch.maximum(terms.abs().amax(1).nan_to_num(0, 0, 0), other.abs())
    return torch.minimum(far, (one - other).abs() / last_place(larger.clamp(min=_LEAST)))


def _garbage(got: Tensor, want: Tensor) -> str:
    """Words for numbers of all magnitudes, where those expected are not."""
    more = _binades(got) - _binades(want)
    return "; what is there is of all magnitudes, as in memory that was not written" * (more > _BINADES)


def _binades(values: Tensor) -> float:
    """That most of these numbers span."""
    sizes = fp32.widen(values).abs().double()
    sizes = sizes[(sizes > 0) & sizes.isfinite()]
    low, high = (float(sizes.log2().quantile(q)) for q in (0.1, 0.9)) if len(sizes) else (0.0, 0.0)
    return high - low


def _scattered(wrong: Tensor) -> Iterator[Evidence]:
    """Single roundings: the columns that have all, or whether they are spread over the tokens as by chance."""
    counts = wrong.sum(1).to(torch.float64)
    counts = counts[counts > 0]
    share = float(counts.mean()) / wrong.shape[1]
    if share > 0.4 or len(counts) < 4:
        return
    dispersion = float(counts.var()) / (float(counts.mean()) * (1 - share) + 1e-30)
    count = int(wrong.sum())
    how = f"{counted(count, 'element')} {'is' if count == 1 else 'are'} a rounding off, "
    columns = wrong.any(0).nonzero().flatten()
    first, last, size = int(columns[0]), int(columns[-1]), wrong.shape[1]
    if ((last - first + 1) / size) ** count * size < _BY_CHANCE:
        what = (
            "GEMM2 or what follows it sums or rounds otherwise there; what is before GEMM2 would show in all"
        )
        yield Evidence(("fc2", "finalize"), f"{how}all in columns {first} to {last} of {size}: {what}", 2)
    elif dispersion < 2:
        words = "spread over rows and columns as by chance, as roundings in GEMM2 or after it are, or noise"
        yield Evidence((), how + words, 1)
    elif dispersion > 4:
        yield Evidence((), how + "many of them in a few rows, as roundings before GEMM2 are; not proved", 1)
