"""Small calls that between them expose every named defect: the ideas behind the goldens, in builder functions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mxfp4ref.defects import DequantizeCall, RoutingCall
from mxfp4ref.formats.experts import Experts
from mxfp4ref.formats.humming_experts import HummingExperts
from mxfp4ref.model.call import MoeCall
from mxfp4ref.sm90.activation import GEGLU, GELU, RELU, RELU2, SITU, SWIGLU_STEP
from tests.helpers import layers

M, H, INNER, E = 8, 512, 128, 4
NAN, INF = math.nan, math.inf


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _bytes(generator: torch.Generator, low: int, high: int, *shape: int) -> Tensor:
    """Uniform in low .. high."""
    return torch.randint(low, high + 1, shape, generator=generator, dtype=torch.uint8)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def _routing(generator: torch.Generator, top_k: int, experts: int = E) -> dict[str, Tensor]:
    order = [torch.randperm(experts, generator=generator)[:top_k] for _ in range(M)]
    return {
        "token_selected_experts": torch.stack(order).to(torch.int32),
        "token_final_scales": torch.rand(M, top_k, generator=generator) + 0.1,
    }


def _experts(
    generator: torch.Generator,
    scales: tuple[int, int] = (119, 124),
    hidden: int = H,
    inner: int = INNER,
    **optional: Tensor,
) -> Experts:
    return Experts(
        fc1_weights=_bytes(generator, 0, 255, E, 2 * inner, hidden // 2),
        fc1_scales=_bytes(generator, *scales, E, 2 * inner, hidden // 32),
        fc2_weights=_bytes(generator, 0, 255, E, hidden, inner // 2),
        fc2_scales=_bytes(generator, *scales, E, hidden, inner // 32),
        **optional,
    )


def _all_optional(generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "fc1_biases": _normal(generator, E, 2 * INNER).to(torch.bfloat16),
        "fc2_biases": _normal(generator, E, H).to(torch.bfloat16),
        "swiglu_alpha": torch.tensor([1.702, 1.1, 0.9, 1.3]),
        "swiglu_beta": torch.tensor([1.0, 0.3, -0.7, 0.1]),
        "swiglu_limit": torch.tensor([2.0, 1.5, 3.0, 2.3]),
    }


def every_option() -> MoeCall:
    """Biases, alpha, beta and limit that differ by expert; the limit clamps from both sides."""
    generator = _generator(1)
    experts = _experts(generator, **_all_optional(generator))
    return MoeCall(_normal(generator, M, H).to(torch.bfloat16), experts=experts, **_routing(generator, 3))


def limit_alone() -> MoeCall:
    """No alpha, beta or bias."""
    call = every_option()
    experts = replace(call.experts, fc1_biases=None, fc2_biases=None, swiglu_alpha=None, swiglu_beta=None)
    return replace(call, experts=experts)


def cancelling_gemm1() -> MoeCall:
    """The second half of K is minus the first: GEMM1's outputs are nothing but its rounding errors.

    K is 640, of the tactics' K tiles a multiple of 128 alone, so that no other order of the groups is right.
    """
    generator = _generator(2)
    experts = _experts(generator, scales=(116, 127), hidden=640)
    half_weights, half_scales = experts.fc1_weights[:, :, :160], experts.fc1_scales[:, :, :10]
    experts = replace(
        experts, fc1_weights=half_weights.repeat(1, 1, 2), fc1_scales=half_scales.repeat(1, 1, 2)
    )
    half = _normal(generator, M, 320).to(torch.bfloat16)
    return MoeCall(torch.cat((half, -half), 1), experts=experts, **_routing(generator, 2))


def cancelling_gemm2() -> MoeCall:
    """The same for GEMM2: the second half of the up rows are minus the first ones, the gate rows the same."""
    generator = _generator(3)
    experts = _experts(generator, scales=(116, 127), hidden=128, inner=640)
    up, gate = experts.fc1_weights[:, :320], experts.fc1_weights[:, 640:960]
    experts = replace(
        experts,
        fc1_weights=torch.cat((up, up ^ 0x88, gate, gate), 1),
        fc1_scales=experts.fc1_scales[:, :320].repeat(1, 4, 1),
        fc2_weights=experts.fc2_weights[:, :, :160].repeat(1, 1, 2),
        fc2_scales=experts.fc2_scales[:, :, :10].repeat(1, 1, 2),
    )
    return MoeCall(_normal(generator, M, 128).to(torch.bfloat16), experts=experts, **_routing(generator, 2))


def wide_exponents() -> MoeCall:
    """In each 16-block two large products cancel; what the tensor core truncated of the small ones remains."""
    generator = _generator(4)
    experts = _experts(generator, scales=(122, 125))
    codes = experts.fc1_weights.view(E, 2 * INNER, -1, 8)
    codes[..., 0] = codes[..., 0] & 0x0F | codes[..., 0] << 4  # elements 0 and 1 of a block: equal weights
    x = _normal(generator, M, H // 16, 16)
    large = 2.0 ** torch.randint(12, 22, (M, H // 16), generator=generator)
    x[..., 0], x[..., 1] = large, -large
    return MoeCall(x.view(M, H).to(torch.bfloat16), experts=experts, **_routing(generator, 2))


def cancelling_experts() -> MoeCall:
    """Experts in pairs that differ in the sign of fc2 alone, with equal weights: the output is what finalize lost."""
    generator = _generator(5)
    experts = _experts(generator)
    pairs = torch.tensor([0, 0, 1, 1])
    some = experts.select(pairs)
    signs = torch.tensor([0, 0x88, 0, 0x88], dtype=torch.uint8)[:, None, None]
    experts = replace(some, fc2_weights=some.fc2_weights ^ signs)
    routing = _routing(generator, 4)
    ids = routing["token_selected_experts"]
    weights = torch.rand(M, 2, generator=generator) + 0.1
    routing["token_final_scales"] = weights.gather(1, ids.long() // 2)
    return MoeCall(_normal(generator, M, H).to(torch.bfloat16), experts=experts, **routing)


def _one_hot(gate: Tensor, up: Tensor, fc2_scale: int = 127, top_k: int = 1, **optional: Tensor) -> MoeCall:
    """Column j < I of the output is the activation of `[M, I]` gate and up, times 2^(fc2_scale - 127)."""
    fc1 = torch.zeros(E, 2 * INNER, H, dtype=torch.uint8)
    fc2 = torch.zeros(E, H, INNER, dtype=torch.uint8)
    j = torch.arange(INNER)
    fc1[:, j, j] = fc1[:, INNER + j, INNER + j] = fc2[:, j, j] = 2  # the code of 1
    experts = Experts(
        fc1_weights=fc1[..., 0::2] | fc1[..., 1::2] << 4,
        fc1_scales=torch.full((E, 2 * INNER, H // 32), 127, dtype=torch.uint8),
        fc2_weights=fc2[..., 0::2] | fc2[..., 1::2] << 4,
        fc2_scales=torch.full((E, H, INNER // 32), fc2_scale, dtype=torch.uint8),
        **optional,
    )
    x = torch.cat((up, gate, torch.zeros(M, H - 2 * INNER)), 1).to(torch.bfloat16)
    routing = _routing(_generator(6), top_k)
    routing["token_final_scales"] = torch.ones(M, top_k)
    return MoeCall(x, experts=experts, **routing)


# Gate (upper half) and up (lower half) as bf16 bits, found by search: the activation lies so close to a tie between
# two bf16 numbers that one float32 ulp more or less decides. The second set is for alpha 1.702, beta 0.3, limit 7.
# fmt: off
_NEAR_TIES = (
    0x3D883FB3, 0x3F493FDF, 0x404E3F9E, 0x410D3F8F, 0x41863FA0, 0x41883F98, 0x41883FB8, 0x41883FD8,
    0x41893FC0, 0x418A3FE0, 0xBC9B3FC1, 0xC0A33FF6, 0xC0E23F9E, 0xC0FA3FD4, 0xC1193FFC, 0xC1383FD0,
    0xC1413FA7, 0xC1703FAF, 0xC1B03FCF,
)
_NEAR_TIES_WITH_PARAMETERS = (
    0x3D19BFDA, 0x3D91BACF, 0x3E64BF4C, 0x3EF33EF7, 0x3F1BBE82, 0x3F87BE97, 0x3F983F95, 0x3FA2405A,
    0x3FA2BF9D, 0x3FA5BCCA, 0x3FECBEA2, 0x3FF1BDB4, 0x40563DB9, 0x406F4071, 0x40ADBEA5, 0xBDEFBE8B,
    0xBE483FE5, 0xBE4CBEEF, 0xBE8FBCAE, 0xBEADBE99, 0xBF1C3DAB, 0xBF243FDF, 0xBF384017, 0xBF7A3C37,
    0xBF7EBEA9, 0xBFC4BECE, 0xBFC8BFC6, 0xBFECBFF8, 0xBFF6C009, 0xC0023F36, 0xC002C08B, 0xC014401A,
    0xC014BF7A, 0xC01A3FD5, 0xC01F3F40, 0xC01FBF10, 0xC01FC090, 0xC03CBFEF, 0xC0423E88, 0xC042C024,
    0xC061407E, 0xC061BFAF, 0xC063BFE8, 0xC0733EF9, 0xC084BF75, 0xC0853D60, 0xC085BFDC, 0xC0874019,
    0xC08E3EF0, 0xC08EBE81, 0xC08EC058, 0xC097BDFE, 0xC09CBEE9, 0xC09CC032,
)
# fmt: on


def _near_ties(words: tuple[int, ...], **optional: Tensor) -> MoeCall:
    bits = torch.tensor(words, dtype=torch.int64).repeat(M * INNER // len(words) + 1)[: M * INNER]
    gate, up = ((half & 0xFFFF) << 16 for half in (bits >> 16, bits))
    gate, up = (half.to(torch.int32).view(torch.float32).view(M, INNER) for half in (gate, up))
    return _one_hot(gate, up, **optional)


def activation_near_ties() -> MoeCall:
    return _near_ties(_NEAR_TIES)


def activation_near_ties_with_parameters() -> MoeCall:
    parameters = {"swiglu_alpha": 1.702, "swiglu_beta": 0.3, "swiglu_limit": 7.0}
    return _near_ties(
        _NEAR_TIES_WITH_PARAMETERS, **{name: torch.full((E,), value) for name, value in parameters.items()}
    )


# The same for SiTU with the beta and linear beta that are compiled in, and with 1.32 and 2.97.
_SITU_NEAR_TIES = (
    0x3E09BF43, 0x3E46C121, 0x3E574106, 0x3E81C16F, 0x3EB0BFC7, 0x3ED541A7, 0x3F5F40C5, 0x3FEABF17,
    0x40813F43, 0xBE32C05A, 0xC008C11E, 0xC0C9BE47,
)  # fmt: skip
_SITU_NEAR_TIES_WITH_PARAMETERS = (
    0x3E3D3FB9, 0x3E5140F1, 0x3E51C0F1, 0x3EC4C05A, 0x3EDABF58, 0x3EEE4174, 0x3EFEC042, 0x3F3D3E8A,
    0x3FCABFFD, 0xBE324038, 0xBF25BEED, 0xBF3E40C2, 0xBFD13FDA, 0xC0603E42, 0xC0CA4178,
)  # fmt: skip


def situ_near_ties() -> MoeCall:
    return replace(_near_ties(_SITU_NEAR_TIES), activation_type=SITU)


def situ_near_ties_with_parameters() -> MoeCall:
    parameters = {"situ_beta": torch.full((E,), 1.32), "situ_linear_beta": torch.full((E,), 2.97)}
    return replace(_near_ties(_SITU_NEAR_TIES_WITH_PARAMETERS, **parameters), activation_type=SITU)


def situ_by_expert() -> MoeCall:
    """`every_option` for SiTU."""
    parameters = {
        "situ_beta": torch.tensor([1.3, 0.7, 2.1, 4.4]),
        "situ_linear_beta": torch.tensor([2.9, 1.1, 0.6, 5.0]),
    }
    call = every_option()
    return replace(call, experts=replace(call.experts, **parameters), activation_type=SITU)


def step_by_expert() -> MoeCall:
    """`every_option` for SwigluStep; two limits are less than silu's depth of -0.28."""
    call = every_option()
    limits = torch.tensor([2.0, 0.2, 3.0, 0.1])
    return replace(call, experts=replace(call.experts, swiglu_limit=limits), activation_type=SWIGLU_STEP)


