"""Routers of published models, against the same rules written down a second time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mxfp4ref.routing.presets import (
    RoutedScaling,
    Routing,
    deepseek_v3,
    deepseek_v4,
    gpt_oss,
    mixtral,
    pack_top_k,
    routing_weights,
    unpack_top_k,
)
from mxfp4ref.routing.scoring import sqrt_softplus
from mxfp4ref.routing.selection import hash_experts, select_experts
from tests.helpers import mpmath_router as exact


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bits(t: Tensor) -> list[list[int]]:
    return t.view(torch.int32).tolist()


def logit_rows(rows_per_kind: int, experts: int, seed: int) -> Tensor:
    """Ordinary, bf16-valued, few-valued (ties), equal, tiny and huge rows."""
    generator = seeded(seed)
    random = torch.randn(7, rows_per_kind, experts, generator=generator)
    kinds = [
        random[0] * 2,
        (random[1] * 3).bfloat16().float(),
        (random[2] * 2).round() / 2,
        random[3, :, :1].expand(-1, experts),
        random[4] * 1e-6,
        random[5] * 40,
        random[6] * 10.0 ** torch.randint(-45, 36, (rows_per_kind, experts), generator=generator),
    ]
    return torch.cat(kinds).contiguous()


def assert_routed(routing: Routing, wanted: list[tuple[list[int], list[np.float32]]]) -> None:
    assert routing.ids.dtype == torch.int32
    assert routing.scales.dtype == torch.float32
    assert routing.ids.tolist() == [ids for ids, _ in wanted]
    assert bits(routing.scales) == [np.array(scales).view(np.int32).tolist() for _, scales in wanted]


# The presets against the transcription


def deepseek_v4_biases(experts: int) -> list[Tensor]:
    """V4-Flash's biases are about 8.08: the biased scores lie on a grid of 2^-20, and some tie."""
    noise = torch.randn(experts, generator=seeded(9))
    return [8.08 + 0.02 * noise, torch.full((experts,), 8.0625), torch.zeros(experts), -noise]


@pytest.mark.parametrize("which", range(4))
def test_deepseek_v4(which):
    logits, bias = logit_rows(80, 16, seed=which), deepseek_v4_biases(16)[which]
    if which == 1:
        logits[:40] = logits[0] + torch.randn(40, 16, generator=seeded(10)) * 1e-6  # ties on the grid only
    factor = (1.5, 2.5, 1.0, 0.3)[which]
    routing = deepseek_v4(logits, bias, top_k=6, routed_scaling_factor=factor)
    rows = zip(logits.tolist(), strict=True)
    assert_routed(routing, [exact.deepseek_v4(row, bias.tolist(), 6, factor) for (row,) in rows])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_deepseek_v4_hash_layers(dtype):
    logits = logit_rows(20, 16, seed=13)
    logits = logits[(logits > -80).all(dim=1)]  # elsewhere six given experts may all score 0
    table = torch.stack([torch.randperm(16, generator=seeded(v))[:6] for v in range(50)]).to(dtype)
    token_ids = torch.randint(0, 50, (len(logits),), generator=seeded(14)).to(dtype)
    routing = deepseek_v4(logits, token_ids=token_ids, tid2eid=table, routed_scaling_factor=1.5)
    wanted = [
        exact.deepseek_v4_hash(row, table[t].tolist(), 1.5)
        for row, t in zip(logits.tolist(), token_ids.tolist(), strict=True)
    ]
    assert_routed(routing, wanted)
    assert not routing.ambiguous.any()


@pytest.mark.parametrize(
    ("experts", "top_k", "n_group", "topk_group"),
    [(16, 4, 4, 2), (16, 8, 8, 4), (12, 3, 3, 1), (16, 6, 1, 1)],
)
@pytest.mark.parametrize("which", range(3))
def test_deepseek_v3(experts, top_k, n_group, topk_group, which):
    logits = logit_rows(24, experts, seed=15)
    noise = torch.randn(experts, generator=seeded(16))
    bias = [noise * 0.1, torch.zeros(experts), -1.0 + 0.25 * noise.round()][which]  # negative sums too
    options = {"top_k": top_k, "n_group": n_group, "topk_group": topk_group}
    routing = deepseek_v3(logits, bias, **options)
    wanted = [
        exact.deepseek_v3(row, bias.tolist(), top_k, n_group, topk_group, 2.5) for row in logits.tolist()
    ]
    assert_routed(routing, wanted)


def test_deepseek_v3_defaults():
    logits, bias = torch.randn(6, 256, generator=seeded(17)), torch.randn(256, generator=seeded(18)) * 0.1
    wanted = [exact.deepseek_v3(row, bias.tolist(), 8, 8, 4, 2.5) for row in logits.tolist()]
    assert_routed(deepseek_v3(logits, bias), wanted)


