"""Rows by their positions among an expert's rows, and more tokens than are computed at once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mxfp4ref.formats.experts import Experts
from mxfp4ref.formats.generations import BYTEWISE
from mxfp4ref.formats.mxfp4 import pack_codes
from mxfp4ref.model import cpu
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import DENSE, KERNEL, forward, trace
from mxfp4ref.sm90.tactics import Sm90Kernel
from tests.helpers import bits
from tests.helpers.forward_calls import (
    CALL,
    CALLS,
    assert_same_trace,
    make_hard,
    underflowing_call,
)


def swapped_rows(call: MoeCall) -> list[bool]:
    """Which tokens were computed the other way round, judged by GEMM1."""
    values = trace(call).fc1_accumulators[:, 0]
    assert set(values.tolist()) <= {2.0**-126, 1.75 * 2.0**-126}
    return (values == 1.75 * 2.0**-126).tolist()


def test_positions_are_those_among_the_experts_rows() -> None:
    call = underflowing_call(40, kernel=Sm90Kernel.of_tiles((256, 128)))
    assert swapped_rows(call) == [position % 16 in (0, 2, 4, 6) for position in range(40)]
    assert len(set(forward(call)[:, 0].tolist())) == 2, "the difference reaches the output"
    assert swapped_rows(replace(call, kernel=Sm90Kernel.of_tiles((256, 128), (32, 16)))) == [False] * 40
    assert swapped_rows(replace(call, kernel=Sm90Kernel())) == [False] * 40
    assert swapped_rows(replace(call, kernel=Sm90Kernel(generation=BYTEWISE))) == [True] * 40
    # Tokens that are not this expert's take no position.
    ids = call.token_selected_experts.clone()
    ids[::3] = -1
    assert swapped_rows(replace(call, token_selected_experts=ids)) == [
        p % 16 in (0, 2, 4, 6) for p in range(26)
    ]


@pytest.mark.parametrize(("tokens", "skipped"), [(520, 1), (1030, 3)])
def test_positions_continue_over_512_tokens(tokens: int, skipped: int) -> None:
    call = underflowing_call(tokens, kernel=Sm90Kernel.of_tiles((256, 128)))
    call.token_selected_experts[:skipped] = -1
    expected = [position % 16 in (0, 2, 4, 6) for position in range(tokens - skipped)]
    assert swapped_rows(call) == expected
    output = forward(call)
    bits.assert_same(output, trace(call).output)
    values = output[skipped:, 0].tolist()
    swapped, others = (
        {v for v, s in zip(values, expected, strict=True) if s is want} for want in (True, False)
    )
    assert len(swapped) == len(others) == 1
    assert swapped != others
    assert not output[:skipped].any()


def test_each_gemm_has_its_own_tile() -> None:
    """The activation is 2^-15 everywhere; GEMM2's first pair is 1.5 * 2^-127 and 2^-126."""
    x = torch.zeros(20, 128)
    x[:, 0], x[:, 1] = 2.0**-20, 32.0
    fc1_codes = torch.zeros(1, 256, 128, dtype=torch.uint8)
    fc1_codes[:, :128, 0] = fc1_codes[:, 128:, 1] = 2  # up, gate
    fc2_codes = torch.zeros(1, 128, 128, dtype=torch.uint8)
    fc2_codes[..., 0], fc2_codes[..., 32] = 3, 2
    fc2_scales = torch.full((1, 128, 4), 127, dtype=torch.uint8)
    fc2_scales[..., 0], fc2_scales[..., 1] = 15, 16
    call = MoeCall(
        input=x.to(torch.bfloat16),
        token_selected_experts=torch.zeros(20, 1, dtype=torch.int32),
        token_final_scales=torch.full((20, 1), 2.0**100),
        experts=Experts(
            fc1_weights=pack_codes(fc1_codes),
            fc1_scales=torch.full((1, 256, 4), 127, dtype=torch.uint8),
            fc2_weights=pack_codes(fc2_codes),
            fc2_scales=fc2_scales,
        ),
    )
    assert trace(call).activation.unique().tolist() == [2.0**-15]
    for tile_n, swaps in (((16, 64), True), ((64, 16), False), ((128, 128), True), ((128, 256), False)):
        expected = [1.75 if swaps and row in (0, 2, 4, 6) else 1.0 for row in range(20)]
        output = forward(replace(call, kernel=Sm90Kernel.of_tiles((128, 128), tile_n)))
        assert (output[:, 5] * 2.0**26).tolist() == expected


@pytest.mark.parametrize("at_once", [1, 5, 12])
def test_parts_of_any_length(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    swapping = replace(make_hard(CALL, 3, "tiny"), kernel=Sm90Kernel.of_tiles((256, 128), (16, 64)))
    calls = [*CALLS.values(), swapping, underflowing_call(12, kernel=Sm90Kernel.of_tiles((256, 128)))]
    expected = [trace(call) for call in calls]
    monkeypatch.setattr(cpu, "TOKENS_AT_ONCE", at_once)
    for call, whole in zip(calls, expected, strict=True):
        bits.assert_same(forward(call), whole.output)
        for stages in (None, KERNEL if call.experts.quantized else DENSE):
            assert_same_trace(trace(call, stages), whole)