def step_by_default() -> MoeCall:
    """SwigluStep without parameters, gates and ups on both sides of 7."""
    gate, up = _normal(_generator(14), 2, M, INNER) * 6
    return replace(_one_hot(gate, up), activation_type=SWIGLU_STEP)


def geglu_by_expert() -> MoeCall:
    return replace(every_option(), activation_type=GEGLU)


def step_special_values() -> MoeCall:
    return replace(special_values(), activation_type=SWIGLU_STEP)


def _without_gate(call: MoeCall, activation_type: int) -> MoeCall:
    return replace(call, experts=layers.without_gate(call.experts), activation_type=activation_type)


def ungated_gelu() -> MoeCall:
    return _without_gate(every_option(), GELU)


def ungated_relu2() -> MoeCall:
    return _without_gate(every_option(), RELU2)


def ungated_special_values() -> MoeCall:
    return _without_gate(special_values(), RELU)


_SPECIAL = (
    NAN,
    INF,
    -INF,
    0.0,
    -0.0,
    1.0,
    -1.0,
    3.5,
    -88.0,
    88.0,
    2.0**127,
    2.0**-126,
    2.0**-130,
    -(2.0**-133),
)


def special_values() -> MoeCall:
    """One-hot weights, NaN, Inf, -0, huge and subnormal gates and ups, a limit."""
    call = special_values_unlimited()
    return replace(call, experts=replace(call.experts, swiglu_limit=torch.tensor([7.0, 5.0, 10.0, 1.0])))


