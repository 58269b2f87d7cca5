from __future__ import annotations

import math
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import forward
from mxfp4ref.model.layer import finish_output, moe_layer
from mxfp4ref.model.parallel import Ranks, forward_all_ranks
from mxfp4ref.routing.presets import RoutedScaling, Routing, deepseek_v3, deepseek_v4, gpt_oss, mixtral
from mxfp4ref.sm90.tactics import Sm90Kernel
from tests.helpers import layers

E, H, I, M = 8, 128, 128, 5  # noqa: E741


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


EXPERTS = layers.random_experts(0, num_experts=E, hidden=H, inner=I)
HIDDEN = torch.randn(M, H, generator=seeded(1)).bfloat16()
LOGITS = torch.randn(M, E, generator=seeded(2)) * 2
SHARED = torch.randn(M, H, generator=seeded(3)).bfloat16() * 4
BIAS = 8.08 + 0.02 * torch.randn(E, generator=seeded(4))
V4 = partial(deepseek_v4, correction_bias=BIAS, top_k=3, routed_scaling_factor=2.3)


def bits(t: Tensor) -> list[list[int]]:
    assert t.dtype == torch.bfloat16
    return t.view(torch.int16).tolist()


# The rounding of each placement, transcribed with fractions


def rounded(value: Fraction, digits: int, smallest: int) -> Fraction:
    """To nearest even at so many binary digits, on the subnormal grid below."""
    if value == 0:
        return value
    exponent = math.floor(math.log2(abs(value.numerator)) - math.log2(value.denominator))
    exponent += 1 if abs(value) >= Fraction(2) ** (exponent + 1) else 0
    exponent -= 1 if abs(value) < Fraction(2) ** exponent else 0
    quantum = Fraction(2) ** max(exponent - digits + 1, smallest)
    return round(value / quantum) * quantum


def to_float32(value: Fraction) -> Fraction:
    return rounded(value, 24, -149)


def to_bf16(value: Fraction) -> Fraction:
    return rounded(to_float32(value), 8, -133)


def transcription(placement: RoutedScaling, r: Fraction, f: Fraction, s: Fraction | None) -> Fraction:
    if placement is RoutedScaling.FUSED_WITH_SHARED_ADD_BF16:
        return to_bf16(s + f * r)
    if placement is RoutedScaling.ON_OUTPUT_BF16:
        r = to_bf16(r * f)
    return r if s is None else to_bf16(s + r)


bf16 = st.integers(-0x7E80, 0x7E80).map(  # up to 2^126: no sum or product overflows
    lambda word: torch.tensor([[abs(word) | (-0x8000 if word < 0 else 0)]], dtype=torch.int16).view(
        torch.bfloat16
    )
)


@settings(max_examples=200)
@given(bf16, bf16, st.floats(2.0**-10, 1.0, width=32), st.sampled_from(RoutedScaling), st.booleans())
def test_any_rounding(routed, shared, factor, placement, with_shared):
    if placement is RoutedScaling.FUSED_WITH_SHARED_ADD_BF16:
        with_shared = True
    got = finish_output(
        routed,
        shared_output=shared if with_shared else None,
        routed_scaling=placement,
        routed_scaling_factor=factor,
    )
    s = Fraction(shared.item()) if with_shared else None
    assert Fraction(got.item()) == transcription(placement, Fraction(routed.item()), Fraction(factor), s)


@pytest.mark.parametrize(
    ("tail", "wanted"),
    [(2.0**-60, 1 + 2.0**-7), (0.0, 1.0), (-(2.0**-60), 1.0)],
    ids=["above", "tie", "below"],
)
def test_the_fused_add_rounds_once_to_float32(tail, wanted):
    """f * r = 1 + 2^-8 + 2^-24: half a float32 step above a bf16 tie, so that 2^-60 decides twice.

    Neither a product rounded to float32 nor a sum rounded to float64 still knows of it.
    """
    got = finish_output(
        torch.tensor([[3.0]]).bfloat16(),
        shared_output=torch.tensor([[tail]]).bfloat16(),
        routed_scaling=RoutedScaling.FUSED_WITH_SHARED_ADD_BF16,
        routed_scaling_factor=(2**24 + 2**16 + 1) // 3 * 2.0**-24,
    )
    assert got.item() == wanted


