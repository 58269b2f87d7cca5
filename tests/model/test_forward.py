"""The whole forward: against slow transcriptions, and what may not change a bit (`docs/arithmetic.md`, 3 to 5)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mxfp4ref.formats.experts import Experts
from mxfp4ref.formats.generations import BYTEWISE, GENERATIONS, Generation
from mxfp4ref.formats.mxfp4 import pack_codes, unpack_codes
from mxfp4ref.model import forward as moe
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.dense import dense_gemm
from mxfp4ref.model.forward import DENSE, KERNEL, MoeTrace, Stages, forward, select_local, trace
from mxfp4ref.sm90 import fp32
from mxfp4ref.sm90.finalize import finalize
from mxfp4ref.sm90.gemm.reference import group_scaled_gemm_reference
from mxfp4ref.sm90.swiglu import swiglu
from mxfp4ref.sm90.tactics import Sm90Kernel
from tests.helpers import bits, exact, layers
from tests.helpers.modes import MODES, all_modes, forget_constants

ALL = layers.PARAMETERS
TRACE_NAMES = [field.name for field in fields(MoeTrace)]


def assert_same_trace(got: MoeTrace, expected: MoeTrace) -> None:
    for name in TRACE_NAMES:
        bits.assert_same(getattr(got, name), getattr(expected, name))


def routed_slots(call: MoeCall) -> Iterator[tuple[int, int, int, int]]:
    """Token, slot, this rank's expert and the row's position among the expert's."""
    start = call.ep_rank * call.experts.num_experts
    position = [0] * call.experts.num_experts
    for token, ids in enumerate(call.token_selected_experts.tolist()):
        for slot, expert in enumerate(ids):
            if start <= expert < start + call.experts.num_experts and expert not in ids[:slot]:
                yield token, slot, expert - start, position[expert - start]
                position[expert - start] += 1


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


def make_hard(call: MoeCall, seed: int, kind: str) -> MoeCall:
    """Inputs, scales and weights that leave the ordinary range."""
    rng = np.random.default_rng(seed)
    x, experts, weights = call.input, call.experts, call.token_final_scales
    assert experts.fc1_scales is not None
    assert experts.fc2_scales is not None
    fc1_scales, fc2_scales = experts.fc1_scales, experts.fc2_scales
    if kind == "wide":
        x = bits.bf16(rng.integers(0, 2, x.shape) << 15 | rng.integers(0x3000, 0x4800, x.shape))
    elif kind == "cancelling":
        half = x.shape[1] // 2
        x = torch.cat([x[:, :half], -x[:, :half]], 1)
        codes = unpack_codes(experts.fc1_weights)
        codes[..., half:] = codes[..., :half]
        experts = replace(experts, fc1_weights=pack_codes(codes))
    elif kind == "nonfinite":
        special = bits.bf16(rng.choice([0x7F80, 0xFF80, 0x7FC0, 0x7F7F, 0x0001, 0x8000], x.shape))
        x = torch.where(torch.from_numpy(rng.random(x.shape) < 0.5 / x.shape[1]), special, x)
        wild = bits.fp32(rng.choice([0, 0x80000000, 1, 0x7F800000, 0x7FC00000, 0x7F7FFFFF], weights.shape))
        weights = torch.where(torch.from_numpy(rng.random(weights.shape) < 0.2), wild, weights)
    elif kind == "tiny":
        x = x * 2.0**-60
        fc1_scales, fc2_scales = fc1_scales - 60, fc2_scales.clone()
        fc2_scales[..., :2] = 5
    elif kind == "huge":
        x = x * 2.0**100
        fc2_scales = fc2_scales + 100
    elif kind == "scale ends":
        for scales in (fc1_scales, fc2_scales):
            ends = torch.from_numpy(rng.choice([0, 1, 254, 255], scales.shape).astype(np.uint8))
            scales[torch.from_numpy(rng.random(scales.shape) < 0.05)] = 0
            scales.copy_(torch.where(torch.from_numpy(rng.random(scales.shape) < 0.002), ends, scales))
    experts = replace(experts, fc1_scales=fc1_scales, fc2_scales=fc2_scales)
    return replace(call, input=x, experts=experts, token_final_scales=weights)


HARD = ("ordinary", "wide", "cancelling", "nonfinite", "tiny", "huge", "scale ends")


@settings(max_examples=30)
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
    bits.assert_same(forward(call), slow_forward(call))
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


# --- what may not change a bit ----------------------------------------------------------------------------

EXPERTS = layers.random_experts(5, hidden=256, inner=128, biases=True, parameters=ALL)
CALL = layers.random_call(5, EXPERTS, tokens=12, top_k=3)
DENSE_CALL = layers.random_call(
    6, layers.random_experts(6, hidden=96, inner=64, biases=True, parameters=ALL, quantized=False), tokens=7
)
CALLS = {
    "ordinary": CALL,
    "wide": make_hard(CALL, 1, "wide"),
    "nonfinite": make_hard(CALL, 2, "nonfinite"),
    "tiny": make_hard(CALL, 3, "tiny"),
    "bf16": DENSE_CALL,
}


