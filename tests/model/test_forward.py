"""The whole forward against slow transcriptions, and on ranks (`docs/arithmetic.md`, 3 to 5)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mxfp4ref.formats.generations import BYTEWISE
from mxfp4ref.formats.mxfp4 import unpack_codes
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import forward, select_local, trace
from mxfp4ref.sm90 import fp32
from mxfp4ref.sm90.finalize import finalize
from mxfp4ref.sm90.gemm.reference import group_scaled_gemm_reference
from mxfp4ref.sm90.swiglu import swiglu
from mxfp4ref.sm90.tactics import Sm90Kernel
from tests.helpers import bits, exact, layers
from tests.helpers.forward_calls import (
    CALL,
    DENSE_CALL,
    EXPERTS,
    HARD,
    TRACE_NAMES,
    make_hard,
    routed_slots,
)

ALL = layers.PARAMETERS

# --- in fractions, element by element ---------------------------------------------------------------------


def forward_in_fractions(call: MoeCall) -> Tensor:
    experts = call.experts
    bias1, bias2 = experts.fc1_biases, experts.fc2_biases if call.tp_rank == 0 else None
    slots: list[list[tuple[int, list[int], list[int] | None]]] = [[] for _ in range(call.num_tokens)]
    for token, slot, expert, position in routed_slots(call):

        def gemm(x: list[int], number: int, weights: Tensor, scales: Tensor) -> list[int]:
            tactic = call.kernel.tactics[number]
            rule = call.kernel.generation.first_pair_swapped
            swapped = bool(rule(torch.tensor(position), tactic.tile_n, tactic.tile_k))  # noqa: B023
            order = exact.group_order(scales.shape[1], tactic.tile_k)
            rows = zip(unpack_codes(weights).tolist(), scales.tolist(), strict=True)
            return [exact.to_bf16(exact.gemm_element(x, *row, order, swapped=swapped)) for row in rows]

        assert experts.fc1_scales is not None
        assert experts.fc2_scales is not None
        x = bits.bits_of(call.input[token]).tolist()
        fc1 = [v << 16 for v in gemm(x, 0, experts.fc1_weights[expert], experts.fc1_scales[expert])]
        if bias1 is not None:
            fc1 = [
                exact.add(v, b << 16) for v, b in zip(fc1, bits.bits_of(bias1[expert]).tolist(), strict=True)
            ]
        inner = experts.intermediate_size
        alpha, beta, limit = (
            None if p is None else int(bits.bits_of(p[expert]))
            for p in (experts.swiglu_alpha, experts.swiglu_beta, experts.swiglu_limit)
        )
        activation = [
            exact.to_bf16(exact.activation(fc1[inner + i], fc1[i], alpha, beta, limit)) for i in range(inner)
        ]
        y = [v << 16 for v in gemm(activation, 1, experts.fc2_weights[expert], experts.fc2_scales[expert])]
        bias = None if bias2 is None else (bits.bits_of(bias2[expert]) << 16).tolist()
        slots[token].append((int(bits.bits_of(call.token_final_scales[token, slot])), y, bias))
    output = [
        [
            exact.to_bf16(exact.finalize_element((w, y[h], None if b is None else b[h]) for w, y, b in some))
            for h in range(experts.hidden_size)
        ]
        for some in slots
    ]
    return bits.bf16(output)


@pytest.mark.parametrize(
    ("parameters", "biases", "hidden", "inner"),
    [
        ((), False, 128, 128),
        (ALL, True, 128, 128),
        (("swiglu_limit",), False, 384, 128),
        ((), True, 128, 384),
    ],
)
def test_against_fractions(parameters: tuple[str, ...], biases: bool, hidden: int, inner: int) -> None:
    experts = layers.random_experts(
        3, num_experts=2, hidden=hidden, inner=inner, biases=biases, parameters=parameters
    )
    tokens, top_k = (2, 2) if hidden == inner else (1, 1)
    call = layers.random_call(3 if tokens == 2 else 4, experts, tokens=tokens, top_k=top_k)
    assert sum(1 for _ in routed_slots(call)) > tokens - 1
    got = forward(call)
    assert got.unique().numel() > 32
    bits.assert_same(got, forward_in_fractions(call))


# --- slot by slot, with the slow GEMM ---------------------------------------------------------------------


def slow_forward(call: MoeCall) -> Tensor:
    """One row at a time through stages that have been held against fractions."""
    experts = call.experts
    y = torch.zeros(*call.token_selected_experts.shape, experts.hidden_size, dtype=torch.bfloat16)
    local = torch.full(call.token_selected_experts.shape, -1)
    for token, slot, expert, position in routed_slots(call):
        one = experts.select(torch.tensor([expert]))
        tactics = [
            {
                "tactic": call.kernel.tactics[i],
                "generation": call.kernel.generation,
                "positions": torch.tensor([[position]]),
            }
            for i in range(2)
        ]
        x = call.input[token][None, None]
        fc1 = fp32.to_bf16(group_scaled_gemm_reference(x, one.fc1_weights, one.fc1_scales, **tactics[0]))
        act = fp32.to_bf16(
            swiglu(fc1[0], one.fc1_biases, one.swiglu_alpha, one.swiglu_beta, one.swiglu_limit)
        )
        fc2 = group_scaled_gemm_reference(act[None], one.fc2_weights, one.fc2_scales, **tactics[1])
        y[token, slot] = fp32.to_bf16(fc2[0, 0])
        local[token, slot] = expert
    bias = experts.fc2_biases if call.tp_rank == 0 else None
    return fp32.to_bf16(finalize(y, local, call.token_final_scales, bias))


OPTIONS: list[dict[str, Any]] = [
    {},
    {"kernel": Sm90Kernel.of_tiles((256, 128), (16, 64))},
    {"kernel": Sm90Kernel.of_tiles((128, 128), (128, 32))},
    {"kernel": Sm90Kernel(generation=BYTEWISE)},
    {"ep_size": 3, "ep_rank": 1},
    {"ep_size": 2, "ep_rank": 1, "tp_size": 2, "tp_rank": 0},
    {"tp_size": 2, "tp_rank": 1},
]


@settings(max_examples=16)
@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(HARD),
    options=st.sampled_from(OPTIONS),
    parameters=st.lists(st.sampled_from(ALL), unique=True).map(tuple),
    biases=st.booleans(),
    tokens=st.integers(1, 5),
    top_k=st.integers(1, 4),
)
def test_against_the_slow_forward(
    seed: int,
    kind: str,
    options: dict[str, Any],
    parameters: tuple[str, ...],
    biases: bool,
    tokens: int,
    top_k: int,
) -> None:
    experts = layers.random_experts(
        seed, hidden=256, inner=128, biases=biases, parameters=parameters, num_experts=4
    )
    call = make_hard(layers.random_call(seed, experts, tokens=tokens, top_k=top_k, **options), seed, kind)
    bits.assert_same(forward(call), slow_forward(call))


@settings(max_examples=15)
@given(seed=st.integers(0, 2**32 - 1), ep_rank=st.integers(0, 1))
def test_any_ids_without_strictness(seed: int, ep_rank: int) -> None:
    """Ids of nobody are skipped; of an expert that a token names twice the first slot counts."""
    call = layers.random_call(seed, EXPERTS, tokens=4, top_k=4, ep_size=2, ep_rank=ep_rank)
    ids = np.random.default_rng(seed).choice([-(2**31), -2, -1, 0, 1, 3, 4, 6, 8, 2**31 - 1], (4, 4))
    call = replace(call, token_selected_experts=torch.from_numpy(ids.astype(np.int32)), strict=False)
    start = ep_rank * 4
    kept = [
        [e if start <= e < start + 4 and e not in row[:slot] else -1 for slot, e in enumerate(row)]
        for row in ids.tolist()
    ]
    clean = replace(call, token_selected_experts=torch.tensor(kept, dtype=torch.int32), strict=True)
    bits.assert_same(forward(call), forward(clean))


def test_select_local() -> None:
    ids = torch.tensor(
        [[5, 3, 4], [5, 5, 5], [-1, 7, 8], [-1, 4, 4], [2**31 - 1, -(2**31), 6]], dtype=torch.int32
    )
    expected = [[1, -1, 0], [1, -1, -1], [-1, 3, -1], [-1, 0, -1], [-1, -1, 2]]
    got = select_local(ids, 4, 2, 1)
    assert got.dtype == torch.int64
    assert got.tolist() == expected
    assert ids[1].tolist() == [5, 5, 5], "the argument is left alone"


# --- ranks ------------------------------------------------------------------------------------------------


def test_expert_parallel_ranks() -> None:
    """A rank gives what the whole layer gives for the slots of its experts."""
    call = layers.random_call(8, EXPERTS, tokens=9, top_k=4)
    ids = call.token_selected_experts
    for size in (1, 2, 4):
        count = 4 // size
        for rank in range(size):
            own = slice(rank * count, (rank + 1) * count)
            part = replace(call, experts=EXPERTS.slice(own.start, own.stop), ep_size=size, ep_rank=rank)
            masked = torch.where((ids >= own.start) & (ids < own.stop), ids, -1)
            bits.assert_same(forward(part), forward(replace(call, token_selected_experts=masked)))


def test_bias_of_fc2_is_added_on_the_first_tensor_parallel_rank_only() -> None:
    first, second = (replace(CALL, tp_size=2, tp_rank=rank) for rank in (0, 1))
    bits.assert_same(forward(first), forward(CALL))
    without = replace(CALL, experts=replace(EXPERTS, fc2_biases=None))
    bits.assert_same(forward(second), forward(without))
    assert not torch.equal(forward(first), forward(second))


def test_tokens_without_a_local_expert_are_plus_zero() -> None:
    call = replace(
        CALL,
        token_selected_experts=torch.full_like(CALL.token_selected_experts, -1),
        input=CALL.input * torch.nan,
    )
    assert not bits.bits_of(forward(call)).any()
    elsewhere = replace(CALL, ep_size=2, ep_rank=1)
    assert not bits.bits_of(forward(elsewhere)).any()
    assert trace(elsewhere).token.numel() == 0


def test_empty_batch() -> None:
    for call in (CALL, DENSE_CALL):
        empty = call.select(slice(0, 0))
        hidden, inner = call.experts.hidden_size, call.experts.intermediate_size
        assert forward(empty).shape == (0, hidden)
        shapes = {name: tuple(getattr(trace(empty), name).shape) for name in TRACE_NAMES}
        assert shapes == {
            "token": (0,), "slot": (0,), "expert": (0,),
            "fc1_accumulators": (0, 2 * inner), "fc1_output": (0, 2 * inner), "activation": (0, inner),
            "fc2_accumulators": (0, hidden), "fc2_output": (0, hidden), "output": (0, hidden),
        }  # fmt: skip


def test_no_slots() -> None:
    none = replace(
        CALL,
        token_selected_experts=torch.zeros(12, 0, dtype=torch.int32),
        token_final_scales=torch.zeros(12, 0),
    )
    bits.assert_same(forward(none), torch.zeros(12, 256, dtype=torch.bfloat16))
