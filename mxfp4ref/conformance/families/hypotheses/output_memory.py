"""Hypotheses on the memory that the output is written to, which holds the input or another row and is not cleared."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mxfp4ref._words import shortened
from mxfp4ref.conformance.families.hypothesis import Change, Hypothesis, Pipeline, SlotRows, local_of
from mxfp4ref.conformance.findings.finding import Evidence, counted
from mxfp4ref.model.call import MoeCall
from mxfp4ref.sm90 import fp32

__all__ = ["memory_hypotheses", "rows_of_the_input"]

_F = ("finalize",)
_KEPT = ("finalize", "slots")
_Which = Callable[[MoeCall, Tensor], Tensor]  # of a call and its local experts, tokens


def memory_hypotheses(call: MoeCall) -> Iterator[Hypothesis]:
    """Sums on top of the input, and rows that are not written."""
    if call.input.dtype == torch.bfloat16 and call.input.shape[1] == call.experts.hidden_size:
        for sign, how in ((1, "added onto"), (-1, "subtracted from")):
            for rounding, total, cost in (
                ("before the rounding to bf16", _computing(_unrounded, sign), 1.2),
                ("after the rounding to bf16", _rounded(sign), 1.2),
                ("slot by slot", _computing(_from_the_input, sign), 1.3),
            ):
                yield Hypothesis(
                    "output",
                    _F,
                    f"the output is {how} the input (hidden states), {rounding}: it is written in place over the "
                    "input, or a residual is added",
                    total,
                    cost + 0.2 * (sign < 0),
                )
    kinds: tuple[tuple[str, _Which], ...] = (
        ("tokens without an expert on this rank", lambda c, local: (local < 0).all(1)),
        ("tokens whose slots are all padding (-1)", lambda c, local: (c.token_selected_experts < 0).all(1)),
        ("tokens whose routing weights are all zero", lambda c, local: (c.token_final_scales == 0).all(1)),
    )
    for number, (words, which) in enumerate(kinds):
        if not bool(which(call, local_of(Pipeline(call))).any()):
            continue
        for kept, source in (
            ("their row of the input (hidden states)", lambda p, out: p.call.input),
            ("the row of the output that the token before them has", lambda p, out: out.roll(1, 0)),
            ("the first row of the output", lambda p, out: out[:1].expand_as(out)),
        ):
            yield Hypothesis(
                "output",
                _KEPT,
                f"{words} keep {kept}, where zeros belong: their rows are not written",
                _keeping(which, source),
                1.1 + 0.1 * number,
                across_tokens="of the output" in kept,
            )


def _keeping(which: _Which, source: Callable[[Pipeline, Tensor], Tensor]) -> Change:
    def on(pipeline: Pipeline) -> Pipeline:
        chosen = which(pipeline.call, local_of(pipeline))[:, None]
        return pipeline.then(lambda out: torch.where(chosen, source(pipeline, out), out))

    return on


def _signed(call: MoeCall, sign: int) -> Tensor:
    return fp32.widen(call.input.contiguous()) * sign


def _rounded(sign: int) -> Change:
    def on(pipeline: Pipeline) -> Pipeline:
        more = _signed(pipeline.call, sign)
        return pipeline.then(lambda out: fp32.to_bf16(fp32.add(more, fp32.widen(out))))

    return on


def _computing(run: Callable[[Pipeline, int], Tensor], sign: int) -> Change:
    return lambda p: p.computing(lambda inside: run(inside, sign))


def _unrounded(inside: Pipeline, sign: int) -> Tensor:
    sums = SlotRows.of(inside).output(inside.staging(round_output=lambda sums: sums))
    return inside.stages.round_output(fp32.add(sums, _signed(inside.call, sign)))


def _from_the_input(inside: Pipeline, sign: int) -> Tensor:
    """The sum begins with the input."""
    call, rows = inside.call, SlotRows.of(inside)
    bias = call.experts.fc2_biases if call.tp_rank == 0 else None
    total = _signed(call, sign)
    for slot in range(call.top_k):
        local, row = rows.local[:, slot], fp32.widen(rows.y[:, slot].contiguous())
        if bias is not None:
            row = fp32.add(row, fp32.widen(bias[local.clamp(min=0)]))
        weight = rows.weights[:, slot, None].expand_as(row).contiguous()
        total = torch.where(local[:, None] >= 0, fp32.fma(weight, row, total), total)
    return inside.stages.round_output(total)


def rows_of_the_input(call: MoeCall, got: Tensor, wrong: Tensor) -> Evidence | None:
    """Whether every row that differs is a row of the input, bit by bit, and whose.

    Args:
        call: the call.
        got: `[M, H] bf16`.
        wrong: `[M, H] bool`.
    """
    if call.input.dtype != got.dtype or call.input.shape != got.shape:
        return None
    own, written = _bytes(call.input), _bytes(got)
    tokens = wrong.any(1).nonzero().flatten().tolist()
    first = {row: token for token, row in reversed(list(enumerate(own)))}
    sources = {t: t if written[t] == own[t] else first.get(written[t], -1) for t in tokens}
    if not tokens or -1 in sources.values() or not all(bool(got[t].any()) for t in tokens):
        return None
    if all(t == source for t, source in sources.items()):
        which = f"{counted(len(tokens), 'token')} ({shortened(map(str, tokens), 6)})"
    else:
        which = ", ".join(f"token {t} has token {s}'s" for t, s in list(sources.items())[:4])
    kind = "rows of the output are rows of the input (hidden states), unchanged"
    return Evidence.of_kind(
        ("finalize", "slots"),
        kind,
        f"{which}; the output shares memory with the input and is not written there",
        3,
    )


def _bytes(rows: Tensor) -> list[bytes]:
    return [bytes(row.numpy()) for row in rows.detach().cpu().contiguous().view(torch.uint8)]
