"""What a router may do instead of the right thing: scores and selection; `routing_weighings.py` has the weights.

Everything is float64, rounded to float32 where a router rounds; what follows from a hypothesis is compared to within
a few float32 ulp, which is more than any correct evaluation needs and thousands of times less than what is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mxfp4ref.conformance.bounds.router_bounds import given_factor, preset_of, selectable
from mxfp4ref.routing import scoring
from mxfp4ref.routing.models import Preset

__all__ = ["SCORES", "Selection", "View", "near", "rounded", "rows_of_the_table", "selections", "to_float32"]

_ULPS = 8 * 2.0**-23  # relative
_FURTHEST = 4  # tokens away, whose row of a table may be taken

SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid(logit)": torch.sigmoid,
    "softplus(logit)": lambda x: _softplus(x),
    "sqrt(softplus(logit))": lambda x: to_float32(_softplus(x)).sqrt(),
    "logit": lambda x: x,
    "softmax(logits)": lambda x: x.softmax(1),
    "exp(logit)": torch.exp,
    "softmax(softmax(logits))": lambda x: x.softmax(1).softmax(1),
    "sqrt(sigmoid(logit))": lambda x: x.sigmoid().sqrt(),
    "sigmoid(sigmoid(logit))": lambda x: x.sigmoid().sigmoid(),
    "softplus(logit) without its linear part": lambda x: (1 + x.exp()).log().nan_to_num(posinf=math.inf),
    "relu(logit)": lambda x: x.clamp_min(0),
    "silu(logit)": lambda x: x * x.sigmoid(),
    "tanh(logit)": torch.tanh,
    "-logit": lambda x: -x,
}
_RIGHT_SCORES: dict[Callable[..., Tensor], str] = {
    scoring.raw_logits: "logit",
    scoring.sigmoid: "sigmoid(logit)",
    scoring.softmax: "softmax(logits)",
    scoring.sqrt_softplus: "sqrt(softplus(logit))",
}
_ROUNDINGS = {"": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def _softplus(x: Tensor) -> Tensor:
    return torch.nn.functional.softplus(x, threshold=scoring.SOFTPLUS_THRESHOLD)


def to_float32(x: Tensor) -> Tensor:
    return x.to(torch.float32).to(torch.float64)


def rounded(x: Tensor, name: str) -> Tensor:
    dtype = _ROUNDINGS[name]
    return x if dtype is None else x.to(dtype).to(torch.float64)


def near(got: Tensor, expected: Tensor, relative: float = _ULPS) -> Tensor:
    """Where two float64 tensors are equal to within a few float32 ulp, or both NaN."""
    close = ((got - expected).abs() <= relative * expected.abs() + 2.0**-126) & expected.isfinite()
    return close | (got == expected) | (got.isnan() & expected.isnan())


@dataclass(frozen=True, eq=False)
class View:
    """The inputs of a routing case for the rows that are tokens.

    Attributes:
        preset: the right router.
        logits: `[T, E] float64`.
        bias: `[E] float64`, zeros where there is none.
        top_k, n_group, topk_group: as the right router has them.
        factor: the routed scaling factor; 1 where the weights are not to contain it.
        given: the same where it belongs to the output.
        table, token_ids: of a hash layer, or None.
        places: `[T]`, of the tokens in the batch.
    """

    preset: Preset
    logits: Tensor
    bias: Tensor
    top_k: int
    n_group: int
    topk_group: int
    factor: float
    given: float
    table: Tensor | None
    token_ids: Tensor | None
    places: Tensor

    @classmethod
    def of(cls, inputs: Mapping[str, Any], rows: Tensor) -> View:
        """Of a golden case's inputs; `rows [M] bool` are the tokens."""
        preset = preset_of(inputs)
        logits = inputs["logits"].cpu().to(torch.float64)
        bias, table, token_ids = (inputs.get(name) for name in ("correction_bias", "tid2eid", "token_ids"))
        factor = given_factor(inputs, preset)
        in_weights = inputs.get("routed_scaling", "in_weights") == "in_weights"
        return cls(
            preset,
            logits[rows],
            torch.zeros(logits.shape[1], dtype=torch.float64)
            if bias is None
            else bias.cpu().to(torch.float64),
            inputs.get("top_k", preset.top_k),
            inputs.get("n_group", preset.n_group),
            inputs.get("topk_group", preset.topk_group),
            factor if in_weights else 1.0,
            factor,
            None if table is None else table.cpu().long(),
            None if token_ids is None else token_ids.cpu().long()[rows],
            rows.nonzero().flatten(),
        )

    def take(self, rows: Tensor) -> View:
        """Some of the tokens."""
        token_ids = None if self.token_ids is None else self.token_ids[rows]
        return replace(self, logits=self.logits[rows], token_ids=token_ids, places=self.places[rows])

    @property
    def right_score(self) -> str:
        return _RIGHT_SCORES[self.preset.score]

    @property
    def biased(self) -> bool:
        return bool(self.bias.any())

    def selectable(self, ids: Tensor) -> Tensor:
        """Which tokens' ids a correct router may select, `[T] bool`."""
        return selectable(self.preset, self.logits, self.bias, ids, (self.n_group, self.topk_group))

    def scores(self, name: str, logits: str = "") -> Tensor:
        """Scores `[T, E]` as float32 code has them, of logits rounded to `logits`."""
        return to_float32(SCORES[name](rounded(self.logits, logits)))


