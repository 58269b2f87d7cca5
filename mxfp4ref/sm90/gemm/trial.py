"""What a compiled GEMM has to get right before it is used: compilers have faults too."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mxfp4ref.formats.generations import WORDWISE
from mxfp4ref.sm90.gemm.order import first_pair_swapped, group_order
from mxfp4ref.sm90.gemm.reference import gemm_in_order
from mxfp4ref.sm90.tactics import Tactic

__all__ = ["check_gemm"]


def check_gemm(gemm: Callable[..., Tensor], device: torch.device) -> None:
    """Hold a GEMM, called like `gemm_in_order`, against that transcription on numbers of every kind.

    Raises:
        ArithmeticError: some of the 512 elements have other bits.
    """
    generator = torch.Generator("cpu").manual_seed(0)

    def random_bytes(*shape: int) -> Tensor:
        return torch.randint(256, shape, dtype=torch.uint8, generator=generator, device="cpu")

    x = random_bytes(1, 8, 768).view(torch.bfloat16)  # any bits
    x[:, :4] = torch.randn(1, 4, 384, generator=generator, device="cpu").to(torch.bfloat16)
    x[:, 2:4, ::3] *= 2.0**-14  # the products of some are cut
    x[:, 1:4:2] *= torch.tensor([[2.0**-80], [2.0**123]], device="cpu")  # near the ends; some sums overflow
    packed, scales = random_bytes(1, 64, 192), random_bytes(1, 64, 12)
    scales[:, :32] = 120 + scales[:, :32] % 8
    scales[:, 47] = 0
    scales[:, 48:, :2] = 254  # each of the first two products overflows, so that their order shows
    order = group_order(12, 128)
    swapped = first_pair_swapped(x, None, Tactic((64, 64, 128)), WORDWISE)
    expected = gemm_in_order(x, packed, scales, order, swapped)
    got = gemm(*(tensor.to(device) for tensor in (x, packed, scales)), order, swapped.to(device)).cpu()
    differing = int((got.view(torch.int32) != expected.view(torch.int32)).sum())
    if differing:
        raise ArithmeticError(f"{differing} of {got.numel()} elements of a trial are wrong")
