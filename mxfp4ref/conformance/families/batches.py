"""Many hypotheses on the experts' tensors and the activation, computed by one forward: each has its own experts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from itertools import islice

import torch
from torch import Tensor

from mxfp4ref.conformance.families.hypothesis import FAILURES, Hypothesis, Pipeline, local_of
from mxfp4ref.formats.experts import Experts
from mxfp4ref.model.forward import KERNEL
from mxfp4ref.sm90.activation import Activation

__all__ = ["each", "one_thread"]

_AT_ONCE = 32
_BYTES = 1 << 24  # of the experts of one forward
_ROWS = 256  # which the activation takes at once
_NAMES = tuple(field.name for field in fields(Experts))


@contextmanager
def one_thread() -> Iterator[None]:
    """Small tensors are computed faster by one thread than by many that wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def each(
    part: Pipeline, hypotheses: Iterable[Hypothesis], compute: Callable[[Pipeline], Tensor]
) -> Iterator[tuple[Hypothesis, Tensor | None]]:
    """What `compute` gives for each hypothesis, `[1, ...]`; None where it is not defined.

    Args:
        part: the right pipeline; those of one token are computed some at a time.
        hypotheses: any.
        compute: `Pipeline.run` or `slot_outputs`.
    """
    local = local_of(part)
    if len(local) != 1 or part.stages.select_local is not KERNEL.select_local or not bool((local >= 0).any()):
        for one in hypotheses:
            yield one, _computed(one, part, compute)
        return
    used = local[0][local[0] >= 0]
    size = sum(t.nbytes for n in _NAMES if (t := getattr(part.call.experts, n)) is not None)
    size = size // part.call.experts.num_experts * len(used)
    rest = iter(hypotheses)
    while some := list(islice(rest, max(1, min(_AT_ONCE, _BYTES // size, _ROWS // len(used))))):
        alike: dict[tuple[bool, ...], list[tuple[Hypothesis, Pipeline]]] = {}
        for one in some:
            if (changed := _reduced(part, one, used)) is None:
                yield one, _computed(one, part, compute)
            else:
                given = tuple(getattr(changed.call.experts, n) is None for n in _NAMES)
                alike.setdefault(given, []).append((one, changed))
        for group in alike.values():
            results: tuple[Tensor | None, ...]
            try:
                outputs = compute(_joined(part, [changed for _, changed in group]))
                results = tuple(outputs[[row]] for row in range(len(group)))
            except FAILURES:  # one of them, of another shape
                results = tuple(_computed(one, part, compute) for one, _ in group)
            for (one, _), result in zip(group, results, strict=True):
                yield one, result


def _computed(one: Hypothesis, part: Pipeline, compute: Callable[[Pipeline], Tensor]) -> Tensor | None:
    try:
        return compute(one.change(part))
    except FAILURES:
        return None


def _reduced(part: Pipeline, hypothesis: Hypothesis, used: Tensor) -> Pipeline | None:
    """With the changed tensors of the experts that are used; None where more than these are changed."""
    try:
        changed = hypothesis.change(part)
        if not _simple(part, changed):
            return None
        tensors = {n: None if (t := getattr(changed.call.experts, n)) is None else t[used] for n in _NAMES}
    except FAILURES:
        return None
    return changed.having(**tensors)


def _simple(part: Pipeline, changed: Pipeline) -> bool:
    """Whether nothing but the experts' tensors, the input and the activation differ."""
    call, right = changed.call, part.call
    others = [f.name for f in fields(right) if f.name not in ("input", "experts")]
    pairs = [(getattr(call, name), getattr(right, name)) for name in others]
    return (
        replace(changed.stages, activate=part.stages.activate) == part.stages
        and changed.run_call is None
        and changed.after is None
        and type(call) is type(right)
        and all(a is b or (not isinstance(a, Tensor) and a == b) for a, b in pairs)
    )


def _joined(part: Pipeline, reduced: list[Pipeline]) -> Pipeline:
    """One pipeline with a token for each of these, which have the experts of the part's slots only."""
    local = local_of(part)[0]
    ids = torch.full((len(reduced), len(local)), -1, dtype=torch.int32, device=local.device)
    count = int((local >= 0).sum())
    ids[:, local >= 0] = torch.arange(len(reduced) * count, dtype=torch.int32, device=local.device).view(
        -1, count
    )
    tensors: dict[str, Tensor | None] = {}
    for name in _NAMES:
        parts = [getattr(p.call.experts, name) for p in reduced]
        tensors[name] = None if parts[0] is None else torch.cat(parts)
    return part.staging(activate=_one_by_one([p.stages.activate for p in reduced], count)).calling(
        input=torch.cat([p.call.input for p in reduced]),
        token_selected_experts=ids,
        token_final_scales=part.call.token_final_scales.expand(len(reduced), -1).contiguous(),
        experts=Experts(**tensors),  # type: ignore[arg-type]
        ep_size=1,
        ep_rank=0,
    )


def _one_by_one(functions: list[Callable[..., Tensor]], count: int) -> Callable[..., Tensor]:
    """An activation of which each function gets its `count` rows, as if it were alone."""
    if all(function is functions[0] for function in functions):
        return functions[0]

    def activate(
        activation: Activation, rows: Tensor, bias: Tensor | None, parameters: Sequence[Tensor | None]
    ) -> Tensor:
        if len(rows) != count * len(functions):
            raise ValueError("rows: expected those of all functions")
        outputs = []
        for number, function in enumerate(functions):
            own = slice(number * count, (number + 1) * count)
            given = [None if p is None else p[own] for p in parameters]
            outputs.append(function(activation, rows[own], None if bias is None else bias[own], given))
        return torch.cat(outputs)

    return activate
