"""Words that messages are made of. Nothing here needs torch, which takes seconds to import."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["did_you_mean", "shown"]


def did_you_mean(word: object, words: Iterable[str], *, ending: str = "") -> str:
    """Which of these words, each with this ending, are spelt nearly so, as the end of a message, or ""."""
    near = difflib.get_close_matches(word, list(words), n=3) if isinstance(word, str) else []
    return f"; did you mean {' or '.join(one + ending for one in near)}?" if near else ""


def shown(value: object) -> str:
    """Any value on one short line of a message."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # an int of too many digits, somebody's class
        text = object.__repr__(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
