"""Compiled loops do not check an index: shapes that do not fit together are refused before a loop runs."""

from __future__ import annotations

import importlib
import inspect
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mxfp4ref
from mxfp4ref import forward
from mxfp4ref.defects.variants.gemm import tensor_core_sum
from mxfp4ref.formats.experts import StoredWeights
from mxfp4ref.model.forward import KERNEL
from mxfp4ref.sm90.gemm.compiled import compiled_loops, grouped_gemm
from mxfp4ref.sm90.gemm.cpu import group_scaled_gemm
from mxfp4ref.sm90.gemm.fp8 import fp8_gemm
from tests.helpers.forward_calls import CALL

PACKAGE = Path(mxfp4ref.__file__).parent
MODULES = [
    str(path.relative_to(PACKAGE.parent).with_suffix("")).replace("/", ".")
    for path in PACKAGE.rglob("*_loops.py")
]
TABLES = {"of_bf16", "ex2_rows", "ex2_squares", "rcp_rows", "rcp_squares"}  # of one size


@pytest.mark.parametrize("name", MODULES)
def test_each_loop_says_the_shapes_of_its_arrays(name: str) -> None:
    source = inspect.getsource(importlib.import_module(name))
    for decorator, arguments in re.findall(
        r'^@compiled\(\s*(".*?)\)\ndef \w+\((.*?)\):', source, re.M | re.S
    ):
        signature = decorator[: decorator.index(")")].replace('"', "")
        types = re.findall(r"(\w+)(\[[:,1]*\])?", signature.partition("(")[2])
        names = re.findall(r"\w+", arguments)
        arrays = {name for name, (_, dimensions) in zip(names, types, strict=True) if dimensions}
        assert arrays - TABLES <= set(re.findall(r"(\w+)\[", decorator.partition("shapes=")[2])), names


def test_an_activation_of_another_width_is_refused() -> None:
    def halved(*arguments: object, **named: object) -> torch.Tensor:
        result = KERNEL.activate(*arguments, **named)  # type: ignore[arg-type]
        return result[:, : result.shape[1] // 2]

    with pytest.raises(ValueError, match=r"stages.activate: expected \[\d+, \d+\], which GEMM2 takes, got"):
        forward(CALL, replace(KERNEL, activate=halved))


def test_weights_of_another_depth_are_refused() -> None:
    x, packed, scales = torch.zeros(1, 3, 64), torch.zeros(1, 64, 64), torch.zeros(1, 64, 4)
    packed, scales = packed.to(torch.uint8), scales.to(torch.uint8)
    with pytest.raises(
        ValueError, match=r"gemm: expected packed \[N, 4\*G\] where G = 2, M = 3, .*got \[64, 16\]"
    ):
        group_scaled_gemm(x.bfloat16(), packed, scales)
    with pytest.raises(ValueError, match="gemm: expected"):
        group_scaled_gemm(x.bfloat16(), packed[..., :32], scales)
    with pytest.raises(ValueError, match="gemm: expected"):
        fp8_gemm(x[0].to(torch.uint8), packed[0], scales[0])
    with pytest.raises(ValueError, match="tensor_core_sum: expected"):
        tensor_core_sum(x.double(), torch.zeros(1, 64, 128).double())
    loops, stored = compiled_loops(), StoredWeights(packed[0, :, :32], scales[0, :, :2].flatten(), (0, 0))
    with pytest.raises(ValueError, match="gemm: expected swapped"):
        grouped_gemm(
            loops, x[0].bfloat16(), [3], lambda _: stored, [0, 1], torch.zeros(2, dtype=torch.bool), 64
        )
    with pytest.raises(ValueError, match="gemm: expected out"):
        grouped_gemm(
            loops, x[0].bfloat16(), [3], lambda _: stored, [0, 1], torch.zeros(3, dtype=torch.bool), 65
        )