@dataclass(frozen=True)
class Selection:
    """A way to select experts; the defaults, with the right score, are right.

    Attributes:
        score: of `SCORES`; "" for the right one.
        logits, scores: "" or what logits and scores are rounded to.
        bias: how often the bias is added.
        bias_type: "" or what the bias is rounded to.
        early: whether it is added to the logits instead of the scores.
        shift: of whose bias: expert e gets that of expert e + shift.
        group_bias: how often it is added in the scores of groups; None for as often.
        groups: (n_group, topk_group) or None for the right ones.
        best: how many experts' scores make a group's.
        outside: the score of experts outside the groups.
        moved: how many groups further on than the best ones those are that take part.
        interleaved: whether expert e is of group e modulo n_group.
        skipped: how many of the best experts are passed over.
        high: whether ties go to the higher id.
        among: of which experts, (first, last).
    """

    score: str = ""
    logits: str = ""
    scores: str = ""
    bias: float = 1
    bias_type: str = ""
    early: bool = False
    shift: int = 0
    group_bias: int | None = None
    groups: tuple[int, int] | None = None
    best: int = 2
    outside: float = -math.inf
    moved: int = 0
    interleaved: bool = False
    skipped: int = 0
    high: bool = False
    among: tuple[int, int] | None = None

    def keys(self, view: View) -> Tensor:
        """What the experts are ordered by, `[T, E]`."""
        bias = rounded(self.bias * view.bias.roll(-self.shift), self.bias_type)
        if self.early:
            view = replace(view, logits=to_float32(view.logits + bias))
        scores = rounded(view.scores(self.score or view.right_score, self.logits), self.scores)
        keys = scores if self.early else to_float32(scores + bias)
        if self.among is not None:
            experts = torch.arange(keys.shape[1])
            keys = keys.masked_fill((experts < self.among[0]) | (experts > self.among[1]), -math.inf)
        n_group, topk_group = self.groups or (view.n_group, view.topk_group)
        if n_group == 1:
            return keys
        by_group = self._by_group(keys, n_group)
        of_groups = by_group
        if self.group_bias is not None:
            of_groups = self._by_group(to_float32(scores + self.group_bias * view.bias), n_group)
        totals = to_float32(of_groups.topk(min(self.best, by_group.shape[2])).values.sum(2))
        chosen = _first(totals, topk_group, self.high)
        inside = torch.zeros_like(totals, dtype=torch.bool).scatter_(1, chosen, True).roll(self.moved, 1)
        limited = by_group.masked_fill(~inside[..., None], self.outside)
        return (limited.mT if self.interleaved else limited).flatten(1)

    def _by_group(self, keys: Tensor, n_group: int) -> Tensor:
        return keys.view(len(keys), -1, n_group).mT if self.interleaved else keys.view(len(keys), n_group, -1)

    def agrees(self, view: View, ids: Tensor) -> Tensor:
        """Which tokens' ids it selects, to within scores a few ulp apart unless ties are what it is about."""
        keys = self.keys(view)
        chosen = _first(keys, ids.shape[1] + self.skipped, self.high)[:, self.skipped :]
        if self.high or self.outside != -math.inf:
            return (chosen == ids).all(1)
        inside = ((ids >= 0) & (ids < keys.shape[1])).all(1)
        known = ids.clamp(0, keys.shape[1] - 1)
        distinct = (known.sort(dim=1).values.diff(dim=1) != 0).all(1)
        return inside & distinct & near(keys.gather(1, known), keys.gather(1, chosen)).all(1)

    def words(self, view: View) -> list[str]:
        """What is wrong about it."""
        n_group, topk_group = self.groups or (0, 0)
        found = {
            f"scores are {self.score} instead of {view.right_score}": bool(self.score),
            f"logits are rounded to {self.logits}": bool(self.logits),
            f"scores are rounded to {self.scores}": bool(self.scores),
            "the correction bias is left out of the selection": self.bias == 0,
            "the correction bias is subtracted in the selection": self.bias == -1,
            "the correction bias is added twice in the selection": self.bias == 2,
            f"the correction bias is rounded to {self.bias_type} (loaded in another dtype) in the selection": bool(
                self.bias_type
            ),
            "the correction bias is added to the logits, before they become scores, in the selection": self.early,
            f"an expert's correction bias is that of the expert {_signed(self.shift)} it": self.shift != 0,
            "groups are scored without the correction bias, which only their experts get": self.group_bias
            == 0,
            "groups are scored with it": self.group_bias == 1,
            "the correction bias is added twice in the scores of groups": self.group_bias == 2,
            "the selection is not limited to groups": n_group == 1,
            f"{topk_group} of {n_group} groups take part instead of {view.topk_group} of {view.n_group}": n_group
            > 1,
            "a group's score is its best expert's instead of the sum of its two best": self.best == 1,
            f"a group's score is the sum of its {self.best} best instead of its two best": self.best > 2,
            f"experts outside the groups get the score {self.outside:g}": self.outside != -math.inf,
            f"the groups {_signed(self.moved)} (shifted) take part instead of the best": self.moved != 0,
            "groups are made of every n-th expert instead of neighbours": self.interleaved,
            f"the best {self.skipped} of the experts are passed over": self.skipped > 0,
            "ties are broken to the higher id instead of the lower": self.high,
        }
        if self.among is not None:
            first, last = self.among
            found[f"the last experts are never selected: those above {last}"] = (
                last < view.logits.shape[1] - 1
            )
            found[f"the first experts are never selected: those below {first}"] = first > 0
        return [words for words, applies in found.items() if applies]


