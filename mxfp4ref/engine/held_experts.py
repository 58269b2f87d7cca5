"""Which of a checkpoint's experts a served output was computed with, where they are not those of the rank.

All experts are at hand. Whose output it is, one token says; and whose tensors each of a rank's experts has, what it
adds to a few tokens. Either is told only where it gives every bit of the output.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from mxfp4ref._choices import STRATEGIES, RouterName
from mxfp4ref._spans import runs
from mxfp4ref._words import shortened
from mxfp4ref.checkpoint.layer import CheckpointLayer, ExpertsInFiles
from mxfp4ref.checkpoint.run import layer_call, route_input, run_layer
from mxfp4ref.conformance.comparison import differing
from mxfp4ref.conformance.findings.finding import counted
from mxfp4ref.conformance.findings.index_words import moved_runs
from mxfp4ref.conformance.findings.reduction import clock_of, local_experts
from mxfp4ref.engine.fitting import closest_kernel, fitting_kernels
from mxfp4ref.formats.experts import PARAMETERS, Experts
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import forward, trace
from mxfp4ref.model.parallel import Ranks, split_intermediate
from mxfp4ref.model.placement import place_experts

__all__ = ["other_experts", "whose_output"]

_SECONDS = 10.0  # of the processor, after which no more experts are read
_TOKENS = 4  # of each expert
_STARTS = 3  # experts that are tried, before it is something else that is wrong
_NEAR = 2.0**-6  # of a row's length, that other K tiles stay within
_ROUNDED = 0.02  # of the elements, that weights a few ulp off change at most
_SURE = 12.0  # standard deviations
_LISTED = 6  # runs of experts in a sentence
_GEMMS, _KINDS = ("fc1", "fc2"), ("weights", "scales", "biases")
_TENSORS = tuple(f"{gemm}_{kind}" for gemm in _GEMMS for kind in _KINDS)
# Tensors that a loader may take from another expert together, the plainest first.
_GROUPS = (
    (*_TENSORS, *PARAMETERS),
    *(tuple(f"{gemm}_{kind}" for kind in kinds) for kinds in (_KINDS, _KINDS[:2]) for gemm in _GEMMS),
    *(tuple(f"{gemm}_{kind}" for gemm in _GEMMS for kind in kinds) for kinds in (_KINDS[:2], _KINDS[1:])),
    *(tuple(f"{gemm}_{kind}" for gemm in _GEMMS) for kind in _KINDS),
    *((name,) for name in (*_TENSORS, *PARAMETERS)),
)


def whose_output(
    layer: CheckpointLayer, given: Mapping[str, Tensor], got: Tensor, router: RouterName | None, ranks: Ranks
) -> str:
    """Which other rank's output it is, or that it is the whole layer's, in words; "" if neither.

    Args:
        layer, given, router, ranks: as for `run_layer`.
        got: `[M, H] bf16`, without padding.
    """
    rows = got.any(1).nonzero().flatten().tolist()
    several = ranks.tp_size > 1 and ranks.tp_rank is None
    if not isinstance(layer.experts, ExpertsInFiles) or layer.fused or not rows or several:
        return ""
    token = slice(rows[0], rows[0] + 1)
    one = {name: tensor[token] for name, tensor in given.items() if name != "shared_output"}
    chosen = set(route_input(layer, one, router)[1].ids.flatten().tolist())
    asked = layer.expert_ids or tuple(range(layer.num_experts)) * (ranks.ep_size == 1)
    for ids, words in _ranks(layer, ranks.ep_size).items():
        for tp_rank in (None,) if ranks.tp_rank is None else range(ranks.tp_size):
            if (ids, tp_rank) == (asked, ranks.tp_rank) or not chosen & set(ids):
                continue
            other = replace(layer, experts=replace(layer.experts, ids=ids), expert_ids=ids)
            how = replace(ranks, ep_size=1, expert_map=None, tp_rank=tp_rank)
            row = run_layer(other, one, router=router, ranks=how)["rank_output"]
            if not _is_near(row, got[token]):
                continue
            call = layer_call(other, given, router=router, ranks=how)
            if right := _agreed(call, _widened(got, call)):
                shard = "" if tp_rank is None else f" --tp-rank {tp_rank}"
                return f"it is the output of {words}{shard}); {right} for these"
    return ""


def _ranks(layer: CheckpointLayer, ep_size: int) -> dict[tuple[int, ...], str]:
    """The experts of each rank of several like this one, and all of the layer, in words."""
    count, found = layer.num_experts, dict[tuple[int, ...], str]()
    size = ep_size if layer.expert_ids is None else -(-count // len(layer.expert_ids))
    for strategy in STRATEGIES if size > 1 else ():
        placed = f" --expert-placement {strategy}" * (strategy != STRATEGIES[0])
        for rank, ids in enumerate(place_experts(count, size, strategy)):
            found.setdefault(ids, f"experts {_spelled(ids)} (--ep-size {size} --ep-rank {rank}{placed}")
    found.setdefault(tuple(range(count)), "all experts (--ep-size 1")
    return found


def _is_near(one: Tensor, other: Tensor) -> bool:
    return float((one.double() - other.double()).norm()) <= _NEAR * float(other.double().norm())


def _widened(got: Tensor, call: MoeCall) -> Tensor:
    return torch.nn.functional.pad(got, (0, call.experts.hidden_size - got.shape[1]))


def other_experts(layer: CheckpointLayer, call: MoeCall, got: Tensor) -> str:
    """Which of the checkpoint's experts' tensors the layer's experts have, in words; "" if that does not explain it.

    Args:
        layer: whose experts the call has.
        call: as `layer_call` gives it.
        got: `[M, H] bf16`, the call's output.
    """
    if layer.fused or not (isinstance(layer.experts, ExpertsInFiles) or layer.expert_ids is None):
        return ""
    search = _Search(layer, call, got)
    for number, start in enumerate(search.suspects[:_STARTS]):
        for names, first in search.solved(start, _given(call.experts)):
            found = {start: first}
            for expert in search.suspects[:number] + search.suspects[number + 1 :]:
                found.update((expert, other) for _, other in search.solved(expert, [names], found)[:1])
            changed = search.with_others(found, names)
            if right := _agreed(replace(call, experts=changed), got):
                return _told(layer, found, names if names != _given(call.experts)[0] else (), right)
    return ""


def _given(experts: Experts) -> list[tuple[str, ...]]:
    """The groups of tensors, as far as there are such, each once."""
    given = (tuple(name for name in names if getattr(experts, name) is not None) for names in _GROUPS)
    return [names for names in dict.fromkeys(given) if names]


class _Search:
    """What a call's experts add to some of its tokens, and what others would.

    Attributes:
        suspects: local experts that no token with the right bits has; first those that share tokens with fewest.
    """

    def __init__(self, layer: CheckpointLayer, call: MoeCall, got: Tensor) -> None:
        self._layer, self._call = layer, call
        clock = clock_of(call)
        self._left = partial(lambda start: clock() - start < _SECONDS, clock())
        want = forward(call)
        self._rest = got.double() - want.double()
        self._local = torch.where(call.token_final_scales == 0, -1, local_experts(call))
        wrong = differing(got, want).any(1)
        seen = set(self._local[wrong].flatten().tolist()) - set(self._local[~wrong].flatten().tolist()) - {-1}
        among = torch.isin(self._local, torch.tensor(sorted(seen), dtype=torch.int64))
        beside = {e: int(among[(self._local == e).any(1)].sum(1).min()) for e in seen}
        self._beside = torch.where(self._rest.isfinite().all(1), among.sum(1), call.top_k + 1)
        self.suspects = sorted(seen, key=lambda e: (beside[e], e))

    def solved(
        self, expert: int, groups: Sequence[tuple[str, ...]], known: Mapping[int, int] | None = None
    ) -> list[tuple[tuple[str, ...], int]]:
        """Groups of tensors with whose they are, in that expert's stead, the likeliest first."""
        token, slot = (self._local == expert).nonzero()[:, :2].unbind(1)
        usual = self._call.token_final_scales[token, slot].abs()
        best = sorted(range(len(token)), key=lambda i: (int(self._beside[token[i]]), -float(usual[i])))[
            :_TOKENS
        ]
        token, slot = token[best], slot[best]
        rest, tried = self._rest[token], list[tuple[float, int, int]]()
        own = self._call.experts.slice(expert, expert + 1)
        before = self._added(own, token, slot)
        if not bool(rest.isfinite().all()):
            return []
        for other in _in_order(self._layer, expert, known or {}):
            if not self._left():
                break
            given, certain = self._expert(other), False
            for number, names in enumerate(groups):
                theirs = {name: getattr(given, name) for name in names}
                if all(torch.equal(getattr(own, name), tensor) for name, tensor in theirs.items()):
                    continue
                more = self._added(replace(own, **theirs), token, slot) - before
                part = float((rest * more).sum() / more.square().sum().clamp(min=1e-300))
                sigma = float(rest.norm() / more.norm().clamp(min=1e-300)) / rest.numel() ** 0.5
                if abs(part - 1) < max(0.25, 4 * sigma) and part > 5 * sigma:
                    tried.append((float((rest - more).norm()), number, other))
                    certain |= part > _SURE * sigma
            if certain:
                break
        return [(groups[number], other) for _, number, other in sorted(tried)]

    def _expert(self, number: int) -> Experts:
        """One of the checkpoint's, as the call has its own."""
        layer, call = self._layer, self._call
        if isinstance(layer.experts, ExpertsInFiles):
            one = replace(layer.experts, ids=(number,)).read()
        else:
            one = layer.experts.slice(number, number + 1)
        return split_intermediate(one, call.tp_size, intermediate_size=layer.intermediate_size)[call.tp_rank]

    def _added(self, one: Experts, token: Tensor, slot: Tensor) -> Tensor:
        """What an expert adds to each of these slots' tokens, `[T, H] float64`."""
        weights = self._call.token_final_scales[token, slot][:, None]
        ids = torch.zeros_like(weights, dtype=torch.int32)
        alone = replace(
            self._call,
            input=self._call.input[token],
            token_selected_experts=ids,
            token_final_scales=weights,
            experts=one,
            ep_size=1,
            ep_rank=0,
        )
        rows = trace(alone).fc2_output.double()
        if one.fc2_biases is not None and alone.tp_rank == 0:
            rows = rows + one.fc2_biases.double()
        return rows * weights.double()

    def with_others(self, found: Mapping[int, int], names: Sequence[str]) -> Experts:
        """The call's experts, with these tensors of others."""
        changed = {name: getattr(self._call.experts, name).clone() for name in names}
        for expert, other in found.items():
            given = self._expert(other)
            for name, tensor in changed.items():
                tensor[expert] = getattr(given, name)[0]
        return replace(self._call.experts, **changed)


