"""The findings on W4A8 calls that no named defect predicts: factors on the experts' residuals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor

from mxfp4ref._default_device import on_cpu
from mxfp4ref.conformance.comparison import differing
from mxfp4ref.conformance.findings.finding import Finding, in_words
from mxfp4ref.conformance.findings.reduction import one_token
from mxfp4ref.formats.humming import COMPENSATION
from mxfp4ref.formats.humming_experts import HummingExperts
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import forward

__all__ = ["residual_finding"]

_EXPONENTS = (*(sign * n for n in range(1, 9) for sign in (1, -1)), 12, -12)
_WHY = {
    COMPENSATION: "their factor of 64 is applied twice",
    1 / COMPENSATION: "their factor of 64 is left out",
}
_PLACES = (("fc1",), ("fc2",), ("fc1", "fc2"))


def residual_finding(
    call: MoeCall, outputs: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> Finding | None:
    """Which residuals are off by which power of two, where that predicts every bit; None where none does.

    Args:
        call: with `HummingExperts`.
        outputs, expected: the kernel's and the right `output`.
    """
    got = outputs["output"]
    token = int(differing(got, expected["output"]).sum(1).argmax())
    with on_cpu():
        one = one_token(call, token)
        found = [
            (stages, words)
            for stages, words, change in _changes()
            if not bool(differing(forward(change(one)), got[token : token + 1]).any())
            and not bool(differing(forward(change(call)), got).any())
        ]
    if not found:
        return None
    hypotheses = tuple(words for _, words in found)
    return Finding(found[0][0], in_words(hypotheses), True, hypotheses=hypotheses)


class _Scaled:
    """A change of a call: residuals of these GEMMs times a power of two."""

    def __init__(self, stages: tuple[str, ...], exponent: int) -> None:
        self._names, self._factor = [f"{stage}_residual" for stage in stages], 2.0**exponent

    def __call__(self, call: MoeCall) -> MoeCall:
        assert isinstance(call.experts, HummingExperts)
        scaled = {name: getattr(call.experts, name) * self._factor for name in self._names}
        return replace(call, experts=replace(call.experts, **scaled))


def _changes() -> Iterator[tuple[tuple[str, ...], str, _Scaled]]:
    for exponent in _EXPONENTS:
        factor = f"{2**exponent}x" if exponent > 0 else f"1/{2**-exponent} of"
        note = _WHY.get(2.0**exponent, f"an exponent {abs(exponent)} too {'high' if exponent > 0 else 'low'}")
        for stages in _PLACES:
            words = f"the residuals of {' and '.join(stages)} are {factor} what they should be: {note}"
            yield stages, words, _Scaled(stages, exponent)
