"""A hypothesis on what is wrong: a stage, a place and a change, as a pipeline that can be run and as a sentence."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from mxfp4ref.conformance.comparison import differing
from mxfp4ref.conformance.findings.finding import STAGES, UNKNOWN, Finding
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import KERNEL, Stages, forward

__all__ = [
    "FAILURES",
    "STAGES",
    "UNKNOWN",
    "Change",
    "Finding",
    "Hypothesis",
    "Pipeline",
    "SlotRows",
    "composed",
    "fields_set",
    "finalized",
    "of_first_factor",
    "of_output",
    "of_slots",
    "of_sum",
    "roughly",
    "slot_outputs",
    "unchecked",
]

_ANYWHERE = {"factor": 0.9, "routing weights": 2.0}  # the part of the bits that other places of it give, too
_UNLIKE = 1.1  # factor between those of two slots
FAILURES = (
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    RuntimeError,
)  # of a change that is not defined on a call


@dataclass(frozen=True)
class Pipeline:
    """A call and how it is computed; a change makes another one of it.

    Attributes:
        call: its experts in logical layout, not strict.
        stages: as in `forward`.
        rows: what is done with the slots' rows, experts and weights before the weighted sum.
        run_call: computes the output; None for `forward` with the stages, and `rows` between.
        after: what is done with the output.
    """

    call: MoeCall
    stages: Stages = KERNEL
    rows: Callable[[SlotRows], SlotRows] | None = None
    run_call: Callable[[MoeCall], Tensor] | None = None
    after: Callable[[Tensor], Tensor] | None = None

    def run(self) -> Tensor:
        """The output `[M, H] bf16`."""
        call = self.checked.call
        if self.run_call is not None:
            output = self.run_call(call)
        elif self.rows is not None:
            return SlotRows.of(replace(self, call=call)).output(self)
        else:
            output = forward(call, self.stages)
        return output if self.after is None else self.after(output)

    def gives(self, output: Tensor) -> bool:
        """Whether it gives this output, in every bit."""
        try:
            own = self.run()
        except FAILURES:
            return False
        return own.shape == output.shape and not bool(differing(own, output).any())

    @property
    def checked(self) -> Pipeline:
        """With the experts' tensors checked, which `having` does not."""
        return self.calling(experts=replace(self.call.experts))

    def calling(self, **fields: Any) -> Pipeline:
        """With other fields of the call."""
        return replace(self, call=replace(self.call, **fields))

    def staging(self, **stages: Any) -> Pipeline:
        """With other stages."""
        return replace(self, stages=replace(self.stages, **stages))

    def behind(self, stage: str, change: Callable[[Tensor], Tensor]) -> Pipeline:
        """With what a stage gives changed."""
        right = getattr(self.stages, stage)
        return self.staging(**{stage: lambda *given: change(right(*given))})

    def before(self, rounding: str, change: Callable[[Tensor], Tensor]) -> Pipeline:
        """With what is rounded changed."""
        right = getattr(self.stages, rounding)
        return self.staging(**{rounding: lambda x: right(change(x))})

    def having(self, **tensors: Any) -> Pipeline:
        """With other tensors of the experts, which are not checked here."""
        return replace(self, call=unchecked(self.call, experts=unchecked(self.call.experts, **tensors)))

    def summing(self, change: Callable[[SlotRows], SlotRows]) -> Pipeline:
        """With the slots' rows, experts and weights changed before the weighted sum."""
        self.check_open()
        before = self.rows
        return replace(self, rows=change if before is None else lambda rows: change(before(rows)))

    def computing(self, run: Callable[[Pipeline], Tensor]) -> Pipeline:
        """With an output that is computed otherwise, by what gets this pipeline of any call, without `after`."""
        self.check_open()
        return replace(self, run_call=lambda call: run(replace(self, call=call, after=None)))

    def check_open(self) -> None:
        """ValueError where the output is computed as a whole: what is changed inside of it would be lost."""
        if self.run_call is not None:
            raise ValueError("run_call: expected none, so that there are stages to change")

    def then(self, change: Callable[[Tensor], Tensor]) -> Pipeline:
        """With the output changed afterwards."""
        before = self.after
        return replace(self, after=change if before is None else lambda output: change(before(output)))


def unchecked(record: Any, **fields: Any) -> Any:
    """As `replace`, without the checks of a new record."""
    new = object.__new__(type(record))
    new.__dict__.update(record.__dict__ | fields)
    return new