def test_the_float32_rounding_of_the_fused_add_comes_between():
    """2^-31 above a bf16 tie: float32 rounds it away, so that the tie goes to even."""
    for tail, wanted in ((2.0**-23, 1.0), (2.0**-15, 1 + 2.0**-7), (0.0, 1.0), (-(2.0**-15), 1.0)):
        got = finish_output(
            torch.tensor([[2.0**-8]]).bfloat16(),
            shared_output=torch.tensor([[1.0]]).bfloat16(),
            routed_scaling=RoutedScaling.FUSED_WITH_SHARED_ADD_BF16,
            routed_scaling_factor=1.0 + tail,
        )
        assert got.item() == wanted


def test_special_values():
    routed = torch.tensor([[math.nan, math.inf, -math.inf, -0.0, 1.0]]).bfloat16()
    shared = torch.tensor([[1.0, 1.0, math.inf, -0.0, math.nan]]).bfloat16()
    for placement in RoutedScaling:
        got = finish_output(routed, shared_output=shared, routed_scaling=placement, routed_scaling_factor=2.0)
        assert [word & 0xFFFF for word in bits(got)[0]] == [0x7FFF, 0x7F80, 0x7FFF, 0x8000, 0x7FFF]


def test_subnormals_are_kept():
    tiny = torch.tensor([[3 * 2.0**-133]]).bfloat16()
    got = finish_output(tiny, routed_scaling=RoutedScaling.ON_OUTPUT_BF16, routed_scaling_factor=0.5)
    assert got.item() == 2 * 2.0**-133  # 1.5 to even
    got = finish_output(
        tiny,
        shared_output=torch.zeros(1, 1).bfloat16(),
        routed_scaling=RoutedScaling.FUSED_WITH_SHARED_ADD_BF16,
        routed_scaling_factor=2.0,
    )
    assert got.item() == 6 * 2.0**-133


# The layer


def by_hand(placement: RoutedScaling, shared: Tensor | None) -> list[list[float]]:
    """The layer from the router's and the kernel's results, the rest in fractions."""
    routing = V4(LOGITS, routed_scaling=placement)
    routed = forward(MoeCall(HIDDEN, routing.ids, routing.scales, EXPERTS))
    factor = Fraction(float(np.float32(2.3)))
    return [
        [
            float(transcription(placement, Fraction(r), factor, None if s is None else Fraction(s)))
            for r, s in zip(routed_row, shared_row, strict=True)
        ]
        for routed_row, shared_row in zip(
            routed.tolist(), [[None] * H] * M if shared is None else shared.tolist(), strict=True
        )
    ]


@pytest.mark.parametrize("placement", RoutedScaling)
def test_every_placement_gives_the_documented_bits(placement):
    got = moe_layer(
        HIDDEN,
        V4(LOGITS, routed_scaling=placement),
        EXPERTS,
        shared_output=SHARED,
    )
    assert got.tolist() == by_hand(placement, SHARED)
    if placement is not RoutedScaling.FUSED_WITH_SHARED_ADD_BF16:
        got = moe_layer(HIDDEN, V4(LOGITS, routed_scaling=placement), EXPERTS)
        assert got.tolist() == by_hand(placement, None)


def test_every_placement_gives_other_bits():
    outputs = [
        bits(
            moe_layer(
                HIDDEN,
                V4(LOGITS, routed_scaling=placement),
                EXPERTS,
                shared_output=SHARED,
            )
        )
        for placement in RoutedScaling
    ]
    for i, one in enumerate(outputs):
        assert all(one != other for other in outputs[:i])


def test_the_default_is_in_the_weights():
    routing = V4(LOGITS)
    plain = V4(LOGITS, routed_scaling=RoutedScaling.NONE)
    factor = torch.tensor(2.3, dtype=torch.float32)
    wanted = forward(MoeCall(HIDDEN, plain.ids, plain.scales * factor, EXPERTS))
    assert bits(moe_layer(HIDDEN, V4(LOGITS), EXPERTS)) == bits(wanted)
    assert routing.routed_scaling is RoutedScaling.IN_WEIGHTS


