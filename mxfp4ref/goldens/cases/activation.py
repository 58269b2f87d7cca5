"""Suite `activation`: bias, clamps, sigmoid and product, seen one by one.

fc1 and fc2 are one-hot: gate j is input 2j, up j is input 2j + 1, and output column j is the activation of the
two. The whole layer is thus the activation, which any kernel can be asked for.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mxfp4ref.formats.experts import Experts
from mxfp4ref.formats.mxfp4 import pack_codes
from mxfp4ref.goldens.cases.definition import Content, define
from mxfp4ref.goldens.cases.source import Source, float32
from mxfp4ref.model.call import MoeCall
from mxfp4ref.sm90 import fp32
from mxfp4ref.sm90.swiglu import swiglu

_HIDDEN, _INNER = 256, 128
_TOKENS = 16
_PROBES = _TOKENS * _INNER
_CODE_ONE = 2
_CANDIDATES = 1 << 21

# The values around which things happen. Products stay finite: one Inf or NaN in a row of a one-hot matrix makes
# the whole token NaN.
_GATES = (
    *(0.0, -0.0, 1.0, -1.0, 7.0, -7.0, 10.0, -10.0, 20.0, -20.0, 87.0, -87.0, 88.5, -88.5, 104.0, -104.0),
    *(2.0**100, -(2.0**100), 2.0**-126, -(2.0**-126), 2.0**-130, -(2.0**-133)),
)
_UPS = (0.0, -0.0, 1.0, -1.0, 7.0, -7.0, 10.0, -10.0, 2.0**-24, 2.0**-126, -(2.0**-126), 2.0**-133, 2.0**20)


def _one_hot(num_experts: int) -> Experts:
    row, column = torch.arange(2 * _INNER), torch.arange(_INNER)
    fc1 = torch.zeros(2 * _INNER, _HIDDEN, dtype=torch.uint8)
    fc1[row, torch.cat((2 * column + 1, 2 * column))] = _CODE_ONE
    fc2 = torch.zeros(_HIDDEN, _INNER, dtype=torch.uint8)
    fc2[column, column] = _CODE_ONE
    return Experts(
        fc1_weights=pack_codes(fc1).repeat(num_experts, 1, 1),
        fc1_scales=torch.full((num_experts, 2 * _INNER, _HIDDEN // 32), 127, dtype=torch.uint8),
        fc2_weights=pack_codes(fc2).repeat(num_experts, 1, 1),
        fc2_scales=torch.full((num_experts, _HIDDEN, _INNER // 32), 127, dtype=torch.uint8),
    )


def _probe(gate: Tensor, up: Tensor, experts: Experts | None = None) -> MoeCall:
    """A call for `[tokens * 128] bf16` pairs; with several experts each gets an equal share of the tokens."""
    experts = _one_hot(1) if experts is None else experts
    x = torch.stack((gate, up), dim=-1).reshape(-1, _HIDDEN)
    expert = torch.arange(len(x)) * experts.num_experts // len(x)
    return MoeCall(x, expert[:, None].to(torch.int32), torch.ones(len(x), 1), experts)


def _parameters(
    alpha: list[float] | None = None, beta: list[float] | None = None, limit: list[float] | None = None
) -> Experts:
    given = {"swiglu_alpha": alpha, "swiglu_beta": beta, "swiglu_limit": limit}
    tensors = {name: float32(values) for name, values in given.items() if values is not None}
    return replace(_one_hot(len(next(iter(tensors.values())))), **tensors)


def _boundary_pairs(
    source: Source,
    alpha: float | None = None,
    beta: float | None = None,
    limit: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The pairs, of two million, whose float32 activation is nearest to the middle between two bf16 numbers.

    There one unit in the last place of the float32 result, which any other arithmetic may be off, is seen.
    """
    gate, up = source.spread("gate", -4, 4, _CANDIDATES), source.spread("up", -3, 4, _CANDIDATES)
    parameters = [None if value is None else float32([value]) for value in (alpha, beta, limit)]
    values = swiglu(torch.stack((up, gate), dim=-1), None, *parameters)[:, 0]
    distance = ((values.view(torch.int32) & 0xFFFF) - 0x8000).abs()
    nearest = torch.argsort(distance, stable=True)[:_PROBES]
    return gate[nearest], up[nearest]


def _structured_pairs(source: Source, limit: float | None) -> tuple[Tensor, Tensor]:
    """Special values against each other, the neighbours of the limit from both sides, then every exponent."""
    gate, up = (torch.tensor(values).to(torch.bfloat16) for values in (_GATES, _UPS))
    if limit is not None:
        bits = torch.tensor([limit, -limit]).to(torch.bfloat16).view(torch.int16)
        around = torch.cat([bits + step for step in (-2, -1, 0, 1, 2)]).view(torch.bfloat16)
        gate, up = torch.cat((gate, around)), torch.cat((up, around))
    rest = _PROBES - len(gate) * len(up)
    return (
        torch.cat((gate.repeat_interleave(len(up)), source.spread("gate", -90, 90, rest))),
        torch.cat((up.repeat(len(gate)), source.spread("up", -60, 24, rest))),
    )