def special_values_unlimited() -> MoeCall:
    values = torch.tensor(_SPECIAL)
    index = torch.randint(len(values), (2, M, INNER), generator=_generator(8))
    # A NaN or Inf in x would reach every column of its row through products with zero: a row each.
    special = ~values[index].isfinite()
    index = torch.where(special & (torch.arange(M)[:, None] > 2), 5, index)
    return _one_hot(*values[index])


def tiny_activations() -> MoeCall:
    """Activations around 2^-126, brought back by fc2's scale.

    Each is added to a normal one: a group whose sum is subnormal would be flushed before its scale.
    """
    generator = _generator(9)
    gate, up = 2.0 ** -torch.randint(55, 75, (2, M, INNER), generator=generator).to(torch.float32)
    gate, up = gate * (1 + torch.rand(M, INNER, generator=generator)), up * 1.5
    gate[:, 31::32], up[:, 31::32] = 2.0**-62, 2.0**-62
    call = _one_hot(gate, up, fc2_scale=250)
    fc2_weights = call.experts.fc2_weights.clone()
    j = torch.arange(INNER)
    fc2_weights[:, j, j // 32 * 16 + 15] |= 0x20  # the last element of its group as well
    return replace(call, experts=replace(call.experts, fc2_weights=fc2_weights))


def tiny_products() -> MoeCall:
    """Finalize's products around 2^-126, among them 2^-126 (1 - 2^-24)."""
    generator = _generator(10)
    up = 2.0 ** -torch.randint(31, 36, (M, INNER), generator=generator) * torch.randint(
        -1, 2, (M, INNER), generator=generator
    )
    call = _one_hot(torch.full((M, INNER), 64.0), up, top_k=2)
    scale = 2.0**-99 * (1 - 2.0**-24)
    return replace(call, token_final_scales=torch.tensor([scale, 2.0**-99]).expand(M, 2).contiguous())


def underflow() -> MoeCall:
    """GEMM2's products and sums around 2^-126, brought back by the routing weights."""
    generator = _generator(11)
    experts = _experts(generator)
    experts = replace(
        experts,
        fc2_weights=_bytes(generator, 0, 255, E, H, INNER // 2) & 0x99,  # 0 and +-0.5
        fc2_scales=_bytes(generator, 0, 2, E, H, INNER // 32),
    )
    x = _normal(generator, M, H).mul(0.3).to(torch.bfloat16)
    call = MoeCall(x, experts=experts, **_routing(generator, 1))
    return replace(call, token_final_scales=call.token_final_scales * 2.0**100)


def extreme_scales() -> MoeCall:
    """Scale bytes 0, 1, 254 and 255 in GEMM2; in GEMM1 byte 254, and subnormals added to the least normal numbers."""
    generator = _generator(12)
    up = 2.0**-125 * (1 + torch.rand(M, INNER, generator=generator))
    up[:, 31::32] = torch.randint(-127, 128, (M, INNER // 32), generator=generator) * 2.0**-133
    call = _one_hot(_normal(generator, M, INNER), up)
    fc1_weights, fc1_scales = call.experts.fc1_weights.clone(), call.experts.fc1_scales.clone()
    fc2_scales = call.experts.fc2_scales.clone()
    j = torch.arange(INNER)
    fc1_weights[:, j, j // 32 * 16 + 15] |= 0x20  # each up row takes the last element of its group as well
    fc1_scales[:, :INNER] = 254
    fc2_scales[:, j, j // 32] = torch.tensor([0, 1, 254, 255], dtype=torch.uint8).repeat(INNER // 4)
    experts = replace(call.experts, fc1_weights=fc1_weights, fc1_scales=fc1_scales, fc2_scales=fc2_scales)
    return replace(call, experts=experts, token_final_scales=torch.full((M, 1), 2.0**20))


def expert_parallel() -> MoeCall:
    """Rank 1 of 2, parameters that differ by expert, padded slots with a weight."""
    generator = _generator(13)
    experts = _experts(generator, **_all_optional(generator))
    routing = _routing(generator, 4, experts=2 * E)
    routing["token_selected_experts"][::3, 1] = -1
    return MoeCall(
        _normal(generator, M, H).to(torch.bfloat16), experts=experts, ep_size=2, ep_rank=1, **routing
    )


def tensor_parallel() -> MoeCall:
    """Rank 1 of 2, which must not add the fc2 bias."""
    return replace(every_option(), tp_size=2, tp_rank=1)


def padded_halves() -> MoeCall:
    """The last 32 rows of up and of gate are padding."""
    call = every_option()

    def pad(fc1: Tensor) -> Tensor:
        halves = fc1.clone().view(E, 2, INNER, -1)
        halves[:, :, INNER - 32 :] = 0
        return halves.view(fc1.shape)

    fields = ("fc1_weights", "fc1_scales", "fc1_biases")
    changed: dict[str, Any] = {field: pad(getattr(call.experts, field)) for field in fields}
    return replace(call, experts=replace(call.experts, **changed))


MOE_CALLS: dict[str, Callable[[], MoeCall]] = {
    function.__name__: function
    for function in (
        every_option,
        limit_alone,
        cancelling_gemm1,
        cancelling_gemm2,
        wide_exponents,
        cancelling_experts,
        activation_near_ties,
        activation_near_ties_with_parameters,
        special_values,
        special_values_unlimited,
        tiny_activations,
        tiny_products,
        underflow,
        extreme_scales,
        expert_parallel,
        tensor_parallel,
        padded_halves,
        situ_near_ties,
        situ_near_ties_with_parameters,
        situ_by_expert,
        geglu_by_expert,
        step_by_expert,
        step_by_default,
        step_special_values,
        ungated_gelu,
        ungated_relu2,
        ungated_special_values,
    )
}


def _logits(seed: int, experts: int = 32) -> Tensor:
    """Rows of 64, the last eight with ties."""
    logits = _normal(_generator(seed), 64, experts) * 3
    logits[56:] = logits[56:].round()
    return logits


def deepseek_v4_biased() -> RoutingCall:
    """Large biases, so that ties are common, which also differ by expert; padded rows."""
    bias = 8.08 + (_normal(_generator(22), 32) * 0.3).round()
    padded = torch.zeros(64, dtype=torch.bool)
    padded[5::9] = True
    options = {"correction_bias": bias, "top_k": 6, "routed_scaling_factor": 1.5, "padded": padded}
    return RoutingCall("deepseek_v4", _logits(21), options)


def deepseek_v4_table() -> RoutingCall:
    generator = _generator(24)
    table = torch.stack([torch.randperm(32, generator=generator)[:6] for _ in range(100)])
    token_ids = torch.randint(100, (64,), generator=generator)
    options = {"token_ids": token_ids, "tid2eid": table, "routed_scaling_factor": 2.5}
    return RoutingCall("deepseek_v4", _logits(23), options)


def deepseek_v3_groups() -> RoutingCall:
    """Biases that make many scores negative; rows whose scores are so small that 1e-20 counts."""
    logits = _logits(25)
    logits[:8] -= 45
    return RoutingCall("deepseek_v3", logits, {"correction_bias": _normal(_generator(26), 32) * 0.5 - 0.4})


def gpt_oss() -> RoutingCall:
    return RoutingCall("gpt_oss", _logits(27), {"top_k": 4})


def mixtral() -> RoutingCall:
    return RoutingCall("mixtral", _logits(28), {"top_k": 4})


ROUTING_CALLS: dict[str, Callable[[], RoutingCall]] = {
    function.__name__: function
    for function in (deepseek_v4_biased, deepseek_v4_table, deepseek_v3_groups, gpt_oss, mixtral)
}


def every_byte() -> DequantizeCall:
    """Every scale byte with every code."""
    codes = torch.arange(16, dtype=torch.uint8).repeat_interleave(2).roll(1)
    packed = (codes[0::2] | codes[1::2] << 4).repeat(256, 1)
    return DequantizeCall(packed, torch.arange(256, dtype=torch.uint8)[:, None])


def every_byte_sm90() -> DequantizeCall:
    return replace(every_byte(), convention="sm90")


DEQUANTIZE_CALLS: dict[str, Callable[[], DequantizeCall]] = {
    function.__name__: function for function in (every_byte, every_byte_sm90)
}


def w4a8_every_option() -> MoeCall:
    """Biases, parameters by expert, other ranges of scales in the two GEMMs."""
    call = every_option()
    assert call.experts.fc2_scales is not None
    experts = replace(call.experts, fc2_scales=call.experts.fc2_scales - 5)
    return replace(call, experts=HummingExperts.prepare(experts))


def w4a8_rows_of_any_size() -> MoeCall:
    """Rows of sizes 2^-20 to 2^20; the reciprocal of the last one's maximum is too small."""
    call = w4a8_every_option()
    sizes = torch.exp2(torch.linspace(-20, 20, M)).unsqueeze(1)
    sizes[-1] = 2.0**125
    return replace(call, input=(call.input.to(torch.float32) * sizes).to(torch.bfloat16))


def w4a8_cancelling() -> MoeCall:
    """GEMM1's accumulators are what each of its steps lost."""
    call = cancelling_gemm1()
    spread = torch.exp2(-12 * torch.rand(M, 320, generator=_generator(9)))
    half = (call.input[:, :320].to(torch.float32) * spread).to(torch.bfloat16)
    experts = HummingExperts.prepare(call.experts)
    return replace(call, input=torch.cat((half, -half), 1), experts=experts)


def w4a8_fp16() -> MoeCall:
    call = w4a8_every_option()
    names = ("fc1_biases", "fc2_biases")
    biases: dict[str, Any] = {name: getattr(call.experts, name).to(torch.float16) for name in names}
    return replace(call, input=call.input.to(torch.float16), experts=replace(call.experts, **biases))


W4A8_CALLS: dict[str, Callable[[], MoeCall]] = {
    function.__name__: function
    for function in (w4a8_every_option, w4a8_rows_of_any_size, w4a8_cancelling, w4a8_fp16)
}
