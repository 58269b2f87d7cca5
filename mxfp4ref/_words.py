"""Words that messages are made of. Nothing here needs torch, which takes seconds to import."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

__all__ = ["check_keywords", "did_you_mean", "duration", "listed", "shortened", "shown"]

_AS_WELL = 0.1  # of 1
_MOST = 8  # words that are listed


def did_you_mean(word: object, words: Iterable[str], *, ending: str = "") -> str:
    """Which of these words, each with this ending, are spelt nearly so, as the end of a message, or ""."""
    if not isinstance(word, str) or not word:
        return ""
    words = list(words)
    if near := difflib.get_close_matches(word, words, n=3):
        # The nearest, and those that may as well have been meant.
        likeness = [difflib.SequenceMatcher(None, one, word).ratio() for one in near]
        near = [one for one, much in zip(near, likeness, strict=True) if much > max(likeness) - _AS_WELL]
    else:  # the beginning of longer ones
        near = [one for one in words if one.startswith(f"{word}_")][:3]
    return f"; did you mean {' or '.join(one + ending for one in near)}?" if near else ""


def check_keywords(
    called: str, given: Iterable[str], known: Iterable[str], parts: Mapping[str, Iterable[str]] | None = None
) -> None:
    """Raise TypeError, as Python does and with the name that was meant, for a keyword that is none of these.

    `parts`: by name, what else has keywords that may have been meant.
    """
    for name in given:
        if name not in known:
            hints = (did_you_mean(name, more, ending=f" of {part}") for part, more in (parts or {}).items())
            hint = did_you_mean(name, known) or next(filter(None, hints), "")
            raise TypeError(f"{called}() got an unexpected keyword argument {name!r}{hint}")


def duration(seconds: float) -> str:
    """For a reader who waits: "10 s", "3 minutes", "2.5 hours"."""
    if seconds < 90:
        return f"{max(round(seconds, -1 if seconds > 10 else 0), 1):.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def shortened(parts: Iterable[str], most: int, joint: str = ", ") -> str:
    """The first of these, with "..." in the place of more."""
    some = list(parts)
    return joint.join([*some[:most], *["..."] * (len(some) > most)])


def listed(words: Iterable[str]) -> str:
    """Words, of many the first ones and how many others; "none" of none."""
    words = list(words)
    more = [f"{len(words) - _MOST:,} others"] if len(words) > _MOST else []
    return ", ".join([*words[:_MOST], *more]) or "none"


def shown(value: object) -> str:
    """Any value on one short line of a message."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # an int of too many digits, somebody's class
        text = object.__repr__(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
