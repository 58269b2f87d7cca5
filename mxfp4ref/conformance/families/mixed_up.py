"""Whether some slots' rows are others that the same weights and inputs give: another expert's, another token's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mxfp4ref.conformance.families.hypothesis import Pipeline, local_of
from mxfp4ref.conformance.families.sampled import Sample
from mxfp4ref.conformance.families.slot_kinds import attributes
from mxfp4ref.conformance.families.solved_weights import in_common, powers_of
from mxfp4ref.conformance.finding import Evidence
from mxfp4ref.conformance.index_words import pair_words
from mxfp4ref.conformance.reduction import by_every_expert, expert_numbers
from mxfp4ref.formats.mxfp4 import dequantize
from mxfp4ref.model.forward import MoeTrace, activate_rows, trace
from mxfp4ref.sm90 import fp32

__all__ = ["mixed_up"]

_LOOKED_AT, _OTHERS = 8, 64  # tokens
_WORK = 1 << 33  # multiplications of all tokens with all experts
_SEVERAL = 3  # experts that one stands for
_LOUD, _QUIET = 4.0, 1.6  # times the roundings: before, and when explained
_WEIGHTS = "the right rows are summed with other weights"


@dataclass(frozen=True)
class _Swap:
    """A slot's row that is another one: which slot, in words by what, how that changes the token's row.

    `tokens_on` is how many tokens further on it is from.
    """

    slot: int
    words: str
    change: Tensor
    tokens_on: int = 0


def mixed_up(pipeline: Pipeline, some: list[Sample]) -> Evidence | None:
    """What follows, if rows that changed places explain the errors up to the roundings."""
    loud = sorted((s for s in some if s.loudness > _LOUD), key=lambda s: -s.loudness / len(s.experts))
    loud = loud[:_LOOKED_AT]
    call, experts = pipeline.call, pipeline.call.experts
    if not loud or len(loud[0].error) != experts.hidden_size:
        return None
    if (found := _other_weights(pipeline, loud) or _other_biases(pipeline, loud)) is not None:
        return found
    others = [s.token for s in loud] + [t for t in range(call.num_tokens) if t not in {s.token for s in loud}]
    tokens = others[:_OTHERS]
    if len(tokens) * experts.num_experts * 3 * experts.hidden_size * experts.intermediate_size > _WORK:
        return None
    rows = _Grid.of(pipeline, tokens)
    for stages, words, swaps in (
        (("slots",), "are computed by other experts", rows.of_other_experts),
        (("fc1",), "got GEMM1 of other experts' weights", rows.of_other_first),
        (("fc2",), "got GEMM2 of other experts' weights", rows.of_other_second),
        (("slots", "input"), "have the rows of other tokens", rows.of_other_tokens),
        (("slots", "finalize"), "have the rows of other slots", rows.of_other_slots),
    ):
        explained = {s.token: e for s in loud if (e := _explained(s, list(swaps(s)))) is not None}
        if 3 * len(explained) >= 2 * len(loud):
            rule = _by_one(explained) or _by_rule(pipeline, explained)
            which = f"slots{_which(pipeline, explained)} {words}{_moved(explained)}{rule}"
            details = f"{_listed(explained)}; all else of these tokens is right"
            return Evidence(stages, f"{which}: {details}", 4, kind=f"slots {words}")
    return None


def _explained(sample: Sample, swaps: list[_Swap]) -> list[_Swap] | None:
    """The swaps, at most one of each slot, that leave no more than roundings of the error."""
    left, chosen = sample.error, []
    while swaps and sample.loudness_of(left) > _QUIET:
        rest = left - torch.stack([s.change for s in swaps])
        sizes = (rest.square() / sample.noise).sum(1)
        best = int(sizes.argmin())
        if float(sizes[best]) >= float((left.square() / sample.noise).sum()):
            return None
        left = rest[best]
        chosen.append(swaps[best])
        swaps = [s for s in swaps if s.slot != chosen[-1].slot]
    return chosen if sample.loudness_of(left) <= _QUIET else None


def _which(pipeline: Pipeline, explained: dict[int, list[_Swap]]) -> str:
    """Words for the slots, if they are all of a kind among those of the tokens looked at."""
    local = local_of(pipeline)
    mask = torch.zeros_like(local, dtype=torch.bool)
    for token, swaps in explained.items():
        here = (local[token] >= 0).nonzero().flatten()
        mask[token, here[[s.slot for s in swaps]]] = True
    tokens = list(explained)
    if torch.equal(mask[tokens], local[tokens] >= 0):
        return ""
    kinds = (
        kind.words
        for kind in attributes(pipeline.call, local)
        if torch.equal(kind.mask[tokens], mask[tokens])
    )
    return f" {words}" if (words := next(kinds, "")) else ""


def _moved(explained: dict[int, list[_Swap]]) -> str:
    """Where from, if that is as many tokens on for all."""
    on = {swap.tokens_on for swaps in explained.values() for swap in swaps}
    if len(on) > 1 or on == {0}:
        return ""
    by = on.pop()
    return {1: ", of the next token", -1: ", of the token before"}.get(
        by, f", {abs(by)} tokens {'on' if by > 0 else 'before'}"
    )


def _by_one(explained: dict[int, list[_Swap]]) -> str:
    """Words for the expert that stands for several others, if it is always the same."""
    pairs = {tuple(s.words.split(" by ")) for swaps in explained.values() for s in swaps if " by " in s.words}
    taken = {pair[-1] for pair in pairs}
    one = taken.pop() if len(pairs) >= _SEVERAL and len(taken) == 1 else ""
    return f" (always by expert {one})" if one.isdigit() else ""


def _by_rule(pipeline: Pipeline, explained: dict[int, list[_Swap]]) -> str:
    """The rule by which experts stand for others in these tokens, and for themselves in their other slots."""
    local, numbers = local_of(pipeline), expert_numbers(pipeline.call)
    found: list[tuple[int, int]] = []
    for token, swaps in explained.items():
        own = (local[token][local[token] >= 0] + numbers.start).tolist()
        by = {s.slot: s.words.removeprefix("expert ").split(" by ") for s in swaps}
        if any(len(pair) != 2 or not "".join(pair).isdigit() for pair in by.values()):
            return ""
        found += [(expert, int(by[slot][1]) if slot in by else expert) for slot, expert in enumerate(own)]
    words = pair_words(found, "expert", numbers)
    return f" ({words}, in all tokens looked at)" if words else ""


def _listed(explained: dict[int, list[_Swap]]) -> str:
    told = [f"token {t}: {', '.join(s.words for s in swaps)}" for t, swaps in explained.items()]
    return "; ".join(told[:3])


def _other_weights(pipeline: Pipeline, loud: list[Sample]) -> Evidence | None:
    """Whether the rows are the right ones with other weights, and which, as far as the output determines them."""
    fitting = [(s, s.solved(pipeline.call)) for s in loud if s.loudness_of(s.rest) <= _QUIET]
    if 3 * len(fitting) < 2 * len(loud):
        return None
    told = [weights for _, weights in fitting if not weights.undetermined]
    if not told:
        weights = fitting[0][1]
        return Evidence(
            (),
            f"{_WEIGHTS}; those of experts {', '.join(map(str, weights.undetermined))} (token {weights.token}) "
            "cannot be told apart from this output",
            1,
            kind=_WEIGHTS,
        )
    by_expert: dict[int, list[float]] = {}
    for weights in told:
        for expert, asked, found in zip(weights.experts, weights.asked, weights.found, strict=True):
            if abs(asked) > 0.1:
                by_expert.setdefault(expert, []).append(found / asked)
    alike = all(max(r) - min(r) < 0.05 * abs(r[0]) + 0.02 for r in by_expert.values())
    power = powers_of(told)
    stages = ("finalize", "fc2") if alike or power else ("finalize",)
    shown = alike and not power and any(len(r) > 1 for r in by_expert.values())
    where = "; a factor of each expert, on GEMM2's scales or in the sum" if shown else ""
    factor = power or in_common(told)[0]
    details = f"{factor}{'; ' * bool(factor)}{'; '.join(map(str, told[:2]))}{where}"
    return Evidence.of_kind(stages, _WEIGHTS, details, 4)


def _other_biases(pipeline: Pipeline, loud: list[Sample]) -> Evidence | None:
    """Whether the errors are sums of the experts' fc2 biases."""
    call = pipeline.call
    if call.experts.fc2_biases is None or 4 * call.experts.num_experts > call.experts.hidden_size:
        return None
    biases = fp32.widen(call.experts.fc2_biases).double()
    told = []
    for s in loud:
        solution = torch.linalg.lstsq(biases.T, s.error[:, None], driver="gelsd").solution[:, 0]
        if s.loudness_of(s.error - solution @ biases) > _QUIET:
            continue
        asked = torch.zeros(len(biases), dtype=torch.float64).index_add_(0, s.experts, s.weights)
        asked *= call.tp_rank == 0
        told.append(f"token {s.token} has {_sum(solution + asked)}, asked was {_sum(asked)}")
    if 3 * len(told) < 2 * len(loud):
        return None
    kind = "the fc2 biases added are others by weight or expert"
    return Evidence.of_kind(("finalize", "fc2"), kind, "; ".join(told[:2]), 4)


