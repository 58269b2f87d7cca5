"""What `diagnose` is asked, its arguments held against each other before anything is looked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from mxfp4ref._validate import check_instance, check_tensor, did_you_mean, shown
from mxfp4ref.conformance.comparison import plain_tensor
from mxfp4ref.conformance.families.hypothesis import Hypothesis
from mxfp4ref.conformance.kernels.adapters import INTERMEDIATES
from mxfp4ref.defects import DEFECTS
from mxfp4ref.goldens.runs import OUTPUTS, run_stage
from mxfp4ref.goldens.store import KINDS
from mxfp4ref.model.call import MoeCall

__all__ = ["checked_suspects", "checked_tensors"]

Tensors = dict[str, Tensor]


def checked_tensors(kind: str, inputs: Any, outputs: Any, expected: Any) -> tuple[Tensors, Tensors]:
    """What the kernel gave, with its intermediates, and what it should have given.

    Raises:
        TypeError, ValueError: as `diagnose`.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {shown(kind)}")
    check_instance("inputs", inputs, MoeCall if kind == "moe" else Mapping)
    for name, found in (("outputs", outputs), ("expected", expected)):
        check_instance(name, found, Mapping)
    if not expected or (unknown := [name for name in expected if name not in OUTPUTS[kind]]):
        came = ", ".join(map(shown, unknown)) if expected else "none"
        raise ValueError(f"expected: expected {', '.join(OUTPUTS[kind])}, got {came}")
    if any(name not in outputs for name in expected):
        came = ", ".join(map(str, outputs)) or "none"
        raise ValueError(f"outputs: expected {', '.join(expected)}, got {came}")
    right = _right(kind, inputs)
    wanted = {name: _like(f"expected[{name!r}]", expected[name], right[name]) for name in expected}
    given = {name: _like(f"outputs[{name!r}]", outputs[name], right[name]) for name in expected}
    stages = {
        name: plain_tensor(f"outputs[{name!r}]", outputs[name]) for name in INTERMEDIATES if name in outputs
    }
    return {**stages, **given}, wanted


def _right(kind: str, inputs: Any) -> Mapping[str, Tensor]:
    """Tensors like those that these inputs give."""
    if kind == "moe":
        return {"output": inputs.input}
    try:
        found = run_stage(kind, inputs)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        words = f"{type(error).__name__}: {error}"
        raise ValueError(f"inputs: expected those of kind {kind}, got {words}") from error
    return found if isinstance(found, Mapping) else {OUTPUTS[kind][0]: found}


def _like(name: str, value: Any, right: Tensor) -> Tensor:
    check_instance(name, value, Tensor)
    return check_tensor(name, plain_tensor(name, value), dtype=right.dtype, shape=right.shape)


def checked_suspects(suspects: object) -> tuple[str | Hypothesis, ...]:
    """Names of defects, which there are, and hypotheses; none for None.

    Raises:
        TypeError, ValueError: as `diagnose`.
    """
    if suspects is None:
        return ()
    if isinstance(suspects, str) or not isinstance(suspects, Iterable):
        raise TypeError(f"suspects: expected names of defects and hypotheses, got {shown(suspects)}")
    for one in (found := tuple(suspects)):
        if not isinstance(one, Hypothesis):
            check_instance("suspects", one, str)
            if one not in DEFECTS:
                raise ValueError(
                    f"suspects: expected names of defects, got {shown(one)}{did_you_mean(one, DEFECTS)}"
                )
    return found
