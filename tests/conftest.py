"""Hypothesis: the same examples in every run, a bounded number of them, no deadline on a shared machine."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=100, database=None)
# To look for more: pytest --hypothesis-profile=search
settings.register_profile("search", deadline=None, max_examples=2000, print_blob=True)
settings.load_profile("repeatable")