def fields_set(one: Any, other: Any) -> dict[str, Any]:
    """The fields of the second of two records that are not the first one's, as objects."""
    values = ((f.name, getattr(one, f.name), getattr(other, f.name)) for f in fields(one))
    return {name: new for name, old, new in values if new is not old}


Change = Callable[[Pipeline], Pipeline]


@dataclass(frozen=True)
class Hypothesis:
    """One way to be wrong.

    Attributes:
        family: the kind of change, a key of `FAMILIES`.
        stages: where it lies, of `STAGES`; more than two, as where rows are zero, are told in its words alone.
        words: what is wrong, without a full stop.
        change: the pipeline with the change in it.
        cost: how much it assumes; of several that explain the same the least is told.
        name: of the named defect that it is.
        slow: whether it takes many times as long as a forward.
        of_rows: the change, where it is one of the slots' rows, so that no GEMM has to be computed again.
        of_sum: likewise, where it is another `finalize`.
        of_output: the change, where it is one of the output.
        factor: that everything is multiplied with, where the change is no other.
        across_tokens: whether it takes numbers of other tokens, or a token's place among them.
        across_experts: whether it takes numbers of other experts, in a family that does not.
        kind: as of a `Finding`.
        variants: the same with other details, which are tried where it comes close.
        place: of one that holds in a part, at the end of its words which: other parts may fit as well.
        table: whether it is what was solved for one call alone, of which the others of its kind may be the rule.
    """

    family: str
    stages: tuple[str, ...]
    words: str
    change: Change
    cost: float = 1.0
    name: str = ""
    slow: bool = False
    of_rows: Callable[[SlotRows], SlotRows] | None = None
    of_sum: Callable[..., Tensor] | None = None
    of_output: Callable[[Tensor], Tensor] | None = None
    factor: float | None = None
    across_tokens: bool = False
    across_experts: bool = False
    kind: str = ""
    variants: tuple[Hypothesis, ...] = ()
    table: bool = False
    place: str = ""

    @property
    def cheap(self) -> bool:
        """Whether no GEMM has to be computed again."""
        return bool(self.of_rows or self.of_sum or self.of_output)

    def run(self, pipeline: Pipeline) -> Tensor | None:
        """The output, or None where the change is not defined, as of a call with other rows."""
        try:
            output = self.change(pipeline).run()
        except FAILURES:
            return None
        return output if output.shape == pipeline.call.input.shape else None

    def predicts(self, pipeline: Pipeline, got: Tensor) -> bool:
        """Whether it gives every bit of an output."""
        output = self.run(pipeline)
        return output is not None and output.shape == got.shape and not bool(differing(output, got).any())


@dataclass(frozen=True)
class SlotRows:
    """What the weighted sum is made of.

    Attributes:
        pipeline: whose these are.
        y: `[M, k, H] bf16`, what GEMM2 gives; zeros where the slot is skipped.
        local: `[M, k] int64`, the rank's expert, -1 where the slot is skipped.
        weights: `[M, k] float32`.
    """

    pipeline: Pipeline
    y: Tensor
    local: Tensor
    weights: Tensor

    @classmethod
    def of(cls, pipeline: Pipeline, x: Tensor | None = None) -> SlotRows:
        """Of a pipeline, and as `slot_outputs` of an input for each slot."""
        weights = pipeline.call.token_final_scales
        rows = cls(pipeline, slot_outputs(pipeline, x), local_of(pipeline), weights)
        return rows if pipeline.rows is None else pipeline.rows(rows)

    @property
    def call(self) -> MoeCall:
        return self.pipeline.call

    def placing(self, places: Tensor, rows: Tensor | float) -> SlotRows:
        """With other rows of GEMM2 at these places in one list of all slots."""
        y = self.y.flatten(0, 1).clone()
        y[places] = rows
        return replace(self, y=y.view_as(self.y))

    def output(self, pipeline: Pipeline) -> Tensor:
        """The output of a pipeline that has these rows."""
        output = finalized(pipeline, self.y, self.local, self.weights)
        return output if pipeline.after is None else pipeline.after(output)


def of_slots(
    family: str, stages: tuple[str, ...], words: str, change: Callable[[SlotRows], SlotRows], cost: float
) -> Hypothesis:
    """A change of the slots' rows, experts or weights."""
    return Hypothesis(family, stages, words, lambda p: p.summing(change), cost, of_rows=change)


