"""Kernels that sum in another order than the SM90 kernel: what is told of them in either mode."""

from __future__ import annotations

import torch
from torch import Tensor

from mxfp4ref.conformance import Kernel, Options, run_case
from mxfp4ref.conformance.adapters import whole_arguments
from mxfp4ref.conformance.attribution import attribution
from mxfp4ref.conformance.bounds import bound
from mxfp4ref.conformance.families.slot_kinds import position_in_expert
from mxfp4ref.conformance.reduction import local_experts
from mxfp4ref.goldens import open_goldens
from mxfp4ref.model.call import MoeCall

GOLDENS = open_goldens()
CASE = "activation/plain_special_values"
RIGHT = GOLDENS.load(CASE).outputs[128, 128]
LARGE = sorted(RIGHT[3].abs().topk(2).indices.tolist())  # columns of token 3


def near() -> tuple[int, int, int]:
    """An element that may be the next larger number by its bounds, of token 0."""
    free = (bound(GOLDENS.load(CASE).call()).upper[0] > RIGHT[0].float()) & (RIGHT[0] > 0)
    return 0, int(free.nonzero()[0]), 1


def off(*places: tuple[int, int, int]) -> Kernel:
    """The expected output, but for elements (token, column) whose bits have so much added; 128 doubles one."""

    def kernel(kind: str, call: MoeCall) -> Tensor:
        bits = RIGHT.clone().view(torch.int16)
        for token, column, by in places:
            bits[token, column] += by
        return bits.view(torch.bfloat16)

    return Kernel("off", ("moe",), whole_arguments, kernel)


def test_what_is_told_of_one_element_is_of_one_outside_its_bounds() -> None:
    """Not of one that another order of summation may give, though it comes first."""
    kernel = off(near(), (3, LARGE[0], 128), (3, LARGE[1], 128))
    result = run_case(kernel, GOLDENS.load(CASE), Options(mode="bounded", repeat=False, diagnosis="quick"))
    assert (result.status, result.differing, result.outside) == ("outside bounds", 3, 2)
    assert result.diagnosis is not None
    assert result.diagnosis.first.index == (3, LARGE[0])
    assert "token 0" not in result.diagnosis.stage


def test_what_the_other_slot_of_a_token_brings_about_is_no_place() -> None:
    """Rows 16 and more of an expert are wrong: rows of the tokens' other slots are none that differ."""
    call = GOLDENS.load("gemm/uneven_experts").call()
    position, _ = position_in_expert(local_experts(call))
    mask = (position >= 16).any(1)[:, None].expand(-1, call.experts.hidden_size).contiguous()
    rows = [row for row in attribution(call, mask) if row.by == "row of an expert, by 4"]
    assert any(row.differing for row in rows)
    assert all(row.differing == (row.elements if int(row.place.split()[0]) >= 16 else 0) for row in rows)