def _clamped_pairs(source: Source, limit: float) -> tuple[Tensor, Tensor]:
    """Gate and up on both sides of the limit, most of them beyond it."""
    scale = torch.tensor(2 * limit)
    gate, up = (
        source.uniform(name, _PROBES) * source.signs(f"{name}.sign", _PROBES) for name in ("gate", "up")
    )
    return (gate * scale).to(torch.bfloat16), (up * scale).to(torch.bfloat16)


@define(unique_for="rounding of the plain form")
def plain_at_rounding_boundaries(source: Source) -> MoeCall:
    """Plain SwiGLU next to the boundaries between bf16 results: a correctly rounded sigmoid, exact products,
    a libm or another order of the products round to the other side.
    """
    return _probe(*_boundary_pairs(source))


@define(catches="alpha_ignored beta_ignored")
def alpha_beta_at_rounding_boundaries(source: Source) -> MoeCall:
    """SwiGLU with gpt-oss's alpha of 1.702 and a beta of 0.7, which is no short number, next to the
    boundaries between bf16 results: where alpha or beta is left out or rounded otherwise, results go to
    the other side.
    """
    return _probe(*_boundary_pairs(source, 1.702, 0.7), _parameters([1.702], [0.7]))


@define(
    catches="alpha_ignored beta_ignored limit_ignored",
    unique_for="rounding of the clamped form as gpt-oss uses it",
)
def gpt_oss_at_rounding_boundaries(source: Source) -> MoeCall:
    """SwiGLU with all of gpt-oss's parameters (alpha 1.702, beta 1, limit 7) next to the boundaries between
    bf16 results; about two pairs in five are clamped. Clamps, sigmoid and products that are rounded
    otherwise go to the other side.
    """
    return _probe(*_boundary_pairs(source, 1.702, 1.0, 7.0), _parameters([1.702], [1.0], [7.0]))


@define(unique_for="zeros, subnormals and every exponent, unclamped")
def plain_special_values(source: Source) -> MoeCall:
    """Plain SwiGLU of zeros, subnormals, values around the flush and overflow of EX2, and every exponent."""
    return _probe(*_structured_pairs(source, None))


@define(catches="limit_ignored limit_one_sided gate_clamped_below", unique_for="the neighbours of the limit")
def limit_special_values(source: Source) -> MoeCall:
    """SwiGLU with DeepSeek-V4's limit of 10 of special values: both neighbours of +-10, zeros, subnormals,
    every exponent. A clamp of the wrong side, or only one, shows.
    """
    return _probe(*_structured_pairs(source, 10.0), _parameters(limit=[10.0]))


@define(
    catches="limit_ignored limit_one_sided gate_clamped_below alpha_ignored beta_ignored",
    unique_for="zeros, subnormals and every exponent with all parameters",
)
def gpt_oss_special_values(source: Source) -> MoeCall:
    """SwiGLU with gpt-oss's parameters (alpha 1.702, beta 1, limit 7) of special values: both neighbours of
    +-7, zeros, subnormals, every exponent. The limit comes before alpha and beta.
    """
    return _probe(*_structured_pairs(source, 7.0), _parameters([1.702], [1.0], [7.0]))


def _infinite_rows(experts: Experts) -> Experts:
    """Scale byte 255 (Inf) for some rows: up of columns 0 to 15, gate of columns 8 to 23.

    Their accumulators are Inf of the input's sign, NaN where the input is 0.
    """
    scales = experts.fc1_scales
    assert scales is not None
    scales = scales.clone()
    scales[:, 0:16, 0] = 255
    scales[:, _INNER + 8 : _INNER + 24, :2] = 255
    scales[:, _INNER + 8 : _INNER + 24, 2:] = 127
    return replace(experts, fc1_scales=scales)


@define(catches="limit_ignored", unique_for="NaN and Inf before a limit alone")
def non_finite_before_clamp(source: Source) -> MoeCall:
    """SwiGLU with a limit of ups that are Inf or NaN and gates that are NaN before the clamp: NaN and +Inf
    become the limit, an up of -Inf minus the limit, and no output is NaN.
    """
    gate, up = (source.spread(name, -2, 2, _TOKENS, _INNER) for name in ("gate", "up"))
    gate[:-4, 8:24] = gate[:-4, 8:24].abs()
    gate[::3, 10], up[::4, 3], up[1::4, 12] = 0.0, 0.0, 0.0
    return _probe(gate.flatten(), up.flatten(), _infinite_rows(_parameters(limit=[10.0])))


@define(catches="limit_ignored gate_clamped_below clamp_after_silu", unique_for="the gate's clamp alone")
def gate_clamp_saturates(source: Source) -> MoeCall:
    """Gates on both sides of +-limit: clamped from above only, and before the sigmoid, not after the product."""
    gate, _ = _clamped_pairs(source, 10.0)
    return _probe(gate, source.spread("up", -2, 2, _PROBES), _parameters(limit=[10.0]))


