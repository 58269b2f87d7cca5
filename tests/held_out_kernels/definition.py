"""What a held-out kernel is.

@wrong(stage="fc2", says=("scale", "next|neighbour"), story="each expert's scales are read one expert too far")
def fc2_scales_of_the_next_expert(call: MoeCall) -> Tensor:
    ...
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["KERNELS", "STAGES", "Wrong", "load_all", "run_on", "wrong"]

STAGES = (
    "input",
    "slots",
    "fc1",
    "activation",
    "fc2",
    "finalize",
    "routing",
    "quantize",
    "dequantize",
    "none",
)


@dataclass(frozen=True)
class Wrong:
    """A wrong kernel.

    Attributes:
        name: its function's.
        theme: its module's.
        kind: of the golden cases that it runs on. Kernels of kind "moe" take a `MoeCall` and return `[M, H] bf16`;
            the others take a case's inputs by name and return what the kind asks for.
        function: the kernel.
        stages: where the mistake is: more than one only where it shows equally in each; "none" for noise.
        says: what a useful sentence has to contain: each a regular expression, in any case of letters.
        story: what happened, in one line.
        mode: in which it is compared: "bounded" where the right one, written like this, may differ by roundings.
    """

    name: str
    theme: str
    kind: str
    function: Callable[..., Any]
    stages: tuple[str, ...]
    says: tuple[str, ...]
    story: str
    mode: str = "exact"


KERNELS: dict[str, Wrong] = {}


def wrong(
    *, stage: str | tuple[str, ...], says: tuple[str, ...], story: str, kind: str = "moe", mode: str = "exact"
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a wrong kernel."""
    stages = (stage,) if isinstance(stage, str) else stage
    if not stages or not set(stages) <= set(STAGES) or ("none" in stages and len(stages) > 1):
        raise ValueError(f"stage: expected one or more of {', '.join(STAGES)}, got {stage!r}")
    for pattern in says:
        re.compile(pattern)

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__name__
        if name in KERNELS:
            raise ValueError(f"{name}: expected a name that is not taken")
        theme = function.__module__.rpartition(".")[2]
        KERNELS[name] = Wrong(name, theme, kind, function, stages, says, story, mode)
        return function

    return register


def load_all() -> dict[str, Wrong]:
    """All kernels by name."""
    package = importlib.import_module(__package__)
    for module in pkgutil.iter_modules(package.__path__, f"{__package__}."):
        importlib.import_module(module.name)
    return KERNELS


def run_on(kernel: Wrong, inputs: Any) -> dict[str, Tensor]:
    """A kernel's outputs by name."""
    if kernel.kind == "moe":
        return {"output": kernel.function(inputs)}
    result: dict[str, Tensor] = kernel.function(**inputs)
    return result
