"""Parameters that only `-m slow` runs are what they are in the usual run."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.usual import first


@pytest.mark.parametrize(
    ("case", "single", "values"),
    [
        ("a", False, ("a",)),
        (("a", 1), False, ("a", 1)),
        (("a", 1), True, (("a", 1),)),
        (("a",), False, (("a",),)),
        ((), False, ((),)),
    ],
)
def test_values_stay_what_they_are(case: Any, single: bool, values: tuple[Any, ...]) -> None:
    usual, slow = first(1, [case, case], single=single)
    assert usual is case
    assert (slow.values, [mark.name for mark in slow.marks]) == (values, ["slow"])
