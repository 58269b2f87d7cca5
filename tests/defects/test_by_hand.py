"""Some defects made in another way than theirs, so that they are what their summary says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mxfp4ref.defects import DEFECTS, DequantizeCall, dequantize_call
from mxfp4ref.defects.definition import logical
from mxfp4ref.defects.weights import requantized
from mxfp4ref.formats.experts import Sm90Experts
from mxfp4ref.formats.generations import BYTEWISE
from mxfp4ref.formats.layout import (
    fold_scales_sm90,
    halves_to_interleaved,
    interleave_weights_sm90,
    swap_gate_up,
)
from mxfp4ref.formats.mxfp4 import decode_ue8m0, dequantize
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import forward
from tests.helpers.defect_outputs import as_bytes, build, defect_bytes, reference_bytes


def changed(call: MoeCall, **fields: Tensor) -> MoeCall:
    return replace(call, experts=replace(call.experts, **fields))


def on_fc1(call: MoeCall, change: Callable[[Tensor], Tensor]) -> MoeCall:
    fields = ("fc1_weights", "fc1_scales", "fc1_biases")
    return changed(call, **{field: change(getattr(call.experts, field)) for field in fields})


@pytest.mark.parametrize(
    ("name", "stored"),
    [("gate_up_interleaved", halves_to_interleaved), ("gate_up_swapped", swap_gate_up)],
)
def test_wrong_row_order_suits_rows_in_that_order(name: str, stored: Callable[[Tensor], Tensor]) -> None:
    call = build("moe", "every_option")
    assert as_bytes(DEFECTS[name].run(on_fc1(call, stored))) == reference_bytes("moe", "every_option")


@pytest.mark.parametrize(
    ("name", "interleave", "fold"),
    [
        ("weights_not_interleaved", lambda w: w, fold_scales_sm90),
        (
            "weights_interleaved_twice",
            lambda w: interleave_weights_sm90(interleave_weights_sm90(w)),
            fold_scales_sm90,
        ),
        ("weights_interleaved_old", lambda w: interleave_weights_sm90(w, BYTEWISE), fold_scales_sm90),
        ("scales_not_folded", interleave_weights_sm90, lambda s: s.view(fold_scales_sm90(s).shape)),
        (
            "scales_folded_old",
            interleave_weights_sm90,
            lambda s: fold_scales_sm90(s, BYTEWISE).view(fold_scales_sm90(s).shape),
        ),
        (
            "scales_folded_new",
            lambda w: interleave_weights_sm90(w, BYTEWISE),
            lambda s: fold_scales_sm90(s).view(fold_scales_sm90(s, BYTEWISE).shape),
        ),
    ],
)
def test_wrong_layout_is_what_the_real_call_would_read(
    name: str, interleave: Callable[[Tensor], Tensor], fold: Callable[[Tensor], Tensor]
) -> None:
    call = build("moe", "every_option")
    tensors = {field: getattr(call.experts, field) for field in call.experts.__dataclass_fields__}
    for fc in ("fc1", "fc2"):
        tensors[f"{fc}_weights"] = interleave(tensors[f"{fc}_weights"])
        tensors[f"{fc}_scales"] = fold(tensors[f"{fc}_scales"])
    given = replace(call, experts=Sm90Experts(**tensors))
    assert as_bytes(forward(given)) == defect_bytes(name, "every_option")


def test_padding_at_the_end_of_the_fused_tensor() -> None:
    call = build("moe", "padded_halves")

    def pad_at_the_end(fc1: Tensor) -> Tensor:
        used = torch.cat((fc1[:, :96], fc1[:, 128:224]), 1)
        return torch.cat((used, torch.zeros_like(fc1[:, :64])), 1)

    expected = forward(on_fc1(call, pad_at_the_end))
    assert as_bytes(expected) == defect_bytes("padding_end_of_fused", "padded_halves")


def test_scale_truncated_requantises() -> None:
    """Against the values: scales 2^floor(log2(amax / 6)), elements saturated at 6 scales."""
    call = build("moe", "every_option")
    packed, scales = call.experts.fc2_weights, call.experts.fc2_scales
    values = dequantize(packed, scales, dtype=torch.float64).view(*scales.shape, 32)
    largest = values.abs().amax(-1)
    truncated = 2.0 ** (largest / 6).log2().floor()
    truncated = torch.where(2 * truncated * 6 <= largest, 2 * truncated, truncated)  # 6 * 2^n exactly
    wanted = values.clamp(-6 * truncated[..., None], 6 * truncated[..., None])
    codes, bytes_ = requantized(packed, scales)
    assert torch.equal(dequantize(codes, bytes_, dtype=torch.float64).view(wanted.shape), wanted)
    assert torch.equal(decode_ue8m0(bytes_, dtype=torch.float64), truncated)


def test_known_bits() -> None:
    """A few defects by hand, so that an error common to a defect and the calls above would show."""
    call = DequantizeCall(
        torch.tensor([[0x98] * 16], dtype=torch.uint8), torch.tensor([[127]], dtype=torch.uint8)
    )
    assert as_bytes(dequantize_call(call))[:4] == bytes([0x00, 0x80, 0x00, 0xBF])  # -0, -0.5
    assert as_bytes(DEFECTS["minus_zero_lost"].run(call))[:4] == bytes([0x00, 0x00, 0x00, 0xBF])


def test_takes_sm90_layouts() -> None:
    call: MoeCall = build("moe", "every_option")
    tensors = {field: getattr(call.experts, field) for field in call.experts.__dataclass_fields__}
    for fc in ("fc1", "fc2"):
        tensors[f"{fc}_weights"] = interleave_weights_sm90(tensors[f"{fc}_weights"])
        tensors[f"{fc}_scales"] = fold_scales_sm90(tensors[f"{fc}_scales"]).view(torch.int32)
    folded = replace(call, experts=Sm90Experts(**tensors))
    assert as_bytes(DEFECTS["nibble_order"].run(folded)) == defect_bytes("nibble_order", "every_option")


def test_refuses_bf16_experts() -> None:
    call: MoeCall = build("moe", "limit_alone")
    dense = replace(
        call.experts,
        fc1_weights=torch.zeros(4, 256, 512, dtype=torch.bfloat16),
        fc1_scales=None,
        fc2_weights=torch.zeros(4, 512, 128, dtype=torch.bfloat16),
        fc2_scales=None,
    )
    with pytest.raises(ValueError, match="experts: expected MXFP4"):
        logical(replace(call, experts=dense))
