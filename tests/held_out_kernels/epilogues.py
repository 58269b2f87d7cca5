"""What goes wrong after the accumulators: activations by another formula, their parameters, biases, the last sum."""

from __future__ import annotations

import torch
from torch import Tensor

from mxfp4ref import MoeCall, forward
from mxfp4ref.sm90 import fp32
from mxfp4ref.sm90.finalize import finalize
from mxfp4ref.sm90.fp32 import to_bf16
from mxfp4ref.sm90.swiglu import swiglu
from tests.held_out_kernels.by_hand import Rows, layer, local_experts, with_experts
from tests.held_out_kernels.definition import wrong

Maybe = Tensor | None


def _gate(fc1: Tensor, bias: Maybe, alpha: Maybe, limit: Maybe) -> tuple[Tensor, Tensor, Tensor]:
    """Up and gate, clamped, and what the sigmoid takes."""
    value = fc1.float() if bias is None else fp32.add(fc1.float(), bias.float())
    up, gate = value.chunk(2, dim=-1)
    if limit is not None:
        limit = limit.expand_as(up)
        up, gate = fp32.minimum(fp32.maximum(up, -limit), limit), fp32.minimum(gate, limit)
    return up, gate, gate if alpha is None else gate * alpha


@wrong(
    stage="activation",
    says=(
        "gate|sigmoid|silu|\\bexp\\b|exponential|swish",
        "nan|not a number|inf ?/ ?inf",
        "large|overflow|above|beyond|88|from|exceed|big|high|range|great",
    ),
    story="the sigmoid is exp(x) / (1 + exp(x)): of a gate above 88.72 it is Inf / Inf",
)
def sigmoid_of_a_large_gate_is_nan(call: MoeCall) -> Tensor:
    def act(fc1: Tensor, bias: Maybe, alpha: Maybe, beta: Maybe, limit: Maybe) -> Tensor:
        _, _, z = _gate(fc1, bias, alpha, limit)
        return swiglu(fc1, bias, alpha, beta, limit).masked_fill(z > 88.722839, torch.nan)

    return layer(call, swiglu=act)


@wrong(
    stage="activation",
    says=("sigmoid|silu|tanh|swish", "fp16|half|precision|round|approx|accura|coarse|bits"),
    story="the sigmoid is 0.5 * tanh(0.5 * x) + 0.5 by tanh.approx.f16x2, all in fp16",
)
def sigmoid_by_tanh_in_fp16(call: MoeCall) -> Tensor:
    def act(fc1: Tensor, bias: Maybe, alpha: Maybe, beta: Maybe, limit: Maybe) -> Tensor:
        up, gate, z = _gate(fc1, bias, alpha, limit)
        tanh = torch.tanh((0.5 * z).half().float()).half().float()
        sigmoid = (0.5 * tanh + 0.5).half().float()
        return gate * sigmoid * (up if beta is None else up + beta)

    return layer(call, swiglu=act)


@wrong(
    stage="activation",
    says=(
        "alpha|beta|limit|parameter",
        "expert",
        "previous|before|preced|another|other|earlier|shift|neighbou?r|one too (low|early)|wrong expert|e ?- ?1",
    ),
    story="alpha, beta and limit are fetched ahead and used late: an expert has those of the expert with rows before",
)
def parameters_of_the_problem_before(call: MoeCall) -> Tensor:
    def parameters(rows: Rows, given: list[Maybe]) -> list[Maybe]:
        active, mine = rows.expert.unique(return_inverse=True)
        first = torch.searchsorted(rows.expert, active)
        before = first[(mine - 1).clamp(min=0)]
        return given[:1] + [None if p is None else p[before] for p in given[1:]]

    return layer(call, parameters=parameters)


@wrong(
    stage="activation",
    says=("alpha|beta|limit|parameter", "bf16|bfloat|round|precision"),
    story="a .to(dtype) of the whole module has made bf16 of alpha, beta and limit",
)
def swiglu_parameters_in_bf16(call: MoeCall) -> Tensor:
    experts = call.experts

    def rounded(p: Maybe) -> Maybe:
        return None if p is None else p.bfloat16().float()

    return forward(
        with_experts(
            call,
            swiglu_alpha=rounded(experts.swiglu_alpha),
            swiglu_beta=rounded(experts.swiglu_beta),
            swiglu_limit=rounded(experts.swiglu_limit),
        )
    )


