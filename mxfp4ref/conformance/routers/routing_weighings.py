"""What a router may make of the scores of the experts that it has selected."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mxfp4ref.conformance.routers.routing_hypotheses import SCORES, View, rounded, to_float32

__all__ = ["NORMALIZATIONS", "Weighing", "weighings"]


def _over(total: Tensor, selected: Tensor) -> Tensor:
    return selected / total.unsqueeze(1)


_NONE = "not at all"
_NO_EPSILON = "over their sum without epsilon"
# From all scores [T, E], those of the selected experts [T, k] and epsilon to weights before the factor.
NORMALIZATIONS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "over their sum": lambda every, s, epsilon: _over(s.sum(1) + epsilon, s),
    "as softmax": lambda every, s, epsilon: s.softmax(1),
    _NONE: lambda every, s, epsilon: s,
    "over the sum of all experts": lambda every, s, epsilon: _over(every.sum(1), s),
    _NO_EPSILON: lambda every, s, epsilon: _over(s.sum(1), s),
    "over their sum and then by softmax": lambda every, s, epsilon: _over(s.sum(1), s).softmax(1),
    "by softmax twice": lambda every, s, epsilon: s.softmax(1).softmax(1),
    "over the largest of them": lambda every, s, epsilon: _over(s.amax(1), s),
    "over the first of them": lambda every, s, epsilon: _over(s[:, 0], s),
    "over the root of the sum of their squares": lambda every, s, epsilon: _over(s.square().sum(1).sqrt(), s),
    "over the sum of all but the last": lambda every, s, epsilon: _over(s[:, :-1].sum(1), s),
    "over the sum of one more": lambda every, s, epsilon: _over(_one_more(every, s), s),
}


def _one_more(every: Tensor, selected: Tensor) -> Tensor:
    return every.topk(min(selected.shape[1] + 1, every.shape[1])).values.sum(1)


@dataclass(frozen=True)
class Weighing:
    """A way to weigh selected experts; see `Selection`.

    Attributes:
        score, logits: as in `Selection`.
        bias: whether the scores are those with the bias.
        scores: "" or what the scores are rounded to.
        normalization: of `NORMALIZATIONS`; "" for the right one.
    """

    score: str = ""
    logits: str = ""
    bias: bool = False
    scores: str = ""
    normalization: str = ""
    changes: int = field(default=0, compare=False)

    def weights(self, view: View, ids: Tensor) -> Tensor:
        """Before the factor, `[T, k]` for these ids."""
        every = view.scores(self.score or view.right_score, self.logits)
        every = rounded(to_float32(every + view.bias) if self.bias else every, self.scores)
        right = "as softmax" if view.preset.normalize == "softmax" else "over their sum"
        return NORMALIZATIONS[self.normalization or right](every, every.gather(1, ids), view.preset.epsilon)

    def words(self, view: View) -> list[str]:
        right = "as softmax" if view.preset.normalize == "softmax" else "over their sum"
        found = {
            f"weights are made of {self.score} instead of {view.right_score}": bool(self.score),
            f"logits are rounded to {self.logits}": bool(self.logits),
            "weights are made of the scores with the correction bias": self.bias,
            f"scores are rounded to {self.scores}": bool(self.scores),
            f"weights are normalised {self.normalization} instead of {right}": bool(self.normalization),
        }
        if view.preset.normalize != "softmax" or self.score:
            normalization = self.normalization or right
            twice = (self.score or view.right_score, normalization) == ("softmax(logits)", "as softmax")
            found["softmax is applied twice"] = twice
        found["weights are not normalised"] = self.normalization == _NONE
        if self.normalization == _NO_EPSILON and right == "over their sum":
            found.pop(f"weights are normalised {_NO_EPSILON} instead of {right}")
            found[f"the {view.preset.epsilon:g} that is added to the sum in the denominator is left out"] = (
                True
            )
        found.pop(f"weights are normalised {_NONE} instead of {right}", None)
        return [words for words, applies in found.items() if applies]


def weighings(view: View) -> Iterator[Weighing]:
    """The right weights, then wrong ones by how much is changed, up to two parts."""
    right = "as softmax" if view.preset.normalize == "softmax" else "over their sum"
    parts: dict[str, list[Any]] = {
        "normalization": [name for name in NORMALIZATIONS if name != right],
        "bias": [True] if view.biased else [],
        "score": [name for name in SCORES if name not in (view.right_score, "-logit")],
        "logits": ["bf16", "fp16"],
        "scores": ["bf16", "fp16"],
    }
    made: list[dict[str, Any]] = [{}]
    for name, values in parts.items():
        made += [{**one, name: value} for one in made if len(one) < 2 for value in values]
    for one in sorted(made, key=len):
        yield Weighing(**one, changes=len(one))
