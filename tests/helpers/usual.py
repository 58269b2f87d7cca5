"""Which of a long list of parameters are in the usual run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

__all__ = ["first"]


def first(count: int, cases: Iterable[Any], *, single: bool = False) -> list[Any]:
    """The others take as long, run the same code, and are run by `-m slow`.

    Args:
        count: how many are in the usual run.
        cases: values of one parameter, or tuples of those of several.
        single: of one parameter, whose values are tuples. Those of no or one element are never taken for several.
    """

    def values(case: Any) -> tuple[Any, ...]:
        return case if not single and isinstance(case, tuple) and len(case) > 1 else (case,)

    return [
        case if n < count else pytest.param(*values(case), marks=pytest.mark.slow)
        for n, case in enumerate(cases)
    ]
