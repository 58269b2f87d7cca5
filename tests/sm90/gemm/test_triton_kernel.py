"""The GEMM on a GPU: there, and by Triton's interpreter; the trial that it has to pass before it is used."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mxfp4ref.formats.generations import WORDWISE
from mxfp4ref.sm90.gemm import cpu as fast
from mxfp4ref.sm90.gemm.cpu import group_scaled_gemm
from mxfp4ref.sm90.gemm.order import first_pair_swapped, group_order
from mxfp4ref.sm90.gemm.reference import gemm_in_order
from mxfp4ref.sm90.gemm.trial import check_gemm
from mxfp4ref.sm90.tactics import Tactic
from tests.helpers import bits
from tests.helpers.gemm_inputs import KINDS, SCALES, problem
from tests.helpers.usual import first


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Any]:
    """The Triton kernel's module, its kernel run by Triton's interpreter on CPU tensors."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the kernel itself is tested")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.delitem(sys.modules, "mxfp4ref.sm90.gemm.triton_kernel", raising=False)
        yield importlib.import_module("mxfp4ref.sm90.gemm.triton_kernel")
        sys.modules.pop("mxfp4ref.sm90.gemm.triton_kernel")


@np.errstate(all="ignore")  # the interpreter computes with numpy, which warns of overflow and the like
@pytest.mark.parametrize(
    ("x_kind", "scale_kind", "groups"),
    first(2, [("wide", "any", 4), ("raw", "any", 4), ("subnormal", "ordinary", 4), ("wide", "any", 8)]),
)  # seconds each; a GPU runs them all
def test_the_triton_kernel_interpreted(interpreted: Any, x_kind: str, scale_kind: str, groups: int) -> None:
    x, packed, scales = problem(13, x_kind, scale_kind, batch=1, rows=1, columns=100, groups=groups)
    x = torch.where(x.isnan(), -torch.inf, x)  # whose sign is another in each column
    scales[:, ::2, :2] = 252  # which of the first two products is rounded, and overflows, shows
    positions = torch.tensor([[list(KINDS).index(x_kind) % 2]])  # even ones swap the first two groups
    expected = group_scaled_gemm(x, packed, scales, tactic=Tactic((64, 64, 128)), positions=positions)
    swapped = first_pair_swapped(x, positions, Tactic((64, 64, 128)), WORDWISE)
    got = interpreted.gemm(x, packed, scales, group_order(groups, 128), swapped)
    bits.assert_same(got, expected)


@np.errstate(all="ignore")
def test_the_triton_kernel_of_one_group_and_of_no_rows(interpreted: Any) -> None:
    x, packed, scales = problem(14, "wide", "any", batch=1, rows=1, columns=3, groups=1)
    none, both = torch.zeros(1, 1, dtype=torch.bool), torch.ones(1, 1, dtype=torch.bool)
    for swapped in (none, both):
        got = interpreted.gemm(x, packed, scales, [0], swapped)
        bits.assert_same(got, group_scaled_gemm(x, packed, scales))
    assert interpreted.gemm(x[:, :0], packed, scales, [0], none[:, :0]).shape == (1, 0, 3)


def test_a_gpu_whose_compiler_errs_is_found_out() -> None:
    """A kernel is used only after a trial, in which one wrong bit in one element is enough."""
    cpu = torch.device("cpu")

    def right(x: Tensor, packed: Tensor, scales: Tensor, order: list[int], swapped: Tensor) -> Tensor:
        assert order == group_order(scales.shape[2], 128)
        return group_scaled_gemm(x, packed, scales, tactic=Tactic((64, 64, 128)))

    def wrong(*arguments: Any) -> Tensor:
        result = right(*arguments)
        result.view(torch.int32)[0, 7, 63] ^= 1
        return result

    check_gemm(right, cpu)
    with pytest.raises(ArithmeticError, match="1 of 512 elements of a trial are wrong"):
        check_gemm(wrong, cpu)
    for other in (
        lambda x, packed, scales, *rest: right(x, packed, scales.clamp(max=254), *rest),
        lambda x, packed, scales, *rest: group_scaled_gemm(x, packed, scales, tactic=Tactic((64, 64, 256))),
        lambda x, packed, scales, *rest: group_scaled_gemm(x, packed, scales, tactic=Tactic((64, 16, 128))),
    ):
        with pytest.raises(ArithmeticError, match="elements of a trial"):
            check_gemm(other, cpu)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("x_kind", KINDS)
@pytest.mark.parametrize("scale_kind", SCALES)
def test_cuda_gives_the_same_bits(x_kind: str, scale_kind: str) -> None:
    arguments = problem(11, x_kind, scale_kind, batch=3, rows=70, columns=600, groups=36)
    for tile_k, tile_n in ((128, 16), (128, 64)):
        got = group_scaled_gemm(
            *(tensor.cuda() for tensor in arguments), tactic=Tactic((64, tile_n, tile_k))
        ).cpu()
        bits.assert_same(got, group_scaled_gemm(*arguments, tactic=Tactic((64, tile_n, tile_k))))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_cuda_device_that_is_not_the_current_one() -> None:
    arguments = problem(15, "wide", "any", batch=2, rows=5, columns=300, groups=12)
    assert torch.cuda.current_device() == 0
    got = group_scaled_gemm(*(tensor.to("cuda:1") for tensor in arguments))
    assert got.device == torch.device("cuda:1")
    bits.assert_same(got.cpu(), group_scaled_gemm(*arguments))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("x_kind", KINDS)
def test_cuda_without_triton(x_kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "_gemm_on", lambda device: fast._gemm_by_cpu)
    arguments = problem(11, x_kind, "any", batch=3, rows=20, columns=300, groups=36)
    got = group_scaled_gemm(*(tensor.cuda() for tensor in arguments)).cpu()
    bits.assert_same(got, group_scaled_gemm(*arguments))


def test_without_the_triton_kernel_a_warning_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")

    def fail(*arguments: object) -> None:
        raise ArithmeticError("3 of 512 elements of a trial are wrong")

    monkeypatch.setattr(fast, "check_gemm", fail)
    message = "Triton kernel does not run here: ArithmeticError: 3 of 512 elements"
    with pytest.warns(RuntimeWarning, match=message):
        gemm = fast._gemm_on.__wrapped__(torch.device("cuda"))
    arguments = problem(16, "wide", "any", rows=2, groups=4)
    swapped = torch.tensor([[True, False]])
    bits.assert_same(
        gemm(*arguments, [0, 1, 2, 3], swapped), gemm_in_order(*arguments, [0, 1, 2, 3], swapped)
    )