@wrong(
    stage="activation",
    says=("beta", "clamp|limit", "before|order|first|then|inside|earlier|after"),
    story="beta is added to up before the clamp, not after",
)
def beta_added_before_the_clamp(call: MoeCall) -> Tensor:
    def act(fc1: Tensor, bias: Maybe, alpha: Maybe, beta: Maybe, limit: Maybe) -> Tensor:
        if beta is None or limit is None:
            return swiglu(fc1, bias, alpha, beta, limit)
        value = fp32.widen(fc1) if bias is None else fp32.add(fp32.widen(fc1), fp32.widen(bias))
        up, gate = value.chunk(2, dim=-1)
        return swiglu(torch.cat([fp32.add(up, beta.expand_as(up)), gate], -1), None, alpha, None, limit)

    return layer(call, swiglu=act)


@wrong(
    stage="finalize",
    says=(
        "weight",
        "stride|padd|\\b4\\b|\\b8\\b|power of two|"
        "next|previous|another|other|earlier|shift|off by|neighbou?r|wrong (place|token|slot)",
        "slot|token|row|order|place|index",
    ),
    story="the routing weights are read with the slots rounded up to a power of two: of three slots with a stride of "
    "four, of six with one of eight; zeros lie after the end",
)
def weights_with_a_padded_stride(call: MoeCall) -> Tensor:
    def weights(local: Tensor, given: Tensor) -> Tensor:
        tokens, slots = given.shape
        stride = 1 << (slots - 1).bit_length()
        flat = torch.cat([given.flatten(), given.new_zeros(tokens * (stride - slots))])
        return flat.view(tokens, stride)[:, :slots].contiguous()

    return layer(call, weights=weights)


@wrong(
    stage="finalize",
    says=(
        "bias",
        "missing|skipp|padd|foreign|other rank|no expert|-1|absent|"
        "not (on|of|held by) (this|the|its) rank|local",
    ),
    story="finalize adds a bias for every slot: where a slot has no expert here "
    "it is the first expert's, times the weight",
)
def fc2_bias_for_missing_slots(call: MoeCall) -> Tensor:
    def sums(by_slot: Tensor, local: Tensor, weights: Tensor, bias: Maybe) -> Tensor:
        return finalize(by_slot, local if bias is None else local.clamp(min=0), weights, bias)

    return layer(call, finalize=sums)


@wrong(
    stage="finalize",
    says=(
        "weight",
        "(one|single|only|lone|1) (local |valid )?(slot|expert|row|term)|"
        "alone|single|top.?k (is|of|=+) ?1|only one|just one",
        "left out|missing|without|\\bnot\\b|ignored|\\b1(\\.0)?\\b|forg[eo]t|skip|lost|is one",
    ),
    story="a token with a single slot on this rank has nothing to add up: its row is copied, without the weight",
)
def lone_slot_copied_without_its_weight(call: MoeCall) -> Tensor:
    def weights(local: Tensor, given: Tensor) -> Tensor:
        return torch.where((local >= 0).sum(1, keepdim=True) == 1, torch.ones_like(given), given)

    return layer(call, weights=weights)


@wrong(
    stage=("finalize", "slots"),
    says=(
        "token|row",
        "no (local |valid )?(expert|slot)|without|all (of )?(its |their )?slots|none|nowhere|unrouted|padd",
        "not written|unwritten|stale|left (as|un|in|over|with|what)|"
        "not (set|zeroed|cleared)|(instead of|not) zero|input|untouched|kept",
    ),
    story="output and input share memory and tokens without an expert here are not written: they keep their input, "
    "where zeros belong",
)
def unrouted_tokens_keep_their_input(call: MoeCall) -> Tensor:
    unrouted = (local_experts(call) < 0).all(1, keepdim=True)
    return layer(call, output=lambda sums: torch.where(unrouted, call.input, to_bf16(sums)))


@wrong(
    stage=("activation", "finalize"),
    says=("beta", "bias"),
    story="two at once: the wrapper does not hand over beta, nor the biases of GEMM2",
)
def beta_and_fc2_bias_not_handed_over(call: MoeCall) -> Tensor:
    if call.experts.swiglu_beta is None or call.experts.fc2_biases is None:
        return forward(call)
    return forward(with_experts(call, swiglu_beta=None, fc2_biases=None))


@wrong(
    stage=("fc1", "finalize"),
    says=("GEMM ?1|fc1|first GEMM", "truncat|toward(s)? zero|round|chopp|cut", "order|backward|revers|last"),
    story="two at once: GEMM1's output is truncated to bf16, and the slots are added from the last to the first",
)
def fc1_truncated_and_slots_added_from_the_last(call: MoeCall) -> Tensor:
    def fc1(rows: Rows, acc: Tensor) -> Tensor:
        cut = (acc.view(torch.int32) & ~0xFFFF).view(torch.float32)
        return to_bf16(torch.where(acc.isfinite(), cut, acc))

    def sums(by_slot: Tensor, local: Tensor, weights: Tensor, bias: Maybe) -> Tensor:
        return finalize(by_slot.flip(1), local.flip(1), weights.flip(1), bias)

    return layer(call, fc1=fc1, finalize=sums)
