"""Which of a long list of parameters are in the usual run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

__all__ = ["first"]


def first(count: int, cases: Iterable[Any]) -> list[Any]:
    """The others take as long, run the same code, and are run by `-m slow`."""
    return [
        case
        if n < count
        else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
        for n, case in enumerate(cases)
    ]
