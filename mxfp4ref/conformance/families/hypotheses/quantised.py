"""Hypotheses on what goes from stage to stage as FP8, int8 or FP4: with a scale for each block, row or tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor
from torch.nn.functional import pad

from mxfp4ref.conformance.families.hypotheses.narrow_types import Narrow, narrowings
from mxfp4ref.conformance.families.hypotheses.roundings import PLACES
from mxfp4ref.conformance.families.hypothesis import Hypothesis, Pipeline
from mxfp4ref.conformance.findings.reduction import is_heavy
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import trace
from mxfp4ref.sm90 import fp32

__all__ = ["quantised_hypotheses"]

_SPANS = {**{f"each {n}": n for n in (128, 32, 64, 16)}, "each row": 0}
_OPERANDS = ("the input is", "the activation is")
_Change = Callable[[Pipeline], Callable[[Tensor], Tensor]]


def quantised_hypotheses(call: MoeCall) -> Iterator[Hypothesis]:
    """The input, a GEMM's output, the activation or the output, quantised and dequantised to bf16."""
    whole = _Whole(call)
    for place, (stages, put) in _PLACES.items():
        for narrow in narrowings():
            if narrow.of_operands and place not in _OPERANDS:
                continue
            yield from (
                _at(place, stages, put, narrow, span, _by_block(size)) for span, size in _SPANS.items()
            )
            if place in _OPERANDS and not is_heavy(call):
                yield _at(place, stages, put, narrow, "the whole tensor", whole.of(place))


def _at(
    place: str,
    stages: tuple[str, ...],
    put: Callable[[Pipeline, Callable[[Tensor], Tensor]], Pipeline],
    narrow: Narrow,
    span: str,
    spread: Callable[[Narrow], _Change],
) -> Hypothesis:
    return Hypothesis(
        "rounding",
        stages,
        f"{place} {narrow.words(span)}",
        lambda p: put(p, spread(narrow)(p)),
        narrow.cost + 0.1 * (len(stages) > 1),
        variants=tuple(_at(place, stages, put, way, span, spread) for way in narrow.ways()),
    )


def _by_block(size: int) -> Callable[[Narrow], _Change]:
    """Of each so many numbers, the last block may be shorter; of each row if that is 0."""

    def blocks(narrow: Narrow) -> _Change:
        def change(x: Tensor) -> Tensor:
            wide = size or x.shape[-1]
            parts = pad(x, (0, -x.shape[-1] % wide)).reshape(len(x), -1, wide)
            found = narrow(parts, parts.abs().amax(-1, keepdim=True)).flatten(-2)
            return found[..., : x.shape[-1]].contiguous()

        return lambda p: change

    return blocks


def _input(p: Pipeline, change: Callable[[Tensor], Tensor]) -> Pipeline:
    return p.calling(input=fp32.to_bf16(change(fp32.widen(p.call.input))))


def _staged(stage: str) -> Callable[[Pipeline, Callable[[Tensor], Tensor]], Pipeline]:
    return lambda p, change: p.staging(**{stage: lambda x: fp32.to_bf16(change(x))})


def _operands(p: Pipeline, change: Callable[[Tensor], Tensor]) -> Pipeline:
    return _staged("round_activation")(_input(p, change), change)


_PLACES: dict[str, tuple[tuple[str, ...], Callable[[Pipeline, Callable[[Tensor], Tensor]], Pipeline]]] = {
    "the input is": (("input",), _input),
    **{words: (stages[:1], _staged(stage)) for stage, words, stages in PLACES},
    "the input and the activation are, as of a GEMM of 8-bit operands,": (("input", "activation"), _operands),
}


class _Whole:
    """The largest numbers of a call's input and activation, for those of its tokens too that are taken alone."""

    def __init__(self, call: MoeCall) -> None:
        self.call = call
        self.known: tuple[Tensor, ...] = ()

    def of(self, place: str) -> Callable[[Narrow], _Change]:
        number = _OPERANDS.index(place)

        def changed(narrow: Narrow, p: Pipeline) -> Callable[[Tensor], Tensor]:
            largest = self.largest(p.call)[number]
            return lambda x: narrow(x, largest)

        return lambda narrow: lambda p: changed(narrow, p)

    def largest(self, call: MoeCall) -> tuple[Tensor, ...]:
        if not bool((call.input[:, None] == self.call.input).all(2).any(1).all()):
            return _largest(call)
        self.known = self.known or _largest(self.call)
        return self.known


def _largest(call: MoeCall) -> tuple[Tensor, ...]:
    return tuple(fp32.widen(t.contiguous()).abs().max() for t in (call.input, trace(call).activation))