@cache
def expected_trace(name: str) -> MoeTrace:
    return trace(CALLS[name])


def test_the_calls_exercise_what_they_say() -> None:
    assert torch.isfinite(expected_trace("ordinary").output).all()
    assert torch.isnan(expected_trace("nonfinite").output).any()
    lowest = expected_trace("tiny").fc1_accumulators.abs()
    assert 0 < lowest[lowest > 0].min() < 2.0**-100


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("mode", MODES)
def test_modes(mode: str, name: str) -> None:
    with MODES[mode]():
        got = forward(CALLS[name])
    bits.assert_same(got, expected_trace(name).output)


def test_all_modes_at_once() -> None:
    """In the trace too, with constants made in these modes, which must do afterwards as well."""
    for name in CALLS:
        expected_trace(name)
    forget_constants()
    try:
        with all_modes():
            got = {name: trace(call) for name, call in CALLS.items()}
        for name, call in CALLS.items():
            assert_same_trace(got[name], expected_trace(name))
            bits.assert_same(forward(call), expected_trace(name).output)
    finally:
        forget_constants()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_caller(backend: str) -> None:
    """The forward stays out of a caller's graph, whose fused operations would round otherwise."""

    def caller(x: Tensor) -> Tensor:
        doubled = x * 2
        output = forward(replace(CALL, input=doubled))
        return output + doubled

    expected = caller(CALL.input)
    torch.compiler.reset()
    try:
        bits.assert_same(torch.compile(caller, backend=backend)(CALL.input), expected)
    finally:
        torch.compiler.reset()


def test_arguments_are_left_alone() -> None:
    tensors = {"input": CALL.input, "ids": CALL.token_selected_experts, "scales": CALL.token_final_scales}
    tensors |= {f.name: getattr(EXPERTS, f.name) for f in fields(Experts)}
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    for call in CALLS.values():
        trace(call)
    for name, tensor in tensors.items():
        bits.assert_same(tensor, copies[name])


def test_no_gradients() -> None:
    x = CALL.input.clone().requires_grad_()
    weights = CALL.token_final_scales.clone().requires_grad_()
    got = forward(replace(CALL, input=x, token_final_scales=weights))
    assert not got.requires_grad
    bits.assert_same(got, forward(CALL))
    dense = DENSE_CALL.experts
    trained = replace(dense, fc1_weights=torch.nn.Parameter(dense.fc1_weights))
    bits.assert_same(forward(replace(DENSE_CALL, experts=trained)), forward(DENSE_CALL))


def test_strides_do_not_matter() -> None:
    def strided(tensor: Tensor) -> Tensor:
        return torch.stack([tensor, tensor], -1)[..., 0]

    for name in ("ordinary", "tiny", "bf16"):
        call = CALLS[name]
        values = {f.name: getattr(call.experts, f.name) for f in fields(Experts)}
        experts = replace(call.experts, **{n: None if t is None else strided(t) for n, t in values.items()})
        got = forward(
            replace(
                call,
                input=strided(call.input),
                token_selected_experts=strided(call.token_selected_experts),
                token_final_scales=strided(call.token_final_scales),
                experts=experts,
            )
        )
        bits.assert_same(got, forward(call))


@pytest.mark.parametrize("name", CALLS)
def test_token_by_token(name: str) -> None:
    """Default tactic: positions have no effect, nor has anything else of the other tokens."""
    call = CALLS[name]
    single = [forward(call.select(slice(t, t + 1))) for t in range(call.num_tokens)]
    bits.assert_same(torch.cat(single), expected_trace(name).output)


@pytest.mark.parametrize("name", CALLS)
def test_order_of_tokens(name: str) -> None:
    call = CALLS[name]
    order = torch.from_numpy(np.random.default_rng(1).permutation(call.num_tokens))
    shuffled = replace(
        call,
        input=call.input[order],
        token_selected_experts=call.token_selected_experts[order],
        token_final_scales=call.token_final_scales[order],
    )
    bits.assert_same(forward(shuffled), expected_trace(name).output[order])


@pytest.mark.parametrize("name", CALLS)
def test_order_of_experts(name: str) -> None:
    call = CALLS[name]
    order = torch.from_numpy(np.random.default_rng(2).permutation(call.experts.num_experts))
    new_id = torch.argsort(order)
    ids = call.token_selected_experts.long()
    ids = torch.where(ids < 0, -1, new_id[ids.clamp(min=0)]).to(torch.int32)
    renamed = replace(call, experts=call.experts.select(order), token_selected_experts=ids)
    bits.assert_same(forward(renamed), expected_trace(name).output)


@pytest.mark.parametrize("name", [name for name in CALLS if name != "bf16"])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_sm90_layouts(name: str, generation: Generation) -> None:
    call = replace(CALLS[name], experts=layers.to_sm90(CALLS[name].experts, generation))
    assert_same_trace(trace(call), expected_trace(name))


# --- positions, and more tokens than are computed at once -------------------------------------------------


