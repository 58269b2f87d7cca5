"""A package `flashinfer` that has the one function, and engines that import it as engines do."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

# The public function is a wrapper with cells of its own, as flashinfer's decorator makes it.
FILES = {
    "flashinfer/__init__.py": """
from .fused_moe import cutlass_fused_moe
__version__ = "0.7.2.post1"
""",
    "flashinfer/fused_moe/__init__.py": "from .core import cutlass_fused_moe\n",
    "flashinfer/fused_moe/core.py": """
import functools

def kernel(*arguments, **named):  # replaced by tests
    return "the real kernel", arguments, named

def api(*, trace):
    def decorate(function):
        count = [0]
        @functools.wraps(function)
        def wrapper(*arguments, **named):
            count[0] += 1
            assert trace
            return function(*arguments, **named)
        wrapper.count = count
        return wrapper
    return decorate

@api(trace=True)
def cutlass_fused_moe(
    input, token_selected_experts, token_final_scales, fc1_expert_weights, fc2_expert_weights, output_dtype,
    quant_scales, *others, **options,
):
    return kernel(
        input, token_selected_experts, token_final_scales, fc1_expert_weights, fc2_expert_weights, output_dtype,
        quant_scales, *others, **options,
    )
""",
    "engine_of_names.py": """
from flashinfer.fused_moe import cutlass_fused_moe as renamed
class Layer:
    moe = staticmethod(renamed)
def call(*arguments, **named):
    return renamed(*arguments, **named)
def call_of_layer(*arguments, **named):
    return Layer.moe(*arguments, **named)
""",
    "engine_of_modules.py": """
import flashinfer
def call(*arguments, **named):
    return flashinfer.fused_moe.cutlass_fused_moe(*arguments, **named)
""",
    "engine_of_caches.py": """
import functools
import importlib
@functools.cache
def function():
    return functools.partial(getattr(importlib.import_module("flashinfer.fused_moe"), "cutlass_fused_moe"))
def call(*arguments, **named):
    return function()(*arguments, **named)
""",
}
ENGINES = ("engine_of_names", "engine_of_modules", "engine_of_caches")


def write(folder: Path) -> Path:
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Let this process import the package and the engines from a folder; afterwards all is as before."""
    before = _take_out()
    sys.path.insert(0, str(write(folder)))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = [path for path in sys.path if path != str(folder)]
        _take_out()
        sys.modules.update(before)


def _take_out() -> dict[str, ModuleType]:
    names = [name for name in sys.modules if name.partition(".")[0] in ("flashinfer", *ENGINES)]
    return {name: sys.modules.pop(name) for name in names}