@pytest.mark.parametrize(
    ("router", "options"),
    [
        (deepseek_v4, {"correction_bias": BIAS, "top_k": 2, "routed_scaling_factor": 1.5}),
        (deepseek_v3, {"correction_bias": BIAS, "top_k": 2, "n_group": 4, "topk_group": 2}),
        (gpt_oss, {}),
        (mixtral, {"top_k": 3}),
    ],
)
def test_presets_with_their_options(router, options):
    routing = router(LOGITS, **options)
    wanted = forward(MoeCall(HIDDEN, routing.ids, routing.scales, EXPERTS))
    assert bits(moe_layer(HIDDEN, routing, EXPERTS)) == bits(wanted)


def test_ranks_and_kernel_are_passed_on():
    routing = gpt_oss(LOGITS)
    call = MoeCall(HIDDEN, routing.ids, routing.scales, EXPERTS)
    for ranks in (Ranks(ep_size=4), Ranks(ep_size=4, reduction="bf16")):
        assert bits(moe_layer(HIDDEN, routing, EXPERTS, ranks=ranks)) == bits(forward_all_ranks(call, ranks))
    ranks = Ranks(tp_size=4)  # shards of 32 columns, padded to 128
    assert bits(moe_layer(HIDDEN, routing, EXPERTS, ranks=ranks)) == bits(forward_all_ranks(call, ranks))
    with pytest.raises(ValueError, match=r"kernel: .* got tactic 64x16x256"):
        moe_layer(HIDDEN, routing, EXPERTS, kernel=Sm90Kernel.of_tiles((256, 128)))


def test_padded_rows_are_the_shared_output_alone():
    padded = torch.arange(M) >= M - 3
    got = moe_layer(HIDDEN, V4(LOGITS, padded=padded), EXPERTS, shared_output=SHARED)
    whole = moe_layer(HIDDEN, V4(LOGITS), EXPERTS, shared_output=SHARED)
    assert bits(got)[: M - 3] == bits(whole)[: M - 3]
    assert bits(got)[M - 3 :] == bits(SHARED)[M - 3 :]
    alone = moe_layer(HIDDEN, V4(LOGITS, padded=padded), EXPERTS)
    assert bits(alone)[M - 3 :] == [[0] * H] * 3


# Refusals


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden": HIDDEN.float()}, TypeError, "hidden: "),
        ({"hidden": HIDDEN[:, :64]}, ValueError, r"hidden: expected .*\[M, 128\]"),
        (
            {"routing": mixtral(LOGITS[1:])},
            ValueError,
            r"routing.ids: expected .*\[5, k\], got int32 \[4, 2\]",
        ),
        (
            {"routing": mixtral(LOGITS.repeat(1, 2))},
            ValueError,
            "token_selected_experts: expected global ids",
        ),
        ({"experts": None}, TypeError, "experts: expected Experts, got NoneType"),
        ({"routing": (LOGITS, LOGITS)}, TypeError, "routing: expected Routing, got tuple"),
        ({"shared_output": SHARED[1:]}, ValueError, r"shared_output: .*\[5, 128\]"),
        ({"shared_output": SHARED.float()}, TypeError, "shared_output: "),
        ({"ranks": 2}, TypeError, "ranks: expected Ranks, got int"),
        ({"ranks": Ranks(ep_size=3)}, ValueError, "ep_size: "),
    ],
)
def test_refusals(changes, error, message):
    arguments = {"hidden": HIDDEN, "routing": mixtral(LOGITS), "experts": EXPERTS} | changes
    with pytest.raises(error, match=message):
        moe_layer(**arguments)


def test_further_refusals():
    with pytest.raises(ValueError, match=r"shared_output: expected a tensor with .*FUSED.*, got None"):
        moe_layer(HIDDEN, V4(LOGITS, routed_scaling=RoutedScaling.FUSED_WITH_SHARED_ADD_BF16), EXPERTS)
    with pytest.raises(ValueError, match="routed_scaling: "):
        finish_output(SHARED, routed_scaling="none")
    with pytest.raises(ValueError, match=r"routed_scaling_factor: .* got nan"):
        finish_output(SHARED, routed_scaling_factor=math.nan)
    with pytest.raises(TypeError, match="routed_output: "):
        finish_output(SHARED.float())


def test_any_routing_will_do():
    ids, scales = torch.zeros(M, 1, dtype=torch.int32), torch.ones(M, 1)
    routing = Routing(ids, scales, torch.zeros(M, dtype=torch.bool))
    wanted = forward(MoeCall(HIDDEN, ids, scales, EXPERTS))
    assert bits(moe_layer(HIDDEN, routing, EXPERTS)) == bits(wanted)