def _sum(weights: Tensor) -> str:
    parts = [f"{w:.3g} x expert {e}'s bias" for e, w in enumerate(weights.tolist()) if abs(w) > 2e-2]
    return " + ".join(parts) or "none"


@dataclass(frozen=True)
class _Grid:
    """Some tokens' rows by all experts of the rank: `[T, E, ...]`.

    Attributes:
        pipeline: the right one.
        tokens: which.
        fc1: GEMM1's output, bf16.
        activation, y: float64; y with the fc2 bias.
        second: `[E, H, I] float64`, GEMM2's weights.
        biases: `[E, H]`, of fc2.
    """

    pipeline: Pipeline
    tokens: list[int]
    fc1: Tensor
    activation: Tensor
    y: Tensor
    second: Tensor
    biases: Tensor

    @classmethod
    def of(cls, pipeline: Pipeline, tokens: list[int]) -> _Grid:
        call, experts = pipeline.call, pipeline.call.experts
        count = experts.num_experts
        rows: MoeTrace = trace(by_every_expert(call, torch.tensor(tokens)))
        order = (rows.token * count + rows.expert).argsort()
        assert experts.fc2_scales is not None
        dense = dequantize(experts.fc2_weights, experts.fc2_scales, convention="sm90", dtype=torch.float32)
        biases = torch.zeros(count, experts.hidden_size, dtype=torch.float64)
        if experts.fc2_biases is not None and call.tp_rank == 0:
            biases = fp32.widen(experts.fc2_biases).double()
        shaped = [
            t[order].view(len(tokens), count, -1)
            for t in (rows.fc1_output, rows.activation, rows.fc2_accumulators)
        ]
        activation, y = fp32.widen(shaped[1].contiguous()).double(), shaped[2].double() + biases
        return cls(pipeline, tokens, shaped[0], activation, y, dense.double(), biases)

    def _others(self, sample: Sample) -> Iterator[tuple[int, int, int, float]]:
        """The token's place, and each slot, with each other expert and its weight."""
        at = self.tokens.index(sample.token)
        for slot, (own, weight) in enumerate(
            zip(sample.experts.tolist(), sample.weights.tolist(), strict=True)
        ):
            for other in range(len(self.second)):
                if other != own:
                    yield at, slot, other, weight

    def _swap(self, sample: Sample, slot: int, other: int, row: Tensor, weight: float) -> _Swap:
        return _Swap(
            slot,
            f"expert {self._id(sample.experts[slot])} by {self._id(other)}",
            weight * (row - sample.y[slot]),
        )

    def _id(self, expert: int | Tensor) -> int:
        return int(expert) + expert_numbers(self.pipeline.call).start

    def of_other_experts(self, sample: Sample) -> Iterator[_Swap]:
        for at, slot, other, weight in self._others(sample):
            yield self._swap(sample, slot, other, self.y[at, other], weight)

    def of_other_first(self, sample: Sample) -> Iterator[_Swap]:
        call, count = self.pipeline.call, len(self.second)
        at = self.tokens.index(sample.token)
        own = sample.experts.repeat_interleave(count)
        fc1 = self.fc1[at].repeat(len(sample.experts), 1)
        rows = activate_rows(call, fc1, own, self.pipeline.stages.activate)
        rounded = (
            fp32.widen(self.pipeline.stages.round_activation(rows)).double().view(-1, count, rows.shape[1])
        )
        for _, slot, other, weight in self._others(sample):
            row = sample.second[slot] @ rounded[slot, other] + self.biases[sample.experts[slot]]
            yield self._swap(sample, slot, other, row, weight)

    def of_other_second(self, sample: Sample) -> Iterator[_Swap]:
        for _, slot, other, weight in self._others(sample):
            row = self.second[other] @ sample.activation[slot] + self.biases[sample.experts[slot]]
            yield self._swap(sample, slot, other, row, weight)

    def of_other_tokens(self, sample: Sample) -> Iterator[_Swap]:
        for slot, (expert, weight) in enumerate(
            zip(sample.experts.tolist(), sample.weights.tolist(), strict=True)
        ):
            for place, token in enumerate(self.tokens):
                if token != sample.token:
                    change = weight * (self.y[place, expert] - sample.y[slot])
                    words = f"expert {self._id(expert)} got token {token}"
                    yield _Swap(slot, words, change, token - sample.token)

    def of_other_slots(self, sample: Sample) -> Iterator[_Swap]:
        local = local_of(self.pipeline)
        for slot, weight in enumerate(sample.weights.tolist()):
            for place, token in enumerate(self.tokens):
                for expert in local[token][local[token] >= 0].tolist():
                    change = weight * (self.y[place, expert] - sample.y[slot])
                    who = f"expert {self._id(sample.experts[slot])} by token {token}'s expert {self._id(expert)}"
                    yield _Swap(slot, who, change, token - sample.token)
