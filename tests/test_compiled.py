"""Compiled loops do not check an index: shapes that do not fit together are refused before a loop runs."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mxfp4ref
from mxfp4ref import _compiled, forward
from mxfp4ref.defects.variants.gemm import tensor_core_sum
from mxfp4ref.formats.experts import StoredWeights
from mxfp4ref.model.forward import KERNEL
from mxfp4ref.sm90 import elementwise
from mxfp4ref.sm90.activation import ACTIVATIONS, SWIGLU, SWIGLU_BIAS
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


def test_what_is_compiled_first_is_all_that_is_asked_for() -> None:
    texts = "".join(path.read_text("utf-8") for path in PACKAGE.rglob("*.py"))
    assert sorted(re.findall(r'loops\(\s*"(mxfp4ref[\w.]+)"', texts)) == sorted(_compiled.LOOPS)


def test_compiling_is_told_once_also_into_a_pipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "a_loop.py").write_text("import numba\n\n@numba.njit('i8(i8)')\ndef f(x):\n    return x\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(_compiled, "LOOPS", ("a_loop", "no_such_loop"))
    monkeypatch.setattr(_compiled, "_told", [])
    monkeypatch.delitem(sys.modules, "pytest")
    for _ in range(2):
        _compiled.compile_loops()
        monkeypatch.delitem(sys.modules, "a_loop")
    assert capsys.readouterr().err == f"{_compiled._COMPILING}\n"


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

    with pytest.raises(ValueError, match=r"stages.activate: expected .* \[\d+, \d+\], got"):
        forward(CALL, replace(KERNEL, activate=halved))


def test_weights_of_another_depth_are_refused() -> None:
    x, packed, scales = torch.zeros(1, 3, 64), torch.zeros(1, 64, 64), torch.zeros(1, 64, 4)
    packed, scales = packed.to(torch.uint8), scales.to(torch.uint8)
    with pytest.raises(ValueError, match=r"x: expected .* \[B=1, M, K=128\], got bfloat16 \[1, 3, 64\]"):
        group_scaled_gemm(x.bfloat16(), packed, scales)
    with pytest.raises(
        ValueError, match=r"packed: expected .* \[B=1, N=64, K/2=64\], got uint8 \[1, 64, 32\]"
    ):
        group_scaled_gemm(x.bfloat16(), packed[..., :32], scales)
    with pytest.raises(ValueError, match="gemm: expected"):
        fp8_gemm(x[0].to(torch.uint8), packed[0], scales[0])
    with pytest.raises(ValueError, match="tensor_core_sum: expected"):
        tensor_core_sum(x.double(), torch.zeros(1, 64, 128).double())
    stored, rows = (
        StoredWeights(packed[..., :32], scales[..., :2].flatten(1), (0, 0)),
        np.ones((3, 64), np.int16),
    )
    with pytest.raises(ValueError, match="gemm: expected swapped"):
        grouped_gemm(compiled_loops(), rows, [3], stored, [0, 1], np.zeros(2, np.bool_))
    with pytest.raises(ValueError, match="ends: expected the last to be the number of rows, 3, got 4"):
        grouped_gemm(compiled_loops(), rows, [4], stored, [0, 1], np.zeros(3, np.bool_))
    stored = stored._replace(scales=stored.scales[:, 2:])
    with pytest.raises(ValueError, match="gemm: expected scales"):
        grouped_gemm(compiled_loops(), rows, [3], stored, [0, 1], np.zeros(3, np.bool_))


def changed(stage: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The stage, whose result is changed."""
    return replace(KERNEL, **{stage: lambda *given: change(getattr(KERNEL, stage)(*given))})