@define(catches="limit_ignored limit_one_sided", unique_for="the up's clamp alone")
def up_clamp_saturates(source: Source) -> MoeCall:
    """Ups on both sides of +-limit: clamped from above and from below."""
    _, up = _clamped_pairs(source, 10.0)
    return _probe(source.spread("gate", -2, 2, _PROBES), up, _parameters(limit=[10.0]))


@define(catches="all_or_none_params limit_ignored", unique_for="the clamp without alpha and beta")
def limit_alone(source: Source) -> MoeCall:
    """SwiGLU with a limit alone: alpha and beta are then 1 and 0, and the limit still applies."""
    return _probe(*_clamped_pairs(source, 3.0), _parameters(limit=[3.0]))


@define(catches="all_or_none_params alpha_ignored", unique_for="alpha without the others")
def alpha_alone(source: Source) -> MoeCall:
    """SwiGLU with alpha alone, next to rounding boundaries: beta is then 0, and nothing is clamped."""
    return _probe(*_boundary_pairs(source, 1.3), _parameters([1.3]))


@define(catches="all_or_none_params beta_ignored", unique_for="beta without the others")
def beta_alone(source: Source) -> MoeCall:
    """SwiGLU with beta alone, next to rounding boundaries: alpha is then 1, and nothing is clamped."""
    return _probe(*_boundary_pairs(source, beta=-0.3), _parameters(beta=[-0.3]))


@define(unique_for="parameters by expert, without parallelism")
def parameters_by_expert(source: Source) -> MoeCall:
    """Two experts with other alpha, beta and limit each: a value taken from another expert shows."""
    experts = _parameters([1.702, 0.5], [1.0, -0.25], [2.5, 7.0])
    return _probe(*_clamped_pairs(source, 6.0), experts)


@define(catches="bias1_ignored", unique_for="the fc1 bias alone")
def bias_before_clamp(source: Source) -> MoeCall:
    """fc1 bias: added in float32 to the rounded GEMM1 output, not to its accumulator, before the clamp; some
    sums cancel, some are subnormal.
    """
    gate, up = _clamped_pairs(source, 4.0)
    experts = _parameters(limit=[2.0])
    bias = source.normal("bias", 1, 2 * _INNER)
    bias[0, :4] = torch.tensor([0.0, -0.0, 2.0**-126, 2.0**-130])
    up.view(-1, _INNER)[:, 8] = -bias[0, 8]  # exact cancellation
    return _probe(gate, up, replace(experts, fc1_biases=bias))


@define(catches="act_kept_fp32", unique_for="the rounding of the activation alone")
def rounded_before_gemm2(source: Source) -> MoeCall:
    """The activation is rounded to bf16 before GEMM2: fc2 adds each to minus its neighbour, which a float32
    activation would make visible.
    """
    experts = _one_hot(1)
    codes = torch.zeros(_HIDDEN, _INNER, dtype=torch.uint8)
    column = torch.arange(_INNER)
    codes[column, column] = _CODE_ONE
    codes[column, column ^ 1] = _CODE_ONE | 8
    gate = source.spread("gate", -3, 3, _TOKENS, _INNER // 2)
    up = source.spread("up", -3, 3, _TOKENS, _INNER // 2)
    bits = up.view(torch.int16)
    # Neighbours with the same gate and ups one unit apart: the difference is mostly rounding.
    return _probe(
        gate.repeat_interleave(2, dim=1).flatten(),
        torch.stack((bits, bits ^ 1), dim=-1).view(torch.bfloat16).flatten(),
        replace(experts, fc2_weights=pack_codes(codes)[None]),
    )


def _stage(
    up: Tensor,
    gate: Tensor,
    alpha: float | None = None,
    beta: float | None = None,
    limit: float | None = None,
) -> Content:
    """The stage alone, for kernels that expose it: `[R, 2I]` with up in the first half."""
    fc1_output = torch.cat((up.view(-1, _INNER), gate.view(-1, _INNER)), dim=1)
    given = {"alpha": alpha, "beta": beta, "limit": limit}
    tensors = {f"swiglu_{name}": float32([value]) for name, value in given.items() if value is not None}
    values = swiglu(fc1_output, None, *(tensors.get(f"swiglu_{name}") for name in given))
    tensors |= {"fc1_output": fc1_output, "activation_float32": values, "activation": fp32.to_bf16(values)}
    return Content(tensors)


@define("activation", unique_for="one stage alone")
def stage_plain(source: Source) -> Content:
    """The activation's stage alone, SwiGLU without parameters, in float32 and rounded, over all exponents and
    special values.
    """
    gate, up = _structured_pairs(source, None)
    return _stage(up, gate)


@define("activation", unique_for="one stage alone")
def stage_gpt_oss(source: Source) -> Content:
    """The activation's stage alone, SwiGLU with gpt-oss's alpha, beta and limit, in float32 and rounded, over
    all exponents and special values.
    """
    gate, up = _structured_pairs(source, 7.0)
    return _stage(up, gate, 1.702, 1.0, 7.0)