def of_sum(
    family: str, stages: tuple[str, ...], words: str, finalize: Callable[..., Tensor], cost: float
) -> Hypothesis:
    """Another weighted sum, called as `Stages.finalize`."""
    return Hypothesis(family, stages, words, lambda p: p.staging(finalize=finalize), cost, of_sum=finalize)


def of_output(
    family: str, stages: tuple[str, ...], words: str, change: Callable[[Tensor], Tensor], cost: float
) -> Hypothesis:
    """A change of the output."""
    return Hypothesis(family, stages, words, lambda p: p.then(change), cost, of_output=change)


def of_first_factor(hypotheses: Iterable[Hypothesis]) -> list[Hypothesis]:
    """Those that are no factor, and of those that are, the ones with the first one's: the simplest of several."""
    chosen = list(hypotheses)
    factor = next((h.factor for h in chosen if h.factor), None)
    return [h for h in chosen if h.factor in (None, factor)]


def local_of(pipeline: Pipeline) -> Tensor:
    """The rank's expert of each slot, `[M, k] int64`."""
    call, select = pipeline.call, pipeline.stages.select_local
    return select(call.token_selected_experts, call.experts.num_experts, call.ep_size, call.ep_rank)


def composed(first: Hypothesis, second: Hypothesis) -> Hypothesis:
    """Both changes at once; one of the slots' rows is put in before one that may compute the output as a whole."""
    one, other = (first, second) if second.of_rows is None or first.of_rows else (second, first)
    likeliest = (*first.stages[:1], *second.stages[:1])
    stages = tuple(dict.fromkeys((*likeliest, *first.stages, *second.stages)))[:2]
    return Hypothesis(
        "two",
        stages,
        f"two things: {first.words}; and {second.words}",
        lambda p: other.change(one.change(p)),
        first.cost + second.cost + 5,
        slow=first.slow or second.slow,
    )


def slot_outputs(pipeline: Pipeline, x: Tensor | None = None) -> Tensor:
    """What GEMM2 gives for each slot, `[M, k, H] bf16`; zeros where the slot is skipped.

    Args:
        pipeline: its weighted sum and what comes after are left out.
        x: `[M, k, H] bf16`, an input for each slot; by default the token's.

    Raises:
        ValueError: its output is computed as a whole.
    """
    pipeline.check_open()
    call = pipeline.call
    tokens, top_k = call.token_selected_experts.shape
    if x is None:
        x = call.input[:, None].expand(-1, top_k, -1)
    local = local_of(pipeline)
    alone = replace(
        call,
        input=x.reshape(tokens * top_k, -1),
        token_selected_experts=local.reshape(-1, 1).to(torch.int32),
        token_final_scales=torch.ones(tokens * top_k, 1, dtype=torch.float32, device=x.device),
        experts=replace(call.experts, fc2_biases=None),  # which checks them
        ep_size=1,
        ep_rank=0,
    )
    stages = replace(pipeline.stages, select_local=KERNEL.select_local, finalize=KERNEL.finalize)
    return forward(alone, replace(stages, round_output=KERNEL.round_output)).view(tokens, top_k, -1)


def finalized(pipeline: Pipeline, y: Tensor, local: Tensor, scales: Tensor) -> Tensor:
    """The output for what GEMM2 gives for each slot."""
    call = pipeline.call
    bias = call.experts.fc2_biases if call.tp_rank == 0 else None
    return pipeline.stages.round_output(pipeline.stages.finalize(y, local, scales, bias))


def roughly(hypothesis: Hypothesis, how: str, part: float, rows: SlotRows | None = None) -> Hypothesis:
    """One that predicts an output so, and in every bit no more than a part of what is wrong.

    Routing weights that are others, not by one factor for all `rows` of a token, are applied to GEMM2's result: there
    or in the sum.
    """
    words = f"{hypothesis.words}, {how} ({int(100 * part)}% of the wrong elements in every bit)"
    stages = () if part < _ANYWHERE.get(hypothesis.family, 0.0) else hypothesis.stages
    if rows is not None and hypothesis.family == "routing weights" and hypothesis.of_rows is not None:
        ratio = (hypothesis.of_rows(rows).weights / rows.weights).masked_fill(rows.local < 0, torch.nan)
        high, low = ratio.nan_to_num(-torch.inf).amax(1), ratio.nan_to_num(torch.inf).amin(1)
        several = (rows.local >= 0).sum(1) > 1
        if bool((several & (high > _UNLIKE * low.clamp(min=0))).any()):
            stages = ("finalize", "fc2")
    return replace(hypothesis, words=words, stages=stages, name="", kind=hypothesis.kind or hypothesis.words)
