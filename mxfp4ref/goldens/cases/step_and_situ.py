"""Suite `step_and_situ`: SwigluStep, Situ, Geglu, SwigluBias alone; by one-hot weights as in `activation`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from mxfp4ref.formats.experts import Experts
from mxfp4ref.goldens.cases.activation import (
    _CANDIDATES,
    _INNER,
    _PROBES,
    _clamped_pairs,
    _one_hot,
    _probe,
    _structured_pairs,
)
from mxfp4ref.goldens.cases.definition import Content, define, moe_content
from mxfp4ref.goldens.cases.source import Source, float32
from mxfp4ref.model.call import MoeCall
from mxfp4ref.sm90 import fp32
from mxfp4ref.sm90.activation import ACTIVATIONS, GEGLU, GEGLU_TANH, SITU, SWIGLU_BIAS, SWIGLU_STEP
from mxfp4ref.sm90.elementwise import activate


def _experts(**parameters: list[float]) -> Experts:
    """One-hot experts with these parameters, one if there are none."""
    tensors = {name: float32(values) for name, values in parameters.items()}
    return replace(_one_hot(max([1, *map(len, parameters.values())])), **tensors)


def _call(activation_type: int, gate: Tensor, up: Tensor, experts: Experts | None = None) -> MoeCall:
    return replace(_probe(gate, up, experts), activation_type=activation_type)


def _boundary_pairs(source: Source, activation_type: int, **parameters: float) -> tuple[Tensor, Tensor]:
    """The pairs, of two million, whose float32 activation is nearest to the middle between two bf16 numbers.

    Where a gate is clamped the product is exact, and tells nothing: most of these are not.
    """
    gate, up = source.spread("gate", -4, 1, _CANDIDATES), source.spread("up", -3, 5, _CANDIDATES)
    activation = ACTIVATIONS[activation_type]
    given = [float32([parameters[name]]) if name in parameters else None for name in activation.defaults]
    values = activate(activation, torch.stack((up, gate), dim=-1), None, given)[:, 0]
    distance = ((values.view(torch.int32) & 0xFFFF) - 0x8000).abs()
    nearest = torch.argsort(distance, stable=True)[:_PROBES]
    return gate[nearest], up[nearest]


@define(unique_for="SwigluStep's rounding")
def step_at_rounding_boundaries(source: Source) -> MoeCall:
    """SwigluStep next to the boundaries between bf16 results, with the limit of 7 that is compiled in."""
    return _call(SWIGLU_STEP, *_boundary_pairs(source, SWIGLU_STEP))


@define(
    catches="activation_type_ignored no_limit_by_default step_limit_one_sided step_silu_bf16",
    unique_for="SwigluStep's limit of 7",
)
def step_clamps_at_7(source: Source) -> MoeCall:
    """SwigluStep without a limit on both sides of 7: silu(gate) is clamped from above, up on both sides."""
    return _call(SWIGLU_STEP, *_clamped_pairs(source, 7.0))


@define(
    catches="limit_ignored step_limit_before_silu step_gate_clamped_below params_of_first_expert",
    unique_for="SwigluStep's limit by expert",
)
def step_limit_by_expert(source: Source) -> MoeCall:
    """SwigluStep with limits of 2.5 and of 0.2, which is less than silu's depth of -0.28: it is not clamped below."""
    return _call(SWIGLU_STEP, *_clamped_pairs(source, 3.0), _experts(swiglu_limit=[2.5, 0.2]))


@define(catches="step_reads_alpha_and_beta", unique_for="parameters that SwigluStep does not read")
def step_with_alpha_and_beta(source: Source) -> MoeCall:
    """SwigluStep with alpha, beta and SiTU's parameters, which it does not read."""
    unread = {"swiglu_alpha": [1.702], "swiglu_beta": [1.0], "situ_beta": [2.0], "situ_linear_beta": [3.0]}
    experts = _experts(swiglu_limit=[3.0], **unread)
    return _call(SWIGLU_STEP, *_boundary_pairs(source, SWIGLU_STEP, swiglu_limit=3.0), experts)


