"""Calls of the forward that leave the ordinary range, and their traces."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from functools import cache
from typing import Any

import numpy as np
import torch

from mxfp4ref.formats.experts import Experts
from mxfp4ref.formats.mxfp4 import pack_codes, unpack_codes
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import MoeTrace, trace
from tests.helpers import bits, layers

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


HARD = ("ordinary", "wide", "cancelling", "nonfinite", "tiny", "huge", "scale ends")


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


EXPERTS = layers.random_experts(5, hidden=256, inner=128, biases=True, parameters=layers.PARAMETERS)
CALL = layers.random_call(5, EXPERTS, tokens=12, top_k=3)
DENSE_CALL = layers.random_call(
    6,
    layers.random_experts(6, hidden=96, inner=64, biases=True, parameters=layers.PARAMETERS, quantized=False),
    tokens=7,
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
