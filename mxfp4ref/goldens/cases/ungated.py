"""Suite `ungated`: activations without a gate, of which fc1 has I rows.

fc1 and fc2 are one-hot, so that output column j is the activation of input j.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mxfp4ref.formats.experts import Experts
from mxfp4ref.formats.mxfp4 import pack_codes
from mxfp4ref.goldens.cases.definition import Content, define, moe_content
from mxfp4ref.goldens.cases.source import Source
from mxfp4ref.model.call import MoeCall
from mxfp4ref.sm90 import fp32
from mxfp4ref.sm90.activation import ACTIVATIONS, GELU, IDENTITY, RELU, RELU2, SILU
from mxfp4ref.sm90.elementwise import activate

_SIZE, _TOKENS = 128, 16
_PROBES = _SIZE * _TOKENS
_CANDIDATES = 1 << 19
_CODE_ONE = 2
_AROUND = (
    *(0.0, -0.0, 1.0, -1.0, 2.0**-126, -(2.0**-126), 2.0**-130, -(2.0**-133), 2.0**-63, -(2.0**-63)),
    *(2.0**-66, -(2.0**-66), 2.0**62, -(2.0**62), 2.0**100, -(2.0**100)),
)


def _one_hot(num_experts: int = 1) -> Experts:
    codes = pack_codes(torch.eye(_SIZE).to(torch.uint8) * _CODE_ONE).repeat(num_experts, 1, 1)
    scales = torch.full((num_experts, _SIZE, _SIZE // 32), 127, dtype=torch.uint8)
    return Experts(codes, scales, codes.clone(), scales.clone())


def _probe(activation_type: int, values: Tensor, experts: Experts | None = None) -> Content:
    """A call for `[tokens * 128] bf16`; with several experts each gets an equal share of the tokens."""
    experts = _one_hot() if experts is None else experts
    x = values.view(-1, _SIZE)
    expert = torch.arange(len(x)) * experts.num_experts // len(x)
    ids = expert[:, None].to(torch.int32)
    call = MoeCall(x, ids, torch.ones(len(x), 1), experts, activation_type=activation_type)
    return moe_content(call, compact=True)


def _boundaries(source: Source, activation_type: int) -> Tensor:
    """The numbers, of half a million, whose float32 activation is nearest to the middle between two bf16 numbers."""
    values = torch.unique(source.spread("values", -6, 4, _CANDIDATES).float()).to(torch.bfloat16)
    results = activate(ACTIVATIONS[activation_type], values[:, None], None, [])[:, 0]
    distance = ((results.view(torch.int32) & 0xFFFF) - 0x8000).abs()
    nearest = torch.argsort(distance, stable=True)[:_PROBES]
    chosen: Tensor = values[nearest].repeat(-(-_PROBES // len(nearest)))[:_PROBES]
    return chosen


def _special(source: Source, high: int) -> Tensor:
    """Zeros, subnormals, what squares to one, and every exponent below `high`."""
    around = torch.tensor(_AROUND).to(torch.bfloat16)
    bits = around.view(torch.int16)
    around = torch.cat([(bits + step).view(torch.bfloat16) for step in (-1, 0, 1)])
    around = torch.where(around.isfinite(), around, 0.0)
    subnormal = (source.bytes("subnormal", 64).to(torch.int16) & 0x7F).view(torch.bfloat16)
    subnormal[::2] *= -1
    few = torch.cat((around, subnormal))
    few = torch.where(few.abs() < 2.0**high, few, 1.0)
    return torch.cat((few, source.spread("every", -126, high - 1, _PROBES - len(few))))


@define(catches="gelu_by_tanh", unique_for="Gelu's rounding")
def gelu_at_rounding_boundaries(source: Source) -> Content:
    """Gelu, without a gate, next to the boundaries between bf16 results: CUDA's fast erf is not the exact one."""
    return _probe(GELU, _boundaries(source, GELU))


@define(unique_for="Silu's rounding")
def silu_at_rounding_boundaries(source: Source) -> Content:
    """Silu, without a gate, next to the boundaries between bf16 results: EX2 and RCP are approximate."""
    return _probe(SILU, _boundaries(source, SILU))


@define(catches="relu2_not_squared relu2_not_rectified", unique_for="Relu2's rounding")
def relu2_at_rounding_boundaries(source: Source) -> Content:
    """Relu2 next to the boundaries between bf16 results: squares that lie halfway go to the even neighbour."""
    return _probe(RELU2, _boundaries(source, RELU2))