@define(unique_for="zeros, subnormals and every exponent through SwigluStep")
def step_special_values(source: Source) -> MoeCall:
    """SwigluStep of zeros, subnormals, both neighbours of +-7, and every exponent."""
    return _call(SWIGLU_STEP, *_structured_pairs(source, 7.0))


@define(catches="step_clamp_propagates_nan", unique_for="SwigluStep's NaN and Inf")
def step_non_finite(source: Source) -> MoeCall:
    """SwigluStep of NaN and Inf, which become the limit: a gate of -Inf, too, for silu(-Inf) is NaN."""
    return _call(SWIGLU_STEP, *_non_finite_pairs(source), _infinite(_experts(), range(8, 24), range(16)))


@define(
    catches="step_gate_clamped_below step_clamp_propagates_nan step_reads_alpha_and_beta",
    unique_for="SwigluStep's options together",
)
def step_all_at_once(source: Source) -> MoeCall:
    """SwigluStep of NaN and Inf beside numbers, limits of 0.2 and of 3, alpha and beta, which are not read."""
    experts = _experts(swiglu_limit=[0.2, 3.0], swiglu_alpha=[1.702, 0.5], swiglu_beta=[1.0, -1.0])
    return _call(SWIGLU_STEP, *_non_finite_pairs(source), _infinite(experts, range(8, 24), range(16)))


@define(catches="bias1_ignored bias1_bf16", unique_for="SwigluStep after biases")
def step_with_biases(source: Source) -> MoeCall:
    """SwigluStep after biases, two experts with other limits, a bias of fc2."""
    experts = _biased(source, _experts(swiglu_limit=[1.5, 4.0]))
    return _call(SWIGLU_STEP, *_clamped_pairs(source, 4.0), experts)


@define(catches="activation_type_ignored", unique_for="SwigluStep between two GEMMs")
def step_layer(source: Source) -> MoeCall:
    """SwigluStep in a layer of four experts with ordinary weights and no limit given, two experts a token."""
    return _layer(source, SWIGLU_STEP)


@define(catches="activation_type_ignored situ_sigmoid_of_capped", unique_for="SiTU's rounding")
def situ_at_rounding_boundaries(source: Source) -> MoeCall:
    """SiTU next to the boundaries between bf16 results, with the 4 and 25 that are compiled in."""
    return _call(SITU, *_boundary_pairs(source, SITU))


@define(
    catches="situ_beta_ignored situ_linear_beta_ignored situ_betas_swapped situ_reciprocal_exact",
    unique_for="the rounding of SiTU's parameters",
)
def situ_parameters_at_rounding_boundaries(source: Source) -> MoeCall:
    """SiTU next to the boundaries between bf16 results, with a beta and a linear beta that are no short
    numbers and whose reciprocals the hardware does not round correctly: an exact division goes to the
    other side.
    """
    parameters = {"situ_beta": 1.32, "situ_linear_beta": 2.97}
    experts = _experts(**{name: [value] for name, value in parameters.items()})
    return _call(SITU, *_boundary_pairs(source, SITU, **parameters), experts)


@define(catches="situ_beta_ignored", unique_for="SiTU's beta alone")
def situ_beta_alone(source: Source) -> MoeCall:
    """SiTU with a beta alone: 25 caps up."""
    return _call(SITU, *_boundary_pairs(source, SITU, situ_beta=0.66), _experts(situ_beta=[0.66]))


@define(catches="situ_linear_beta_ignored", unique_for="SiTU's linear beta alone")
def situ_linear_beta_alone(source: Source) -> MoeCall:
    """SiTU with a linear beta alone: 4 caps the gate."""
    pairs = _boundary_pairs(source, SITU, situ_linear_beta=1.03)
    return _call(SITU, *pairs, _experts(situ_linear_beta=[1.03]))


@define(
    catches="params_of_first_expert params_bf16 situ_up_uncapped situ_clamped",
    unique_for="SiTU's parameters by expert",
)
def situ_parameters_by_expert(source: Source) -> MoeCall:
    """SiTU with two experts' parameters, one of them negative, and SwiGLU's, which it does not read."""
    read = {"situ_beta": [1.32, 4.0], "situ_linear_beta": [-2.97, 0.6]}
    unread = {"swiglu_alpha": [1.7, 1.0], "swiglu_beta": [1.0, 0.0], "swiglu_limit": [0.5, 1.0]}
    return _call(SITU, *_clamped_pairs(source, 5.0), _experts(**read, **unread))


