"""Tensors that are written into: never elements that overlap, never memory of an input; else, with these bits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mxfp4ref.formats.mxfp4 import dequantize
from tests.helpers.drop_in import EXPECTED, EXPERTS, SM90_CALL, oracle

M, H = EXPECTED.shape


def bf16(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


OUTPUTS: dict[str, tuple[bool, Callable[[], Tensor]]] = {
    "as_strided, rows one apart": (False, lambda: bf16(M * H).as_strided((M, H), (1, 1))),
    "as_strided, rows half a row apart": (False, lambda: bf16(M * H).as_strided((M, H), (H // 2, 1))),
    "unfold": (False, lambda: bf16(M * H).unfold(0, H, H // 2)[:M]),
    "expanded": (False, lambda: bf16(1, H).expand(M, H)),
    "rows in one another's gaps": (True, lambda: bf16(2 * M * H).as_strided((M, H), (1, M))),
    "transposed": (True, lambda: bf16(H, M).t()),
    "every second": (True, lambda: bf16(M, 2 * H)[:, ::2]),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_the_drop_in(name: str) -> None:
    writable, make = OUTPUTS[name]
    output = make()
    if writable:
        oracle(output=output)
        assert torch.equal(output.contiguous().view(torch.int16), EXPECTED.view(torch.int16))
    else:
        with pytest.raises(
            ValueError, match=r"^output: expected .* to be written into, got one whose elements overlap"
        ):
            oracle(output=output)
        assert not output.any()


def test_the_drop_in_and_its_inputs() -> None:
    buffer = torch.zeros(2 * M * H, dtype=torch.bfloat16)
    x = buffer[: M * H].view(M, H)
    x.copy_(SM90_CALL.input)
    for start in (1, H, M * H - 1):
        with pytest.raises(ValueError, match=r"^output: .* got one that shares memory with input$"):
            oracle(input=x, output=buffer[start : start + M * H].view(M, H))
    assert torch.equal(x, SM90_CALL.input)
    oracle(input=x, output=buffer[M * H :].view(M, H))
    assert torch.equal(buffer[M * H :].view(M, H).view(torch.int16), EXPECTED.view(torch.int16))
    weights = SM90_CALL.experts.fc1_weights.clone()
    inside = weights.flatten().view(torch.bfloat16)[: M * H].view(M, H)
    with pytest.raises(ValueError, match="shares memory with fc1_expert_weights"):
        oracle(fc1_expert_weights=weights, output=inside)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dequantize(dtype: torch.dtype) -> None:
    packed, scales = EXPERTS.fc1_weights[0], EXPERTS.fc1_scales[0]
    expected = dequantize(packed, scales, dtype=dtype)
    buffer = torch.zeros(expected.numel() + packed.numel() + scales.numel(), dtype=dtype)
    out = buffer[: expected.numel()].view(expected.shape)
    raw = buffer.view(torch.uint8)
    for name, given in (("packed", packed), ("scales", scales)):
        for start in (0, 64, out.numel() * out.element_size() - 1):
            inside = raw[start : start + given.numel()].view(given.shape)
            inside.copy_(given)
            with pytest.raises(
                ValueError, match=rf"^out: expected .* got one that shares memory with {name}$"
            ):
                dequantize(**{"packed": packed, "scales": scales, name: inside}, dtype=dtype, out=out)
            assert torch.equal(inside, given)
    beside = raw[out.numel() * out.element_size() :][: packed.numel()].view(packed.shape)
    beside.copy_(packed)
    assert dequantize(beside, scales, dtype=dtype, out=out) is out
    assert torch.equal(out.view(torch.uint8), expected.view(torch.uint8))
