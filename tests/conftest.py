"""Hypothesis: the same examples in every run, a bounded number of them, no deadline on a shared machine."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

from mxfp4ref.goldens.manifest import write_builtin

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=100, database=None)
# To look for more: pytest --hypothesis-profile=search
settings.register_profile("search", deadline=None, max_examples=2000, print_blob=True)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def builtin_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The goldens of an installed package, written as the wheel's build does."""
    root = tmp_path_factory.mktemp("wheel") / "builtin"
    write_builtin(Path(__file__).resolve().parents[1] / "goldens", root)
    return root
