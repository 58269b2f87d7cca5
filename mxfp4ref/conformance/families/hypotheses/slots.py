"""Hypotheses on which expert computes which slot of which token: ids, ranks, rows, dropped and repeated slots."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mxfp4ref.conformance.families.hypotheses.index_maps import IndexMap, expert_maps
from mxfp4ref.conformance.families.hypothesis import (
    Change,
    Hypothesis,
    Pipeline,
    SlotRows,
    local_of,
    of_slots,
    slot_outputs,
)
from mxfp4ref.conformance.families.slot_kinds import attributes, slots_of_kind
from mxfp4ref.conformance.findings.finding import OTHER_EXPERTS
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import select_local

__all__ = ["slot_hypotheses"]

_S = ("slots",)
_PADDED = -(1 << 40)
_ONCE = ", each expert once a token"


@dataclass(frozen=True)
class _Ids:
    """What `select_local` gets, the ids as `int64`, and what it should give."""

    ids: Tensor
    n: int
    size: int
    rank: int
    local: Tensor


_Select = Callable[[_Ids], Tensor]


def _selecting(change: _Select, *, once: bool = False) -> Change:
    """Another `select_local`. With `once` no expert counts twice in a token."""

    def on(pipeline: Pipeline) -> Pipeline:
        right = pipeline.stages.select_local

        def select(ids: Tensor, n: int, size: int, rank: int) -> Tensor:
            local = change(_Ids(ids.to(torch.int64), n, size, rank, right(ids, n, size, rank)))
            return select_local(local, n, 1, 0) if once else local

        return pipeline.staging(select_local=select)

    return on


def _mapped(axis: IndexMap) -> _Select:
    """Another of this rank's experts for each slot that is this rank's."""
    return lambda of: torch.where(
        of.local >= 0, axis.index(of.n).to(of.local.device)[of.local.clamp(min=0)], -1
    )


def _ids() -> Iterator[Hypothesis]:
    for axis, once in itertools.product(expert_maps(), (False, True)):
        yield Hypothesis(
            "ids",
            _S,
            f"slots are computed by {axis.of('expert')} (weights, scales, biases and parameters alike)"
            + _ONCE * once,
            _selecting(_mapped(axis), once=once),
            axis.cost + 0.05 + 0.3 * once,
            kind=OTHER_EXPERTS,
        )
    for at, words in ((0, "the first"), (-1, "the last")):
        yield Hypothesis(
            "ids",
            _S,
            f"every slot of a token is computed by the expert of {words} slot",
            _selecting(lambda of, a=at: of.local[:, [a]].expand_as(of.local)),
            1.3,
        )
    for by, words in ((1, "before"), (-1, "after")):
        yield Hypothesis(
            "ids",
            _S,
            f"a token's slots are computed by the experts of the token {words}",
            _selecting(lambda of, b=by: of.local.roll(b, 0)),
            1.5,
            across_tokens=True,
        )
        yield Hypothesis(
            "ids",
            _S,
            f"a slot is computed by the expert of the slot {words} it, with its own weight",
            _selecting(lambda of, b=by: of.local.roll(b, 1)),
            1.4,
        )


def _foreign(call: MoeCall) -> Iterator[Hypothesis]:
    """Slots that are padding or another rank's, computed all the same, by the expert that `what` says."""
    kinds: tuple[tuple[str, Callable[[Tensor, int], Tensor]], ...] = (
        ("padded slots (-1)", lambda place, n: place == _PADDED),
        ("slots that name an expert once more", lambda place, n: (place >= 0) & (place < n)),
        ("slots of other ranks", lambda place, n: place != _PADDED),
        ("padded slots (-1) and slots of other ranks", lambda place, n: place == place),
        ("slots with the first id of the next rank", lambda place, n: place == n),
        ("slots with the last id of the rank before", lambda place, n: place == -1),
        ("slots of later ranks", lambda place, n: place >= n),
        ("slots of earlier ranks", lambda place, n: (place < 0) & (place != _PADDED)),
    )
    whats: tuple[tuple[str, _Select], ...] = (
        ("by the rank's first expert", lambda of: of.ids * 0),
        ("by the rank's last expert", lambda of: of.ids * 0 + of.n - 1),
        ("by the expert with their id modulo the rank's number of experts", lambda of: of.ids % of.n),
        (
            "by the nearest of the rank's experts (ids are clamped to its range)",
            lambda of: (of.ids - of.rank * of.n).clamp(0, of.n - 1),
        ),
        (
            "by the expert that a negative index counts from the end",
            lambda of: (of.ids - of.rank * of.n) % of.n,
        ),
    )
    for words, chosen in kinds if call.ep_size > 1 else kinds[:2]:
        for where, expert in whats:

            def select(
                of: _Ids,
                chosen: Callable[[Tensor, int], Tensor] = chosen,
                expert: _Select = expert,
            ) -> Tensor:
                place = torch.where(of.ids < 0, _PADDED, of.ids - of.rank * of.n)  # among this rank's experts
                return torch.where((of.local < 0) & chosen(place, of.n), expert(of), of.local)

            for once in (False, True):
                yield Hypothesis(
                    "ranks",
                    _S,
                    f"{words}, to be skipped, are computed {where}" + _ONCE * once,
                    _selecting(select, once=once),
                    1.1 + 0.3 * once,
                )