@define(unique_for="zeros, subnormals and every exponent through Gelu")
def gelu_special_values(source: Source) -> Content:
    """Gelu of zeros, subnormals and every exponent."""
    return _probe(GELU, _special(source, 120))


@define(unique_for="zeros, subnormals and every exponent through Relu")
def relu_special_values(source: Source) -> Content:
    """Relu of zeros, subnormals, which are flushed after it, and every exponent."""
    return _probe(RELU, _special(source, 120))


@define(unique_for="zeros, subnormals and every exponent through Silu")
def silu_special_values(source: Source) -> Content:
    """Silu of zeros, subnormals and every exponent."""
    return _probe(SILU, _special(source, 120))


@define(unique_for="zeros, subnormals and every exponent through Relu2")
def relu2_special_values(source: Source) -> Content:
    """Relu2 of zeros, subnormals and every exponent: squares below 2^-126 are flushed, none is Inf."""
    return _probe(RELU2, _special(source, 63))


@define(unique_for="zeros, subnormals and every exponent through Identity")
def identity_special_values(source: Source) -> Content:
    """Identity of zeros, subnormals, which are flushed all the same, and every exponent."""
    return _probe(IDENTITY, _special(source, 120))


def _non_finite(source: Source, activation_type: int) -> Content:
    """Column 8 is NaN, Inf or -Inf in the first expert's tokens: only a -Inf leaves its token's numbers."""
    experts = _one_hot(2)
    assert experts.fc1_scales is not None
    experts.fc1_scales[0, 8, 0] = 255
    x = source.spread("values", -2, 2, _TOKENS, _SIZE)
    x[:, 8] = -x[:, 8].abs()
    x[0, 8], x[1, 8] = 0.0, 1.0
    return _probe(activation_type, x.flatten(), experts)


@define(catches="relu_loses_nan", unique_for="Relu's NaN and Inf")
def relu_non_finite(source: Source) -> Content:
    """Relu of NaN, which stays NaN, of Inf and of -Inf, which becomes 0."""
    return _non_finite(source, RELU)


@define(catches="relu_loses_nan", unique_for="Relu2's NaN and Inf")
def relu2_non_finite(source: Source) -> Content:
    """Relu2 of NaN, which stays NaN, of Inf and of -Inf, which becomes 0."""
    return _non_finite(source, RELU2)


def _biased(source: Source) -> Experts:
    biases = {name: source.normal(name, 2, _SIZE) for name in ("fc1_biases", "fc2_biases")}
    return replace(_one_hot(2), **biases)


@define(catches="bias1_ignored", unique_for="Relu after biases")
def relu_with_biases(source: Source) -> Content:
    """Relu after biases, two experts, a bias of fc2."""
    return _probe(RELU, source.spread("values", -3, 2, _PROBES), _biased(source))


@define(catches="bias1_ignored ungated_given_as_both_halves", unique_for="Identity after biases")
def identity_with_biases(source: Source) -> Content:
    """Identity of sums with biases, which float32 has and bf16 has not, two experts, a bias of fc2."""
    return _probe(IDENTITY, source.spread("values", -9, 2, _PROBES), _biased(source))


@define(catches="ungated_halves_swapped relu2_not_squared", unique_for="Relu2 between two GEMMs")
def relu2_layer(source: Source) -> Content:
    """Relu2 in a layer of two experts with ordinary weights, K of 256 and 128, on the second of two ranks."""
    call = MoeCall(
        source.normal("input", 8, 256),
        source.distinct("ids", 8, 2, 2),
        source.weights(8, 2),
        source.experts(2, 256, _SIZE, fc1_scales=(118, 122), biases=True, gated=False),
        tp_size=2,
        tp_rank=1,
        activation_type=RELU2,
    )
    return moe_content(call, compact=True)


@define("activation", unique_for="one stage alone")
def stage_relu2(source: Source) -> Content:
    """Relu2's stage alone, in float32 and rounded, squares that overflow too."""
    fc1_output = _special(source, 120).view(-1, _SIZE)
    values = activate(ACTIVATIONS[RELU2], fc1_output, None, [])
    results = {"activation_float32": values, "activation": fp32.to_bf16(values)}
    return Content({"fc1_output": fc1_output, **results}, {"activation_type": RELU2})