@pytest.mark.parametrize("experts", [4, 32])
def test_gpt_oss(experts):
    logits = logit_rows(60, experts, seed=19)
    assert_routed(gpt_oss(logits), [exact.gpt_oss(row, 4) for row in logits.tolist()])
    narrow = logits.bfloat16()
    assert_routed(gpt_oss(narrow), [exact.gpt_oss(row, 4) for row in narrow.float().tolist()])


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (20, 5), (3, 3), (1, 1)])
def test_mixtral(experts, top_k):
    logits = logit_rows(40, experts, seed=20)
    assert_routed(mixtral(logits, top_k=top_k), [exact.mixtral(row, top_k) for row in logits.tolist()])


def test_masked_experts_come_last():
    logits = torch.tensor([[-math.inf, 1.0, -math.inf, 0.0, -2.0]])
    for routing in (mixtral(logits, top_k=4), gpt_oss(logits, top_k=4)):
        assert routing.ids.tolist() == [[1, 3, 4, 0]]
        assert routing.scales[0, 3] == 0


def test_bias_selects_but_does_not_weigh():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    bias = torch.tensor([0.0, 0.0, 0.0, 10.0])
    routing = deepseek_v4(logits, bias, top_k=2, routed_scaling_factor=1.0)
    assert routing.ids.tolist() == [[3, 0]]
    scores = sqrt_softplus(logits)
    assert bits(routing.scales) == bits(scores[:, [3, 0]] / (scores[:, 3] + scores[:, 0])[:, None])


def test_no_tokens():
    none = torch.zeros(0, 8)
    bias = torch.zeros(8)
    for routing in (
        deepseek_v4(none, bias, top_k=2, routed_scaling_factor=1.0),
        deepseek_v3(none, bias, top_k=2, n_group=2, topk_group=1),
        gpt_oss(none, top_k=2),
        mixtral(none),
    ):
        assert routing.ids.shape == routing.scales.shape == (0, 2)
        assert routing.ambiguous.shape == (0,)


# Weights


def test_sums_are_taken_in_slot_order():
    scores = torch.tensor([[1.0, 2.0**-24, 2.0**-24]])
    forward = routing_weights(scores, torch.tensor([[0, 1, 2]], dtype=torch.int32), normalize="sum")
    backward = routing_weights(scores, torch.tensor([[2, 1, 0]], dtype=torch.int32), normalize="sum")
    assert bits(forward)[0][0] == 0x3F800000  # 1 + 2^-24 + 2^-24 = 1
    assert bits(backward)[0][2] == 0x3F7FFFFE  # 2^-24 + 2^-24 + 1 = 1 + 2^-23


def test_normalisations():
    scores = torch.tensor([[0.5, 0.25, 3.0]])
    ids = torch.tensor([[2, 0]], dtype=torch.int32)
    assert routing_weights(scores, ids, normalize="none", factor=0.1).tolist() == [
        [np.float32(3) * np.float32(0.1), np.float32(0.5) * np.float32(0.1)]
    ]
    assert bits(routing_weights(scores, ids, normalize="sum", epsilon=0.5)) == bits(
        torch.tensor([[0.75, 0.125]])
    )
    softmax = [float(w) for w in exact.softmax([3.0, 0.5])]
    assert routing_weights(scores, ids, normalize="softmax").tolist() == [softmax]


def test_epsilon_matters_where_all_scores_are_tiny():
    logits = torch.full((1, 4), -50.0)
    scales = deepseek_v3(
        logits, torch.zeros(4), top_k=2, n_group=2, topk_group=1, routed_scaling_factor=1.0
    ).scales
    assert_routed(
        deepseek_v3(logits, torch.zeros(4), top_k=2, n_group=2, topk_group=1, routed_scaling_factor=1.0),
        [exact.deepseek_v3([-50.0] * 4, [0.0] * 4, 2, 2, 1, 1.0)],
    )
    assert float(scales[0, 0]) < 0.04


def test_only_in_weights_puts_the_factor_into_the_weights():
    logits, bias = torch.randn(5, 8, generator=seeded(24)), torch.zeros(8)
    plain = deepseek_v4(logits, bias, top_k=2, routed_scaling_factor=1.0).scales
    for placement in RoutedScaling:
        routing = deepseek_v4(logits, bias, top_k=2, routed_scaling_factor=2.5, routed_scaling=placement)
        factor = 2.5 if placement is RoutedScaling.IN_WEIGHTS else 1.0
        assert bits(routing.scales) == bits(plain * factor)
        assert routing.routed_scaling is placement
        assert routing.routed_scaling_factor == 2.5


# Padding and packing