@pytest.mark.parametrize(
    ("stage", "change", "says"),
    [
        (
            "select_local",
            lambda local: local[:3],
            r"expected an int64 tensor of shape \[\d+, \d+\], got int64 \[3, ",
        ),
        ("select_local", lambda local: local - 2, "expected ids from -1 to .*, got -[23]"),
        ("select_local", lambda local: local + 99, "expected ids from -1 to .*, got"),
        ("round_fc1", lambda rows: rows.repeat(2, 1), "expected a tensor of shape"),
        ("round_fc2", lambda rows: rows[:-1], "expected a tensor of shape"),
        ("round_output", lambda rows: rows[:, :-1], "expected a tensor of shape"),
    ],
)
def test_what_stages_give_has_the_shape_that_the_next_takes(stage: str, change: Any, says: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"stages.{stage}: {says}"):
        forward(CALL, changed(stage, change))


@pytest.mark.parametrize("stage", ["round_activation", "fc1_gemm"])
def test_fp16_is_not_read_as_bf16(stage: str) -> None:
    def gemm(x: torch.Tensor, *given: Any, **named: Any) -> torch.Tensor:
        return group_scaled_gemm(x.half(), *given, **named)

    changed_stages = (
        changed(stage, torch.Tensor.half) if stage != "fc1_gemm" else replace(KERNEL, fc1_gemm=gemm)
    )
    with pytest.raises(TypeError, match=r"x: expected a bfloat16 tensor of shape .*, got float16"):
        forward(CALL, changed_stages)


def test_scales_viewed_as_words_are_refused_not_taken_for_fewer_groups() -> None:
    x, packed = torch.ones(1, 3, 128).bfloat16(), torch.full((1, 64, 64), 0x22, dtype=torch.uint8)
    scales = torch.full((1, 64, 4), 127, dtype=torch.uint8)
    with pytest.raises(TypeError, match=r"scales: expected a uint8 .* got int32"):
        group_scaled_gemm(x, packed, scales.view(torch.int32))


def sum_of_experts(**other: torch.Tensor) -> torch.Tensor:
    given = {
        "fc2_output": torch.ones(2, 2, 16).bfloat16(),
        "local": torch.tensor([[0, 1], [2, -1]]),
        "scales": torch.full((2, 2), 0.5),
        "bias": torch.ones(3, 16).bfloat16(),
    }
    return elementwise.finalize(**{**given, **other})


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"local": torch.tensor([[0, 1], [3, -1]])}, r"local: expected ids from -1 to 2, got 3 at \[1, 0\]"),
        ({"local": torch.full((2, 2), 1 << 40)}, "local: expected ids from -1 to 2, got 1099511627776"),
        ({"bias": torch.ones(0, 16).bfloat16()}, "local: expected ids from -1 to -1, got 0"),
        ({"local": torch.ones(2, 2).double()}, "local: expected an int64 tensor"),
        ({"scales": torch.ones(2, 2).int()}, "scales: expected a float32 tensor"),
        ({"bias": torch.ones(3, 16).short()}, "bias: expected a bfloat16 or float16 or float32 tensor"),
    ],
)
def test_the_weighted_sum_reads_no_bias_of_an_expert_that_is_not_there(
    other: dict[str, torch.Tensor], says: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=says):
        sum_of_experts(**other)


def test_numbers_of_another_type_are_not_read_as_those_of_the_loops() -> None:
    expected = sum_of_experts()
    for dtype in (torch.float16, torch.float32):
        assert torch.equal(sum_of_experts(bias=torch.ones(3, 16, dtype=dtype)), expected)
    x, bias = torch.ones(4, 8).bfloat16(), torch.ones(4, 8)
    once = elementwise.activate(ACTIVATIONS[SWIGLU], x, bias.bfloat16(), ())
    for dtype in (torch.float16, torch.float32):
        assert torch.equal(elementwise.activate(ACTIVATIONS[SWIGLU], x, bias.to(dtype), ()), once)
    for dtype in (torch.int32, torch.float64):
        with pytest.raises(TypeError, match="swiglu_alpha: expected a float32 tensor"):
            elementwise.activate(
                ACTIVATIONS[SWIGLU_BIAS], x, None, (torch.ones(4, 1, dtype=dtype), None, None)
            )
        with pytest.raises(TypeError, match="x: expected a float32 tensor"):
            elementwise.to_bf16(torch.ones(4, dtype=dtype))
    assert elementwise.to_bf16(torch.tensor(1.5)) == 1.5