def _ranks() -> Iterator[Hypothesis]:
    ways: tuple[tuple[str, Callable[[int, int, int], tuple[int, int]]], ...] = (
        ("one expert too far up", lambda n, size, rank: (rank * n + 1, n)),
        ("one expert too far down", lambda n, size, rank: (rank * n - 1, n)),
        ("without its last expert", lambda n, size, rank: (rank * n, n - 1)),
        ("that of the next rank", lambda n, size, rank: ((rank + 1) % size * n, n)),
        ("that of the previous rank", lambda n, size, rank: ((rank - 1) % size * n, n)),
        ("that of the rank counted from the end", lambda n, size, rank: ((size - 1 - rank) * n, n)),
        ("that of rank 0", lambda n, size, rank: (0, n)),
        ("by the rank itself, as if it were the number of its first expert", lambda n, size, rank: (rank, n)),
        ("of half as many experts a rank", lambda n, size, rank: (rank * n // 2, n)),
        ("of twice as many experts a rank", lambda n, size, rank: (rank * n * 2, n)),
    )
    for words, owned in ways:

        def select(of: _Ids, owned: Callable[[int, int, int], tuple[int, int]] = owned) -> Tensor:
            first, count = owned(of.n, of.size, of.rank)
            local = of.ids - first
            return torch.where((local >= 0) & (local < count), local, -1)

        yield Hypothesis(
            "ranks", _S, f"the range of ids of this rank is taken {words}", _selecting(select), 1.3
        )

    yield Hypothesis(
        "ranks",
        _S,
        "local ids are one too high, modulo the rank's experts",
        _selecting(lambda of: torch.where(of.local >= 0, (of.local + 1) % of.n, -1)),
        2,
    )
    yield Hypothesis(
        "ranks",
        _S,
        "experts are dealt out to ranks in turn (id modulo ep_size) instead of in blocks",
        _selecting(
            lambda of: torch.where((of.ids >= 0) & (of.ids % of.size == of.rank), of.ids // of.size, -1)
        ),
        1.4,
    )


def _miscounted(call: MoeCall) -> Iterator[Hypothesis]:
    """Some kind of slots that does not count, or counts twice."""
    biased = call.experts.fc2_biases is not None and call.tp_rank == 0
    for one in attributes(call, local_of(Pipeline(call))):
        words, of_rows = one.words, one.of_rows
        skipped = ("slots", "finalize") if one.of_places else _S  # or the loop of the sum is another

        def kind(rows: SlotRows, words: str = words) -> Tensor:
            return slots_of_kind(words, rows.call, rows.local)

        def without(rows: SlotRows, kind: Callable[[SlotRows], Tensor] = kind) -> SlotRows:
            return replace(rows, local=torch.where(kind(rows), -1, rows.local))

        def twice(rows: SlotRows, kind: Callable[[SlotRows], Tensor] = kind) -> SlotRows:
            return replace(rows, weights=torch.where(kind(rows), 2 * rows.weights, rows.weights))

        # Without a bias a row that is not added may as well be zero, in any stage.
        zero = of_rows and not biased
        or_zero = (
            ", or their rows are zero: not computed or not written by a GEMM or by the activation" * zero
        )
        yield of_slots(
            "dropped slots",
            ("slots", "fc1", "activation", "fc2") if zero else skipped,
            f"the slots {words} are left out of the sum{or_zero}",
            without,
            1.3,
        )
        doubled = ("slots", "fc2") if zero else skipped
        or_large = ", or GEMM2's rows of them are twice as large" * zero
        yield of_slots("dropped slots", doubled, f"the slots {words} are added twice{or_large}", twice, 1.4)
        for factor, what in ((0, "zero, not computed"), (2, "added twice")) if biased else ():

            def rows_alone(
                rows: SlotRows, kind: Callable[[SlotRows], Tensor] = kind, factor: int = factor
            ) -> SlotRows:
                return replace(rows, y=torch.where(kind(rows)[..., None], factor * rows.y, rows.y))

            stages = ("fc2", "activation") if factor == 0 else ("fc2", "slots")
            yield of_slots(
                "dropped slots",
                stages,
                f"GEMM2's rows of slots {words} are {what}, their fc2 bias is added once",
                rows_alone,
                1.45,
            )


def _routes(call: MoeCall) -> Iterator[Hypothesis]:
    """Tokens that have the ids and the weights of other tokens."""
    chunks = [1 << n for n in range(3, 14) if 1 << n < call.num_tokens]
    ways: list[tuple[str, Callable[[Tensor, int], Tensor], float]] = [
        ("the token before", lambda t, n: (t - 1).clamp(min=0), 1.3),
        ("the token after", lambda t, n: (t + 1).clamp(max=n - 1), 1.3),
        *(
            (
                f"the token's number modulo {c}: each chunk of {c} tokens has the first one's",
                lambda t, n, c=c: t % c,
                1.2,
            )
            for c in chunks
        ),
    ]
    for words, source, cost in ways:

        def on(rows: SlotRows, source: Callable[[Tensor, int], Tensor] = source) -> SlotRows:
            at = source(torch.arange(len(rows.local), device=rows.local.device), len(rows.local))
            local = rows.local[at]
            other = rows.pipeline.staging(select_local=lambda *_: local)
            return replace(rows, y=slot_outputs(other), local=local, weights=rows.weights[at])

        told = f"tokens have the routes, expert ids and weights, of {words}"
        yield replace(of_slots("ids", _S, told, on, cost), across_tokens=True)


def _repeated(call: MoeCall) -> Iterator[Hypothesis]:
    for source in range(min(call.top_k, 8)):
        for target in range(min(call.top_k, 8)):
            if source != target and (abs(source - target) == 1 or source == 0):

                def select(of: _Ids, source: int = source, target: int = target) -> Tensor:
                    local = of.local.clone()
                    local[:, target] = local[:, source]
                    return local

                yield Hypothesis(
                    "ids",
                    _S,
                    f"slot {target} of a token is computed by the expert of slot {source}",
                    _selecting(select),
                    1.6,
                )


def slot_hypotheses(call: MoeCall) -> Iterator[Hypothesis]:
    """All of them that can show on a call."""
    if call.experts.num_experts > 1:
        yield from _ids()
        yield from _repeated(call)
        yield from _routes(call)
    yield from _foreign(call)
    if call.ep_size > 1:
        yield from _ranks()
    yield from _miscounted(call)