def test_padded_rows_carry_minus_one_whatever_they_hold():
    logits = torch.randn(6, 8, generator=seeded(25))
    padded = torch.tensor([False, True, False, False, True, True])
    garbage = logits.clone()
    garbage[1], garbage[4], garbage[5, 3] = math.nan, -math.inf, math.inf
    bias = torch.zeros(8)
    table = torch.tensor([[3, 3], [1, 5], [0, 7]])  # the padding token's row is never looked up
    token_ids = torch.tensor([1, -7, 2, 1, 99, 0])
    presets = [
        (deepseek_v4, {"correction_bias": bias, "top_k": 2, "routed_scaling_factor": 1.5}),
        (deepseek_v4, {"tid2eid": table, "token_ids": token_ids, "top_k": 2, "routed_scaling_factor": 1.5}),
        (deepseek_v3, {"correction_bias": bias, "top_k": 2, "n_group": 4, "topk_group": 2}),
        (gpt_oss, {}),
        (mixtral, {}),
    ]
    for preset, options in presets:
        routing = preset(garbage, **options, padded=padded)
        if "token_ids" in options:
            options = options | {"token_ids": token_ids.clamp(1, 2)}
        wanted = preset(logits, **options)
        assert (routing.ids[padded] == -1).all()
        assert (routing.scales[padded] == 0).all()
        assert not routing.ambiguous[padded].any()
        assert routing.ids[~padded].tolist() == wanted.ids[~padded].tolist()
        assert bits(routing.scales[~padded]) == bits(wanted.scales[~padded])


def test_packed_form():
    ids = torch.tensor([[0, 1], [32767, -1]], dtype=torch.int32)
    scales = torch.tensor([[1.0, -2.0], [0.5, 0.0]])
    packed = pack_top_k(ids, scales)
    assert [[word & 0xFFFFFFFF for word in row] for row in packed.tolist()] == [
        [0x00003F80, 0x0001C000],
        [0x7FFF3F00, 0xFFFF0000],
    ]
    assert packed.dtype == torch.int32


@given(st.integers(-1, 32767), st.floats(width=32, allow_nan=False))
def test_unpacking_inverts_packing_up_to_bf16(expert, scale):
    scales = torch.tensor([[scale]], dtype=torch.float32)
    ids, unpacked = unpack_top_k(pack_top_k(torch.tensor([[expert]], dtype=torch.int32), scales))
    assert ids.tolist() == [[expert]]
    assert ids.dtype == torch.int32
    assert bits(unpacked) == bits(scales.bfloat16().float())


def test_every_packed_word_survives():
    words = torch.randint(-(1 << 16), 1 << 31, (100, 8), generator=seeded(26)).to(torch.int32)
    nan = (words & 0x7FFF) > 0x7F80
    words = torch.where(nan, words & ~0x7F80, words)
    assert pack_top_k(*unpack_top_k(words)).tolist() == words.tolist()


# Refusals


def int32(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32)