def underflowing_call(tokens: int, **options: Any) -> MoeCall:
    """One expert whose first pair in GEMM1 underflows, so that the rows 0, 2, 4, 6 of a swapping tile differ.

    Group 0 gives 1.5 * 2^-127 and group 1 2^-126 in every column; group 2 makes the gate 8.
    """
    x = torch.zeros(tokens, 256)
    x[:, 0], x[:, 32], x[:, 64] = 1.5 * 2.0**-64, 2.0**-126, 8.0
    fc1_scales = torch.full((1, 256, 8), 127, dtype=torch.uint8)
    fc1_scales[..., 0] = 64
    ones = torch.full((1, 256, 256), 2, dtype=torch.uint8)
    fc1_codes = ones.clone()
    fc1_codes[:, :128, 64] = 0  # not up
    return MoeCall(
        input=x.to(torch.bfloat16),
        token_selected_experts=torch.zeros(tokens, 1, dtype=torch.int32),
        token_final_scales=torch.full((tokens, 1), 2.0**100),
        experts=Experts(
            fc1_weights=pack_codes(fc1_codes),
            fc1_scales=fc1_scales,
            fc2_weights=pack_codes(ones[..., :128]),
            fc2_scales=torch.full((1, 256, 4), 127, dtype=torch.uint8),
        ),
        **options,
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
    monkeypatch.setattr(moe, "_TOKENS_AT_ONCE", at_once)
    for call, whole in zip(calls, expected, strict=True):
        bits.assert_same(forward(call), whole.output)
        assert_same_trace(trace(call), whole)


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


# --- trace and stages -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CALLS)
def test_trace_is_the_forward_stage_by_stage(name: str) -> None:
    call = CALLS[name]
    experts, got = call.experts, trace(call)
    bits.assert_same(got.output, forward(call))
    expected = sorted((expert, token, slot) for token, slot, expert, _ in routed_slots(call))
    assert list(zip(got.expert.tolist(), got.token.tolist(), got.slot.tolist(), strict=True)) == expected
    for index in ("token", "slot", "expert"):
        assert getattr(got, index).dtype == torch.int64

    gemm = group_scaled_gemm_reference if experts.quantized else dense_gemm
    own = experts.select(got.expert)  # one row each
    x = call.input[got.token][:, None]
    bits.assert_same(got.fc1_accumulators, gemm(x, own.fc1_weights, own.fc1_scales)[:, 0])
    bits.assert_same(got.fc1_output, fp32.to_bf16(got.fc1_accumulators))
    alpha, beta, limit = (
        p if p is None else p[:, None] for p in (own.swiglu_alpha, own.swiglu_beta, own.swiglu_limit)
    )
    activation = fp32.to_bf16(swiglu(got.fc1_output, own.fc1_biases, alpha, beta, limit))
    bits.assert_same(got.activation, activation)
    bits.assert_same(
        got.fc2_accumulators, gemm(got.activation[:, None], own.fc2_weights, own.fc2_scales)[:, 0]
    )
    bits.assert_same(got.fc2_output, fp32.to_bf16(got.fc2_accumulators))
    y = torch.zeros(*call.token_selected_experts.shape, experts.hidden_size, dtype=torch.bfloat16)
    y[got.token, got.slot] = got.fc2_output
    local = torch.full(call.token_selected_experts.shape, -1)
    local[got.token, got.slot] = got.expert
    output = fp32.to_bf16(finalize(y, local, call.token_final_scales, experts.fc2_biases))
    bits.assert_same(got.output, output)


STAGE_NAMES = [field.name for field in fields(Stages)]


@pytest.mark.parametrize("name", STAGE_NAMES)
def test_every_stage_can_be_replaced(name: str) -> None:
    """The replacement is what is called, with the arguments of the default, and its result is used."""
    seen = []

    def stage(*args: Any, **kwargs: Any) -> Any:
        result = getattr(KERNEL, name)(*args, **kwargs)
        seen.append(result)
        return torch.full_like(result, -1) if name == "select_local" else torch.zeros_like(result)

    stages = replace(KERNEL, **{name: stage})
    output = forward(replace(CALL, experts=replace(EXPERTS, fc2_biases=None)), stages)
    assert seen
    if name in ("fc1_gemm", "round_fc1"):  # the bias is still there
        assert not torch.equal(output, forward(CALL))
    else:
        assert not output.any()


def test_bf16_experts_take_the_dense_stages() -> None:
    bits.assert_same(forward(DENSE_CALL), forward(DENSE_CALL, DENSE))
    assert replace(KERNEL, fc1_gemm=dense_gemm, fc2_gemm=dense_gemm) == DENSE


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", CALLS)
def test_cuda_gives_the_same_bits(name: str) -> None:
    call = CALLS[name]
    moved = replace(
        call,
        input=call.input.cuda(),
        token_selected_experts=call.token_selected_experts.cuda(),
        token_final_scales=call.token_final_scales.cuda(),
        experts=call.experts.to("cuda"),
    )
    got, expected = trace(moved), trace(call)
    for field in TRACE_NAMES:
        bits.assert_same(getattr(got, field).cpu(), getattr(expected, field))
    bits.assert_same(forward(moved).cpu(), expected.output)
