"""Hypotheses on biases and SwiGLU parameters that are not those of a row's expert, nor a bias' those of a column."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from mxfp4ref.conformance.families.hypothesis import Hypothesis, SlotRows, of_slots
from mxfp4ref.conformance.reduction import is_heavy
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import MoeTrace, trace
from mxfp4ref.sm90.elementwise import activate, to_bf16
from mxfp4ref.sm90.gemm.cpu import group_scaled_gemm

__all__ = ["row_parameter_hypotheses"]

_SWIGLU = ("swiglu_alpha", "swiglu_beta", "swiglu_limit")
_TILES, _SHARED = (256, 128, 64), (8, 16, 32, 64, 128)  # columns of a tile; rows of which each has its own
_Given = dict[str, Tensor | None]  # the bias and the parameters, by row
_NUMBERS: tuple[
    tuple[str, Callable[[MoeTrace], Tensor], bool], ...
] = (  # of a row, and whether of other tokens too
    ("the slot's place in its token", lambda rows: rows.slot, False),
    ("the token's number", lambda rows: rows.token, True),
    ("the row's number among those of its expert", lambda rows: _position(rows), True),
    ("the row's number in the sorted order", lambda rows: torch.arange(len(rows.token)), True),
)


def row_parameter_hypotheses(call: MoeCall) -> Iterator[Hypothesis]:
    """Of each parameter that the experts have, of those of the SwiGLU at once, and of all."""
    experts = call.experts
    given = [name for name in ("fc1_biases", *_SWIGLU) if getattr(experts, name) is not None]
    if not given or is_heavy(call) or not experts.quantized:
        return
    swiglu = [name for name in given if name != "fc1_biases"]
    chosen = {tuple(some): None for some in (*([name] for name in given), swiglu, given) if some}
    for words, number, across in _NUMBERS:
        for names in chosen if experts.num_experts > 1 else ():
            told = f"{_words(names)} indexed by {words} instead of the expert"
            yield _of_rows(told, names, _as_expert(names, number), across_tokens=across)
        for tile in (2 * experts.intermediate_size, *_TILES) if experts.fc1_biases is not None else ():
            for rows in sorted({r for r in (*_SHARED, tile) if r <= tile}) if across else ():
                told = (
                    f"the fc1 bias is indexed along the rows: all columns of each {tile} get that of the column "
                    f"whose number among them is {words}, modulo {rows}"
                )
                yield _of_rows(told, ("fc1_biases",), _along_rows(tile, rows, number), across_tokens=across)


def _words(names: tuple[str, ...]) -> str:
    parameters = [name[7:] for name in names if name in _SWIGLU]
    swiglu = f"the SwiGLU {' and '.join(p + 's' for p in parameters)}" if parameters else ""
    return " and ".join([*["the fc1 biases"] * ("fc1_biases" in names), *[swiglu] * bool(swiglu)]) + " are"


def _of_rows(
    words: str,
    names: tuple[str, ...],
    change: Callable[[MoeTrace, MoeCall, _Given], _Given],
    *,
    across_tokens: bool,
) -> Hypothesis:
    def run(rows: SlotRows) -> SlotRows:
        call, right = rows.call, trace(rows.call)
        bias = call.experts.fc1_biases
        tensors = {name: getattr(call.experts, name) for name in call.activation.defaults}
        given: _Given = {name: None if t is None else t[right.expert, None] for name, t in tensors.items()}
        given["fc1_biases"] = None if bias is None else bias[right.expert]
        given = change(right, call, given)
        bias = given.pop("fc1_biases")
        activation = to_bf16(activate(call.activation, right.fc1_output, bias, list(given.values())))
        y = rows.y.clone()
        for expert in torch.unique(right.expert).tolist():
            mine = right.expert == expert
            codes, scales = call.experts.weights("fc2", expert)
            assert scales is not None
            product = group_scaled_gemm(
                activation[None, mine],
                codes,
                scales,
                tactic=call.kernel.tactics[1],
                generation=call.kernel.generation,
            )
            y[right.token[mine], right.slot[mine]] = to_bf16(product[0])
        return replace(rows, y=y)

    stages = ("activation", *["fc1"] * ("fc1_biases" in names))
    return replace(of_slots("activation", stages, words, run, 1.5), across_tokens=across_tokens)


def _as_expert(
    names: tuple[str, ...], number: Callable[[MoeTrace], Tensor]
) -> Callable[[MoeTrace, MoeCall, _Given], _Given]:
    def change(rows: MoeTrace, call: MoeCall, given: _Given) -> _Given:
        index = number(rows) % call.experts.num_experts
        taken = {n: t[index] for n in names if (t := getattr(call.experts, n)) is not None and n in given}
        return given | {name: t if name == "fc1_biases" else t[:, None] for name, t in taken.items()}

    return change


def _along_rows(
    tile: int, rows: int, number: Callable[[MoeTrace], Tensor]
) -> Callable[[MoeTrace, MoeCall, _Given], _Given]:
    def change(right: MoeTrace, call: MoeCall, given: _Given) -> _Given:
        bias = given["fc1_biases"]
        assert bias is not None
        columns = torch.arange(bias.shape[1]) // tile * tile + number(right)[:, None] % rows
        return given | {"fc1_biases": bias.gather(1, columns.clamp(max=bias.shape[1] - 1))}

    return change


def _position(rows: MoeTrace) -> Tensor:
    return torch.arange(len(rows.expert)) - torch.searchsorted(rows.expert, rows.expert)
