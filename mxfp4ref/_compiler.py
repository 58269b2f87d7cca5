"""What a caller may have turned on and arithmetic cannot bear: torch.compile, and rounding other than to nearest."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

from mxfp4ref._rounding import check_rounding
from mxfp4ref._words import check_keywords

_F = TypeVar("_F", bound=Callable[..., object])


def uncompiled(function: _F) -> _F:
    """Run the function outside of a graph that is being compiled, where fused arithmetic rounds otherwise.

    And only where the CPU rounds to nearest: elsewhere the function raises RuntimeError.
    """

    def checked(*args: Any, **kwargs: Any) -> object:
        check_rounding()
        return function(*args, **kwargs)

    parameters = inspect.signature(function).parameters
    takes_all = any(one.kind is one.VAR_KEYWORD for one in parameters.values())

    @functools.wraps(function)
    def outside(*args: Any, **kwargs: Any) -> object:
        # Only asked for while compiling, since it loads the whole compiler.
        if torch.compiler.is_compiling():
            return torch.compiler.disable(checked)(*args, **kwargs)  # type: ignore[no-untyped-call]
        check_rounding()
        if not takes_all and not kwargs.keys() <= parameters.keys():
            check_keywords(function.__qualname__, kwargs, parameters)
        return function(*args, **kwargs)

    return cast(_F, outside)
