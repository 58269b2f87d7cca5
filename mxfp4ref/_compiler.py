"""Keeping a caller's torch.compile out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

_F = TypeVar("_F", bound=Callable[..., object])


def uncompiled(function: _F) -> _F:
    """Run the function outside of a graph that is being compiled, where fused arithmetic rounds otherwise."""

    @functools.wraps(function)
    def outside(*args: Any, **kwargs: Any) -> object:
        # Only asked for while compiling, since it loads the whole compiler.
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)  # type: ignore[no-untyped-call]
        return function(*args, **kwargs)

    return cast(_F, outside)
