"""What looks at an output may fail on one that nobody has thought of: that is told in one line, and others go on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import ParamSpec, TypeVar

from mxfp4ref.conformance.isolation.plain import of_exception

__all__ = ["guarded", "guarded_each", "listening"]

_P = ParamSpec("_P")
_T = TypeVar("_T")
_HEARD: ContextVar[dict[str, None] | None] = ContextVar("what failed", default=None)


@contextmanager
def listening(failed: dict[str, None]) -> Iterator[None]:
    """Inside, what fails is added to these lines; where nobody listens it raises."""
    before = _HEARD.set(failed)
    try:
        yield
    finally:
        _HEARD.reset(before)


def guarded(look: Callable[_P, _T], *given: _P.args, **named: _P.kwargs) -> _T | None:
    """What it finds; None if it fails."""
    try:
        return look(*given, **named)
    except Exception as error:
        _tell(look, error)
        return None


def guarded_each(look: Callable[_P, Iterable[_T]], *given: _P.args, **named: _P.kwargs) -> Iterator[_T]:
    """What it finds, until it fails."""
    try:
        yield from look(*given, **named)
    except Exception as error:
        _tell(look, error)


def _tell(look: Callable[..., object], error: Exception) -> None:
    heard = _HEARD.get()
    if heard is None:
        raise error
    look = look.func if isinstance(look, partial) else look
    name = f"{look.__module__.rpartition('.')[2]}.{look.__qualname__}"
    heard[f"a part of the diagnosis failed, {name}: {of_exception(error)}; the others went on"] = None