@define(unique_for="zeros, subnormals and every exponent through SiTU")
def situ_special_values(source: Source) -> MoeCall:
    """SiTU of zeros, subnormals, values around the flush and overflow of EX2, and every exponent."""
    return _call(SITU, *_structured_pairs(source, None))


@define(unique_for="SiTU's NaN and Inf")
def situ_non_finite(source: Source) -> MoeCall:
    """SiTU of Inf, which it caps, and of NaN, which stays."""
    gate, up = _non_finite_pairs(source)
    for half in (gate, up):
        few = half.view(-1, _INNER)[4:]
        few[few == 0] = 1.0  # a NaN makes the whole token NaN
    return _call(SITU, gate, up, _infinite(_experts(situ_linear_beta=[3.0]), range(8, 24), range(16)))


@define(unique_for="SiTU's parameters that are no ordinary numbers")
def situ_strange_parameters(source: Source) -> MoeCall:
    """SiTU with parameters that are Inf, tiny and huge, an expert each: their reciprocals are 0, huge and tiny."""
    experts = _experts(
        situ_beta=[torch.inf, 2.0**-120, 3e38, -4.0], situ_linear_beta=[25.0, 2e38, torch.inf, 1e-30]
    )
    return _call(SITU, *_clamped_pairs(source, 5.0), experts)


@define(catches="bias1_ignored bias1_bf16", unique_for="SiTU after biases")
def situ_with_biases(source: Source) -> MoeCall:
    """SiTU after biases, two experts with other parameters, a bias of fc2."""
    experts = _biased(source, _experts(situ_beta=[2.0, 3.7], situ_linear_beta=[5.0, 1.9]))
    return _call(SITU, *_clamped_pairs(source, 4.0), experts)


@define(catches="activation_type_ignored", unique_for="SiTU between two GEMMs")
def situ_layer(source: Source) -> MoeCall:
    """SiTU in a layer of four experts with ordinary weights and no parameters given, two experts a token."""
    return _layer(source, SITU)


@define(catches="activation_type_ignored", unique_for="Geglu's rounding")
def geglu_at_rounding_boundaries(source: Source) -> MoeCall:
    """Geglu next to the boundaries between bf16 results."""
    return _call(GEGLU, *_boundary_pairs(source, GEGLU))


@define(unique_for="zeros, subnormals and every exponent through Geglu")
def geglu_special_values(source: Source) -> MoeCall:
    """Geglu of zeros, subnormals and every exponent, with parameters that it does not read."""
    experts = _experts(swiglu_limit=[0.5], swiglu_alpha=[2.0], situ_beta=[3.0])
    return _call(GEGLU, *_structured_pairs(source, None), experts)


@define(catches="activation_type_ignored bias1_ignored bias1_bf16", unique_for="Geglu after biases")
def geglu_with_biases(source: Source) -> MoeCall:
    """Geglu after biases, two experts, a bias of fc2; gates on both sides of erf's two polynomials."""
    return _call(GEGLU, *_clamped_pairs(source, 3.0), _biased(source, _one_hot(2)))


@define(catches="activation_type_ignored", unique_for="GegluTanh's rounding")
def geglu_tanh_at_rounding_boundaries(source: Source) -> MoeCall:
    """GegluTanh next to the boundaries between bf16 results."""
    return _call(GEGLU_TANH, *_boundary_pairs(source, GEGLU_TANH))


@define(unique_for="zeros, subnormals and every exponent through GegluTanh")
def geglu_tanh_special_values(source: Source) -> MoeCall:
    """GegluTanh of zeros, subnormals and every exponent."""
    return _call(GEGLU_TANH, *_structured_pairs(source, None))


