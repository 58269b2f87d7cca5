"""Taking over flashinfer's `cutlass_fused_moe` wherever an engine holds it.

An engine may have the function in a module of its own, in a cache or in an object, imported before or after. All of
these hold one function object, so what it does is changed, not who holds it: its code is replaced by a call of
`called`, and a copy of it keeps the kernel. flashinfer 0.7.2 has a mechanism of its own, `flashinfer.trace_apply`,
but it hands over input, ids, routing weights and weights only, without scales, biases, ranks or options, and reaches
none of the engine's names.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import sys
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import CodeType, FunctionType, ModuleType
from typing import Any

__all__ = [
    "FUNCTION",
    "MODULE",
    "Waiting",
    "called",
    "install",
    "installed",
    "restore",
    "take_over",
    "taken_over",
    "unwrapped",
]

MODULE, FUNCTION = "flashinfer.fused_moe", "cutlass_fused_moe"

Kernel = Callable[..., Any]
Answer = Callable[[Kernel, tuple[Any, ...], dict[str, Any]], Any]


@dataclass
class _Taken:
    """A function that was taken over, its code before and since, and a copy that still is the kernel.

    Attributes:
        signature: what the function was given so that it keeps its signature; None if it has one of its own.
        answer: answers the calls; None once the function was given back.
    """

    function: FunctionType
    before: CodeType
    since: CodeType
    kernel: FunctionType
    signature: inspect.Signature | None
    answer: Answer | None

    def restore(self) -> None:
        """Give the function back, unless somebody has changed it since; what they changed stays as it is."""
        self.answer = None
        if self.function.__code__ is self.since:
            self.function.__code__ = self.before
        if self.signature is not None and vars(self.function).get("__signature__") is self.signature:
            del self.function.__signature__  # type: ignore[attr-defined]


_lock = threading.RLock()
_all: list[
    _Taken
] = []  # by the number in their code; kept, as a call may have begun before it was given back
_make: Callable[[], Answer] | None = None  # while something is installed
_taken: list[_Taken] = []  # flashinfer's function, while calls arrive here, and one within it


def install(make: Callable[[], Answer]) -> None:
    """Let `make()(kernel, arguments, named)` answer every call, at once or when flashinfer has been imported.

    `make` is called when the function is taken over, and so when torch has been imported. Nothing is installed
    after an exception.

    Raises:
        ModuleNotFoundError: there is no flashinfer to be imported.
        TypeError: flashinfer's function is not one of Python.
    """
    global _make
    with _lock:
        package = MODULE.partition(".")[0]
        if package not in sys.modules and importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"no module named {package!r}, whose {FUNCTION} is to be taken over")
        restore()
        _make = make
        if MODULE in sys.modules:
            _arrived(sys.modules[MODULE])
        else:
            sys.meta_path.insert(0, _waiting)


def installed() -> bool:
    """Whether something is installed, be flashinfer imported or not."""
    return _make is not None


def taken_over() -> bool:
    """Whether calls arrive here."""
    return bool(_taken)


def restore() -> None:
    """Give the function back as it was. Nothing happens if it was not taken over."""
    global _make
    with _lock:
        if _waiting in sys.meta_path:
            sys.meta_path.remove(_waiting)
        while _taken:
            _taken.pop().restore()
        _make = None


def _arrived(package: ModuleType) -> None:
    """Take over flashinfer's function, or restore everything.

    A package may have one of its own around that of its module `core`, and either may be called.
    """
    assert _make is not None
    try:
        answer = _make()
        functions = [unwrapped(getattr(package, FUNCTION, None))]
        inner = unwrapped(getattr(sys.modules.get(f"{MODULE}.core"), FUNCTION, None))
        if isinstance(inner, FunctionType) and inner is not functions[0]:
            functions.append(inner)
            answer = _outermost(answer)
        for function in functions:
            _taken.append(_take_over(function, answer))
    except BaseException:
        restore()
        raise


def _outermost(answer: Answer) -> Answer:
    """Answers as `answer` does; calls that a thread makes meanwhile are left to the kernel."""
    inside = threading.local()

    def outermost(kernel: Kernel, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if getattr(inside, "now", False):
            return kernel(*arguments, **named)
        inside.now = True
        try:
            return answer(kernel, arguments, named)
        finally:
            inside.now = False

    return outermost


def unwrapped(function: Any) -> Any:
    """The function within flashinfer's own wrapper, `flashinfer.trace_apply`, around what engines may hold."""
    while getattr(function, "_trace_apply", False):
        function = function.__wrapped__
    return function


def take_over(function: Any, answer: Answer) -> Callable[[], None]:
    """Let `answer(kernel, arguments, named)` answer the calls of a function, whoever holds it.

    Returns:
        A function that gives it back.

    Raises:
        TypeError: it is not a function of Python.
    """
    return _take_over(function, answer).restore


def called(number: int, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """What a function does once it was taken over."""
    taken = _all[number]
    answer = taken.answer  # None for a call that began before the function was given back
    return taken.kernel(*arguments, **named) if answer is None else answer(taken.kernel, arguments, named)


def _take_over(function: Any, answer: Answer) -> _Taken:
    function = unwrapped(function)
    if not isinstance(function, FunctionType):
        raise TypeError(f"{MODULE}.{FUNCTION}: expected a Python function, got {type(function).__name__}")
    kernel = FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    kernel.__kwdefaults__, kernel.__module__ = function.__kwdefaults__, function.__module__
    signature = None if "__signature__" in vars(function) else inspect.signature(function)
    with _lock:
        since = _relay(len(_all), len(function.__code__.co_freevars))
        taken = _Taken(function, function.__code__, since, kernel, signature, answer)
        _all.append(taken)
    try:
        if signature is not None:
            function.__signature__ = signature  # type: ignore[attr-defined]
        function.__code__ = since
    except BaseException:
        taken.restore()
        raise
    return taken


def _relay(number: int, free: int) -> CodeType:
    """Code that calls `called`. A function takes only code of as many free variables as it has cells."""
    cells = "".join(f"cell_{number}, " for number in range(free))
    source = (
        f"def enclosing({cells}):\n"
        f"    def {FUNCTION}(*arguments, **named):\n"
        f"        from {__name__} import called\n"
        f"        return called({number}, arguments, named)\n"
        f"        ({cells})\n"
        f"    return {FUNCTION}\n"
    )
    names: dict[str, Any] = {}
    exec(compile(source, __file__, "exec"), names)
    code: CodeType = names["enclosing"](*[None] * free).__code__
    return code


class Waiting(MetaPathFinder):
    """Calls `arrived` with each of these modules as soon as it has been executed, while this is in `sys.meta_path`.

    An import does not fail by that: what `arrived` raises is logged.
    """

    def __init__(self, modules: Collection[str], arrived: Callable[[ModuleType], None]) -> None:
        self._modules, self._arrived = modules, arrived
        self._looking = False

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in self._modules or self._looking:
            return None
        self._looking = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._looking = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            with _lock:
                if self in sys.meta_path:
                    try:
                        self._arrived(module)
                    except Exception:
                        logging.getLogger("mxfp4ref.engine").exception("%s: not taken over", name)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _came_later(package: ModuleType) -> None:
    sys.meta_path.remove(_waiting)
    _arrived(package)


_waiting = Waiting((MODULE,), _came_later)