def _in_order(layer: CheckpointLayer, expert: int, known: Mapping[int, int]) -> Iterator[int]:
    """Which experts a local one may be, the likeliest first: as far off as others are, or of another layout."""
    near = sorted(known, key=lambda one: abs(one - expert))
    places = [known[one] + expert - one for one in near]
    mine, count = layer.expert_ids or tuple(range(layer.num_experts)), layer.num_experts
    rank = mine[0] // len(mine)
    for order in (sorted(range(count), key=str), range(count)):
        places += [
            order[at] for r in (rank, 0, rank - 1, rank + 1) if 0 <= (at := r * len(mine) + expert) < count
        ]
    size = -(-count // len(mine))
    places += [expert * size + rank, *range(count)]
    yield from dict.fromkeys(p for p in places if 0 <= p < count and p != mine[expert])


def _told(layer: CheckpointLayer, found: Mapping[int, int], names: Sequence[str], right: str) -> str:
    """ "experts 8 to 11 of this rank are the checkpoint's 2 to 5, ..."."""
    count = layer.num_experts
    mine = layer.expert_ids or tuple(range(count))
    source = [-1] * count
    for local, other in found.items():
        source[mine[local]] = other
    words = [name.replace("_", " ") for name in names]
    group = f"the {' and '.join(words)} of " * bool(names)
    told = [
        f"expert{'s' * (last > first)} {_spelled(range(first, last + 1))} "
        f"{'are those of' if names else 'are' if last > first else 'is'} "
        f"the checkpoint's {_spelled(range(other, other + last - first + 1))}"
        for first, last, other in moved_runs(source)
    ]
    changed = shortened(told, _LISTED)
    whose = "" if layer.expert_ids is None else "this rank's "
    size = len(mine)
    ranks = sorted({other // size for other in found.values()})
    of = "" if size == count else f", those of rank{'s' * (len(ranks) > 1)} {_spelled(ranks)}"
    by_name = sorted(range(count), key=str)[mine[0] // size * size :]
    as_strings = all(by_name[local : local + 1] == [other] for local, other in found.items())
    why = ": as names of experts sorted as strings, 10 before 2, deal them out" * as_strings
    return f"{group}{whose}{changed}{of}{why}; {right} for these"


def _agreed(call: MoeCall, got: Tensor) -> str:
    """Whether a call gives this output, or most of its elements, whose sums are near throughout; in words, or ""."""
    if fitting_kernels(call, got, first=True):
        return "every bit of the output is right"
    output = forward(replace(call, kernel=closest_kernel(call, got)))
    off = differing(output, got)
    if int(off.sum()) > _ROUNDED * off.numel() or not _is_near(output, got):
        return ""
    return f"all but {int(off.sum()):,} of {counted(off.numel(), 'element')} of the output are right in every bit"


def _spelled(numbers: Sequence[int]) -> str:
    """ "0 to 3, 5"."""
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in runs(numbers))