@define(unique_for="SwigluBias without a parameter")
def swiglu_bias_alone(source: Source) -> MoeCall:
    """SwigluBias, asked for by its number, without parameters: clamped at Inf, which a NaN becomes, one a token."""
    gate, up = (source.spread(name, -2, 2, _PROBES // _INNER, _INNER) for name in ("gate", "up"))
    gate[::2, 8] = 0.0
    return _call(SWIGLU_BIAS, gate.flatten(), up.flatten(), _infinite(_experts(), [8], []))


@define(unique_for="SwigluBias's NaN and Inf beside all its parameters")
def swiglu_bias_non_finite(source: Source) -> Content:
    """SwigluBias with alpha, beta and a limit, one gate a token NaN, Inf or -Inf: of these only the last stays, and
    makes its token NaN.
    """
    gate, up = (source.spread(name, -2, 2, _PROBES // _INNER, _INNER) for name in ("gate", "up"))
    gate[::4, 8], gate[1::2, 8] = 0.0, gate[1::2, 8].abs()
    experts = _experts(swiglu_alpha=[1.702], swiglu_beta=[1.0], swiglu_limit=[3.0])
    call = _call(SWIGLU_BIAS, gate.flatten(), up.flatten(), _infinite(experts, [8], []))
    return moe_content(call, compact=True)


def _stage(activation_type: int, up: Tensor, gate: Tensor, **parameters: float) -> Content:
    """The stage alone, for kernels that expose it: `[R, 2I]` with up in the first half."""
    fc1_output = torch.cat((up.view(-1, _INNER), gate.view(-1, _INNER)), dim=1)
    tensors = {name: float32([value]) for name, value in parameters.items()}
    activation = ACTIVATIONS[activation_type]
    values = activate(activation, fc1_output, None, [tensors.get(name) for name in activation.defaults])
    results = {"activation_float32": values, "activation": fp32.to_bf16(values)}
    return Content({**tensors, "fc1_output": fc1_output, **results}, {"activation_type": activation_type})


@define("activation", unique_for="one stage alone")
def stage_step(source: Source) -> Content:
    """SwigluStep's stage alone, with the limit that is compiled in, in float32 and rounded."""
    gate, up = _structured_pairs(source, 7.0)
    return _stage(SWIGLU_STEP, up, gate)


@define("activation", unique_for="one stage alone")
def stage_situ(source: Source) -> Content:
    """SiTU's stage alone, with a beta and the linear beta that is compiled in, in float32 and rounded."""
    gate, up = _structured_pairs(source, None)
    return _stage(SITU, up, gate, situ_beta=1.32)


def _non_finite_pairs(source: Source) -> tuple[Tensor, Tensor]:
    """For `_infinite`: Inf of either sign, and NaN where a value is 0."""
    gate, up = (source.spread(name, -2, 2, _PROBES // _INNER, _INNER) for name in ("gate", "up"))
    gate[::3, 10], up[::4, 3], up[1::4, 12] = 0.0, 0.0, 0.0
    return gate.flatten(), up.flatten()


def _infinite(experts: Experts, gates: Iterable[int], ups: Iterable[int]) -> Experts:
    """Scale byte 255 (Inf) for the group in which a gate or an up is: it becomes Inf, or NaN where it is 0."""
    assert experts.fc1_scales is not None
    scales = experts.fc1_scales.clone()
    for column in ups:
        scales[:, column, (2 * column + 1) // 32] = 255
    for column in gates:
        scales[:, _INNER + column, 2 * column // 32] = 255
    return replace(experts, fc1_scales=scales)


def _biased(source: Source, experts: Experts) -> Experts:
    num_experts, hidden = experts.num_experts, experts.hidden_size
    return replace(
        experts,
        fc1_biases=source.normal("fc1_biases", num_experts, 2 * _INNER),
        fc2_biases=source.normal("fc2_biases", num_experts, hidden),
    )


def _layer(source: Source, activation_type: int) -> MoeCall:
    return MoeCall(
        source.normal("input", 8, 256),
        source.distinct("ids", 8, 2, 4),
        source.weights(8, 2),
        source.experts(4, 256, 256, fc1_scales=(120, 124)),
        activation_type=activation_type,
    )
