"""How objects that hold tensors show themselves: shapes and dtypes, never thousands of numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields
from html import escape
from types import FunctionType
from typing import Any, ClassVar, Self

from torch import Tensor

from mxfp4ref._words import check_keywords

__all__ = ["Shown"]

_MOST_ITEMS = 5
_MOST_CHARACTERS = 100


class Shown:
    """A dataclass (declared with `repr=False`) that shows itself in a line, and in a notebook as a table.

    Fields that have their default value are left out, unless it is `_WHOLE`. Keywords that are no fields are told
    with the field that is spelt nearly so.
    """

    _WHOLE: ClassVar[bool] = False  # whether its defaults are shown too
    _PARTS: ClassVar[tuple[type, ...]] = ()  # classes of its fields, whose fields may have been meant

    def __new__(cls, *values: Any, **named: Any) -> Self:
        if named:
            check_keywords(
                cls.__name__, named, _names(cls), {part.__name__: _names(part) for part in cls._PARTS}
            )
        return super().__new__(cls)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={text}' for name, text in self._shown())})"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align: left'>{escape(name)}</th>"
            f"<td style='text-align: left'>{escape(text)}</td></tr>"
            for name, text in self._shown()
        )
        return f"<table><caption>{escape(type(self).__name__)}</caption>{rows}</table>"

    def _shown(self) -> Iterator[tuple[str, str]]:
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if self._WHOLE or not _is_default(field, value):
                yield field.name, _text(value)


def _names(kind: type) -> set[str]:
    return {field.name for field in fields(kind)}


def _is_default(field: Field[Any], value: object) -> bool:
    default = field.default_factory() if field.default_factory is not MISSING else field.default
    return value is default or (
        not isinstance(value, Tensor) and type(value) is type(default) and value == default
    )


def _text(value: object) -> str:
    if isinstance(value, Tensor):
        where = "" if value.device.type == "cpu" else f" on {value.device}"
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}{where}"
    if isinstance(value, Mapping):
        return _cut([f"{key}: {_text(item)}" for key, item in value.items()], "{}")
    if isinstance(value, (tuple, list)):
        return _cut([_start(_text(item)) for item in value], "()" if isinstance(value, tuple) else "[]")
    if isinstance(value, FunctionType):  # its address says nothing
        return "a function" if "<" in value.__qualname__ else value.__qualname__
    text = repr(value)
    if isinstance(value, Shown) or len(text) <= _MOST_CHARACTERS:
        return text
    return _start(text)


def _start(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}..."


def _cut(items: list[str], brackets: str) -> str:
    more = [f"... ({len(items)} in all)"] if len(items) > _MOST_ITEMS else []
    return brackets[0] + ", ".join([*items[:_MOST_ITEMS], *more]) + brackets[1]