LOGITS = torch.zeros(2, 8)
BIAS = torch.zeros(8)
TABLE = torch.tensor([[0, 1], [2, 3]])
TOKENS = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: mixtral(LOGITS, top_k=9), ValueError, "top_k: expected an int from 1 to 8, got 9"),
        (lambda: gpt_oss(LOGITS, top_k=0), ValueError, "top_k: .* got 0"),
        (lambda: mixtral(LOGITS, top_k=2.0), TypeError, "top_k: expected an int, got float"),
        (lambda: mixtral(LOGITS[0]), ValueError, r"logits: .*\[M, E\], got float32 \[8\]"),
        (lambda: mixtral(LOGITS.double()), TypeError, "logits: .* got float64"),
        (lambda: mixtral(LOGITS * math.nan), ValueError, r"logits: .* got nan at \[0, 0\]"),
        (lambda: mixtral(LOGITS, padded=torch.zeros(3, dtype=torch.bool)), ValueError, "padded: "),
        (lambda: mixtral(LOGITS, padded=torch.zeros(2)), TypeError, "padded: expected a bool tensor"),
        (lambda: mixtral(LOGITS, ambiguous_ulps=-1.0), ValueError, "ambiguous_ulps: "),
        (lambda: deepseek_v4(LOGITS, BIAS), TypeError, "routed_scaling_factor"),
        (lambda: v4(correction_bias=None), ValueError, "correction_bias, token_ids, tid2eid: .* got none"),
        (lambda: v4(tid2eid=TABLE, token_ids=TOKENS), ValueError, "got correction_bias, token_ids, tid2eid"),
        (lambda: v4(correction_bias=None, tid2eid=TABLE), ValueError, "got tid2eid"),
        (lambda: v4(correction_bias=BIAS[1:]), ValueError, r"correction_bias: .*\[8\], got float32 \[7\]"),
        (lambda: v4(correction_bias=BIAS.bfloat16()), TypeError, "correction_bias: .* got bfloat16"),
        (
            lambda: v4(correction_bias=BIAS * math.nan),
            ValueError,
            r"scores \+ correction_bias: expected no NaN",
        ),
        (lambda: v4(routed_scaling="in_weights"), ValueError, "routed_scaling: .* got 'in_weights'"),
        (lambda: v4(routed_scaling_factor=math.inf), ValueError, "routed_scaling_factor: .* got inf"),
        (lambda: v4(routed_scaling_factor="1"), TypeError, "routed_scaling_factor: .* got str '1'"),
        (lambda: v4(routed_scaling_factor=True), TypeError, "routed_scaling_factor: .* got bool"),
        (lambda: v4_hash(TOKENS + 1), ValueError, r"token_ids: expected ids from 0 to 1, got 2 at \[1\]"),
        (lambda: v4_hash(TOKENS - 1), ValueError, r"token_ids: .* got -1 at \[0\]"),
        (lambda: v4_hash(TOKENS[:1]), ValueError, r"token_ids: .*\[2\], got int64 \[1\]"),
        (lambda: v4_hash(TOKENS.float()), TypeError, "token_ids: .* got float32"),
        (
            lambda: v4_hash(tid2eid=TABLE + 5),
            ValueError,
            r"tid2eid: expected ids from 0 to 7, got 8 at \[1, 1\]",
        ),
        (lambda: v4_hash(tid2eid=TABLE - 1), ValueError, r"tid2eid: .* got -1 at \[0, 0\]"),
        (
            lambda: v4_hash(tid2eid=TABLE * 0),
            ValueError,
            r"tid2eid: expected distinct .* got \[0, 0\] in row 0",
        ),
        (lambda: v4_hash(tid2eid=TABLE[:, :1]), ValueError, r"tid2eid: expected .*\[V, 2\]"),
        (lambda: v4_hash(tid2eid=TABLE[:0]), ValueError, "token_ids: expected ids from 0 to -1"),
        (lambda: hash_experts(TOKENS, TABLE, num_experts=0), ValueError, "num_experts: "),
        (lambda: v3(n_group=3), ValueError, "n_group: expected a divisor of E=8 .* got 3"),
        (lambda: v3(n_group=8), ValueError, "n_group: .* groups of at least 2, got 8"),
        (lambda: v3(n_group=4, topk_group=5), ValueError, "topk_group: expected an int from 1 to 4, got 5"),
        (lambda: v3(n_group=4, topk_group=1, top_k=3), ValueError, "top_k: .* = 2, got 3"),
        (lambda: deepseek_v3(LOGITS, None), TypeError, "correction_bias: .* got NoneType"),
        (
            lambda: select_experts(LOGITS * math.nan, 1),
            ValueError,
            r"scores: expected no NaN, got one at \[0, 0\]",
        ),
        (lambda: weights(int32([0], [8])), ValueError, r"ids: expected ids from 0 to 7, got 8 at \[1, 0\]"),
        (lambda: weights(int32([0], [-1])), ValueError, "ids: .* got -1"),
        (lambda: weights(int32([0])), ValueError, "ids: .*M=2"),
        (lambda: weights(int32([0], [0]).long()), TypeError, "ids: "),
        (lambda: weights(int32([0], [0]), normalize="mean"), ValueError, "normalize: expected one of 'sum'"),
        (lambda: weights(int32([0], [0]), epsilon=-1.0), ValueError, "epsilon: .* at least 0"),
        (lambda: weights(int32([0], [0]), normalize="sum"), ValueError, "scores: .* got 0 in row 0"),
        (
            lambda: pack_top_k(int32([32768]), torch.zeros(1, 1)),
            ValueError,
            "ids: .* from -1 to 32767, got 32768",
        ),
        (lambda: pack_top_k(int32([-2]), torch.zeros(1, 1)), ValueError, "ids: .* got -2"),
        (lambda: pack_top_k(int32([0]), torch.full((1, 1), math.nan)), ValueError, "scales: expected no NaN"),
        (lambda: pack_top_k(int32([0]), torch.zeros(1, 2)), ValueError, "scales: "),
        (lambda: unpack_top_k(torch.zeros(1, 1)), TypeError, "packed: "),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()


def v4(**changes):
    return deepseek_v4(LOGITS, **({"correction_bias": BIAS, "routed_scaling_factor": 1.5} | changes))


def v4_hash(token_ids=TOKENS, tid2eid=TABLE):
    return deepseek_v4(LOGITS, token_ids=token_ids, tid2eid=tid2eid, top_k=2, routed_scaling_factor=1.5)


def v3(**changes):
    return deepseek_v3(LOGITS, BIAS, **({"top_k": 2, "n_group": 2, "topk_group": 1} | changes))


def weights(ids, **changes):
    return routing_weights(LOGITS, ids, **({"normalize": "none"} | changes))