def _signed(shift: int) -> str:
    return f"{abs(shift)} {'after' if shift > 0 else 'before'}"


def _first(keys: Tensor, count: int, high: bool) -> Tensor:
    """The indices of the largest keys, ties to the lower index, or to the higher one."""
    if not high:
        return keys.sort(dim=1, descending=True, stable=True).indices[:, :count]
    return keys.shape[1] - 1 - keys.flip(1).sort(dim=1, descending=True, stable=True).indices[:, :count]


def selections(view: View) -> Iterator[tuple[int, Selection]]:
    """Wrong selections, one change first, then two, and how many changes there are."""
    changes: list[dict[str, Any]] = [{"high": True}, {"skipped": 1}]
    if view.biased:
        changes += [{"bias": 0}, {"bias": -1}, {"bias": 2}, {"shift": 1}, {"shift": -1}]
        changes += [{"early": True}, {"bias_type": "bf16"}, {"bias_type": "fp16"}]
    size = view.logits.shape[1]
    if view.n_group > 1:
        counts = [(1, 1), *((view.n_group, n) for n in range(1, view.n_group) if n != view.topk_group)]
        counts += [
            (n, t)
            for n in (view.n_group // 2, 2 * view.n_group)
            for t in (view.topk_group // 2, view.topk_group)
        ]
        valid = [(n, t) for n, t in counts if n and t and size % n == 0 and t * (size // n) >= view.top_k]
        changes += [{"groups": one} for one in valid if one[0] == 1 or size // one[0] > 1]
        changes += [{"best": 1}, {"best": 3}, {"best": size // view.n_group}, {"outside": 0.0}]
        changes += [{"group_bias": n} for n in (0, 2) if view.biased]
        changes += [{"bias": 0, "group_bias": 1}] * view.biased
        changes += [{"moved": 1}, {"moved": -1}, {"interleaved": True}]
    changes += [{name: dtype} for name in ("logits", "scores") for dtype in ("bf16", "fp16")]
    changes += [{"score": name} for name in SCORES if name != view.right_score]
    for one in changes:
        yield 1, Selection(**one)
    for index, one in enumerate(changes):
        for other in changes[index + 1 :]:
            if not one.keys() & other.keys():
                yield 2, Selection(**one, **other)


def rows_of_the_table(view: View, ids: Tensor) -> Iterator[str]:
    """Which rows of the table of token ids the ids are, if not the right ones."""
    assert view.table is not None
    assert view.token_ids is not None
    rows = {f"token id {shift:+d}": view.table.roll(-shift, 0)[view.token_ids] for shift in (1, -1)}
    rows["the token's place in the batch"] = view.table[view.places % len(view.table)]
    for words, taken in rows.items():
        if torch.equal(taken, ids):
            yield f"the table's row of {words} is taken"
    for shift in range(1, min(_FURTHEST, len(ids) - _FURTHEST) + 1):
        before, after = slice(None, -shift), slice(shift, None)
        for here, there, way in ((before, after, "ahead"), (after, before, "behind")):
            if torch.equal(view.table[view.token_ids[there]], ids[here]):
                tokens = "next" if way == "ahead" else "previous"
                which = f"the {tokens} token's" if shift == 1 else f"those {shift} tokens {way}"
                yield f"the table is looked up with other tokens' ids, {which}: shifted by {shift}"
