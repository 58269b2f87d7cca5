"""A diagnosis that says the same on a busy machine, and soon."""

from __future__ import annotations

import math

import pytest

from mxfp4ref.conformance import looking
from mxfp4ref.conformance.families import engine

__all__ = ["be_patient"]


def be_patient(patch: pytest.MonkeyPatch) -> None:
    """It takes the time that it needs, and tries no more than named defects and what is solved for.

    The other families are most of a search.
    """
    patch.setitem(looking.SECONDS, "quick", math.inf)
    patch.setattr(engine, "_PLAIN", ())
