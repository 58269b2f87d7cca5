"""A pytest plugin: flashinfer's own tests of this kernel on a CPU, with the drop-in in the kernel's place.

Whatever those tests import from flashinfer is a stub, but the function under test, the two that prepare its weights,
and what they ask about the GPU. Tensors that they make on a GPU are made on the CPU.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch
from torch.overrides import TorchFunctionMode

from mxfp4ref.formats.layout import fold_scales_sm90, interleave_weights_sm90
from mxfp4ref.model.flashinfer import drop_in


def interleave_weights(weights: torch.Tensor, quant_type: str) -> torch.Tensor:
    assert quant_type == "fp4"
    return interleave_weights_sm90(weights)


def interleave_scales(scales: torch.Tensor, group_size: int = 32) -> torch.Tensor:
    assert group_size == 32
    return fold_scales_sm90(scales)


KNOWN: dict[str, dict[str, Any]] = {
    "flashinfer.fused_moe": {
        "cutlass_fused_moe": drop_in(),
        "interleave_moe_weights_for_sm90_mixed_gemm": interleave_weights,
        "interleave_moe_scales_for_sm90_mixed_gemm": interleave_scales,
    },
    "flashinfer.utils": {
        "get_compute_capability": lambda device: (9, 0),
        "is_sm90a_supported": lambda device: True,
        "is_sm100a_supported": lambda device: False,
        "is_sm12x_supported": lambda device: False,
    },
}


class Stub(ModuleType):
    __path__: Sequence[str] = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, MagicMock(name=f"{self.__name__}.{name}"))
        return self.__dict__[name]


class Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname: str, path: object, target: object = None) -> Any:
        if fullname.partition(".")[0] not in (
            "flashinfer",
            "tests",
        ):  # tests: helpers of other tests of theirs
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return Stub(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__.update(KNOWN.get(module.__name__, {}))


class OnCpu(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


sys.meta_path.insert(0, Stubs())
torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
torch.cuda.get_device_capability = lambda device=None: (9, 0)  # type: ignore[assignment]
OnCpu().__enter__()
