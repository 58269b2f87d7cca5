"""What goes wrong in an engine around the kernel: fallbacks, chunks, buffers, wrong models, routers, quantisers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mxfp4ref import MoeCall, dequantize, forward, quantize
from mxfp4ref.routing import routing_weights
from mxfp4ref.routing.models import PRESETS
from mxfp4ref.sm90.finalize import finalize
from mxfp4ref.sm90.fp32 import to_bf16
from mxfp4ref.sm90.swiglu import swiglu
from mxfp4ref.sm90.tactics import Tactic
from tests.held_out_kernels.by_hand import Rows, layer, right_routing
from tests.held_out_kernels.definition import wrong

ROUNDED = "bf16|bfloat16|round|precision"


@wrong(
    stage="finalize",
    says=("input|residual|hidden.states", "\\badd|plus|\\+|accumulat(es|ed)\\b|on top"),
    story="the output is written in place over the input, and the weighted sum is added to what is there",
)
def output_added_onto_the_input(call: MoeCall) -> Tensor:
    return layer(call, output=lambda sums: to_bf16(sums + call.input.float()))


@wrong(
    stage="activation",
    says=("beta|\\bup\\b|linear", ROUNDED),
    story="a fallback in torch keeps up + beta in bf16 before it multiplies with the gate",
)
def up_plus_beta_rounded_to_bf16(call: MoeCall) -> Tensor:
    if call.experts.swiglu_beta is None:
        return forward(call)

    def rounded(
        fc1: Tensor, bias: Tensor | None, alpha: Tensor | None, beta: Tensor, limit: Tensor | None
    ) -> Tensor:
        up, gate = fc1.chunk(2, -1)
        bias_up, bias_gate = (None, None) if bias is None else bias.chunk(2, -1)
        zeros = torch.zeros_like(up)
        only_gate = None if bias_gate is None else torch.cat([torch.zeros_like(bias_gate), bias_gate], -1)
        gated = swiglu(torch.cat([zeros, gate], -1), only_gate, alpha, torch.ones_like(beta), limit)
        linear = up.float() if bias_up is None else up.float() + bias_up.float()
        if limit is not None:
            linear = torch.minimum(torch.maximum(linear, -limit), limit)
        return gated * to_bf16(linear + beta).float()

    return layer(call, swiglu=rounded)


@wrong(
    stage="finalize",
    says=("weight|scale", "\\b256\\b|chunk|token|row|earlier|stale"),
    story="tokens are processed in chunks of 256, and each chunk reads the routing weights of the first one",
)
def chunks_share_the_first_ones_weights(call: MoeCall) -> Tensor:
    chunk = torch.arange(len(call.input)) % 256
    return layer(call, weights=lambda local, weights: weights[chunk])


@wrong(
    stage=("input", "slots", "fc1"),
    says=(
        "token|row|input",
        "512|2\\^16|65,?536|sixteen|16.bit|wrap|overflow|modulo|beyond|another|other|earlier",
    ),
    story="the offset of a token in the input is kept in sixteen bits: of hidden size 128 token 512 is token 0",
)
def input_offsets_in_sixteen_bits(call: MoeCall) -> Tensor:
    hidden = call.input.shape[1]

    def gathered(rows: Rows, x: Tensor) -> Tensor:
        first = rows.token * hidden % 2**16
        return call.input.flatten()[first[:, None] + torch.arange(hidden)]

    return layer(call, x=gathered)


@wrong(
    stage=("fc1", "fc2"),
    says=(
        "weight|code|expert|fc[12]|GEMM",
        "fp8|e4m3|float8|8.bit|quanti[sz]ed (again|twice|once more)|requanti|rounded to .*bits",
    ),
    story="a fallback casts the dequantised experts to E4M3 with one scale for each expert's matrix",
    mode="bounded",
)
def fallback_casts_the_experts_to_fp8(call: MoeCall) -> Tensor:
    def gemm(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        weights = dequantize(packed, scales, convention="sm90", dtype=torch.float32)
        scale = weights.abs().amax().clamp(min=1e-12) / 448
        in_fp8 = (weights / scale).to(torch.float8_e4m3fn).float() * scale
        return (x.double() @ in_fp8.double().T).float()

    return layer(call, gemm1=gemm, gemm2=gemm)


@wrong(
    stage=("finalize", "fc2"),
    says=(ROUNDED, "weight|bias|scale"),
    story="two at once, of one fallback: fc2's bias is added in bf16, and the routing weights are cast to bf16",
)
def fallback_adds_bias_and_weighs_in_bf16(call: MoeCall) -> Tensor:
    def summed(by_slot: Tensor, local: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
        if bias is not None:
            by_slot = to_bf16(by_slot.float() + bias[local.clamp(min=0)].float())
        return finalize(by_slot, local, to_bf16(weights).float(), None)

    return layer(call, finalize=summed)


@wrong(
    stage=("activation", "finalize"),
    says=("alpha|beta|1\\.702|gpt|softmax|normali[sz]|(routing|final) (weight|scale)",),
    story="two at once, a model taken for gpt-oss: parameters are 1.702, 1 and 7, and weights go through softmax",
)
def served_by_the_path_of_gpt_oss(call: MoeCall) -> Tensor:
    def parameters(rows: Rows, given: list[Tensor | None]) -> list[Tensor | None]:
        bias, *others = given
        if any(other is not None for other in others):
            return given
        return [bias, *(torch.full((len(rows.expert), 1), value) for value in (1.702, 1.0, 7.0))]

    return layer(call, parameters=parameters, weights=lambda local, weights: weights.softmax(1))


@wrong(
    kind="routing",
    stage="routing",
    says=("last|shared|fewer|one less|k - 1", "slot|expert|\\bid|choice|column|place"),
    story="the engine fuses a shared expert that the model does not have: the last slot is expert E with weight 1",
)
def last_slot_is_a_fused_shared_expert(**inputs: Any) -> dict[str, Tensor]:
    if "tid2eid" in inputs or "correction_bias" not in inputs:
        return right_routing(inputs)
    routed = right_routing(inputs | {"top_k": inputs["top_k"] - 1})
    padded = routed["ids"][:, :1] < 0
    shared = torch.full_like(routed["ids"][:, :1], inputs["logits"].shape[1]).masked_fill(padded, -1)
    return {
        "ids": torch.cat([routed["ids"], shared], 1),
        "scales": torch.cat([routed["scales"], (~padded).float()], 1),
    }


@wrong(
    kind="routing",
    stage="routing",
    says=("group", "zero|\\b0\\b|mask|outside|(not |un)(chosen|selected)|excluded|negative|fill"),
    story="experts outside the chosen groups get score zero instead of minus infinity and beat negative ones",
)
def experts_of_other_groups_score_zero(**inputs: Any) -> dict[str, Tensor]:
    if "n_group" not in inputs:
        return right_routing(inputs)
    scores = inputs["logits"].double().sigmoid().float()
    biased = (scores + inputs["correction_bias"]).unflatten(1, (inputs["n_group"], -1))
    order = biased.topk(2, dim=2).values.sum(2).sort(dim=1, descending=True, stable=True).indices
    chosen = torch.zeros(biased.shape[:2], dtype=torch.bool).scatter_(
        1, order[:, : inputs["topk_group"]], True
    )
    kept = biased.masked_fill(~chosen[:, :, None], 0.0).flatten(1)
    ids = kept.sort(dim=1, descending=True, stable=True).indices[:, : inputs["top_k"]].int()
    factor = inputs["routed_scaling_factor"] if inputs["routed_scaling"] == "in_weights" else 1.0
    epsilon = PRESETS["deepseek_v3"].epsilon
    return {
        "ids": ids,
        "scales": routing_weights(scores, ids, normalize="sum", epsilon=epsilon, factor=factor),
    }


@wrong(
    kind="routing",
    stage="routing",
    says=("table|hash|token.?id|tid2eid", "row|position|index|another|other|wrong|instead|next|differ"),
    story="under a captured graph the table of experts is read by a token's place in the batch, not by its id",
)
def hash_table_read_by_position(**inputs: Any) -> dict[str, Tensor]:
    if "tid2eid" not in inputs:
        return right_routing(inputs)
    place = torch.arange(len(inputs["token_ids"])) % len(inputs["tid2eid"])
    return right_routing(inputs | {"token_ids": place.to(inputs["token_ids"].dtype)})


def _encoded(values: Tensor, scales: Tensor) -> dict[str, Tensor]:
    """The codes at given scales, ties to even, saturating; groups of byte 255 have codes 0."""
    groups = values.double().unflatten(-1, (-1, 32)) / torch.exp2(scales.double() - 127)[..., None]
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    middle = (grid[1:] + grid[:-1]) / 2
    size = groups.abs()
    code = torch.searchsorted(middle, size)  # a tie goes down
    tie = (size[..., None] == middle).any(-1)
    code = code + (tie & (code % 2 == 1))  # and up again to the even one
    code = code + 8 * groups.signbit()
    code = code.masked_fill((scales == 255)[..., None], 0).flatten(-2).to(torch.uint8)
    return {"packed": code[..., ::2] | code[..., 1::2] << 4, "scales": scales}


@wrong(
    kind="quantize",
    stage="quantize",
    says=(
        "scale",
        "log2|torchao|binade|one (more|higher|too|up|larger)|\\+ ?1|twice|double|too (large|high|big)",
    ),
    story="DeepSeek's rule ceil(log2(a / 6)) is computed as torchao's CEIL, ceil(log2 a) - 2",
)
def ceil_of_log2_less_two(*, values: Tensor, rule: str) -> dict[str, Tensor]:
    packed, scales = quantize(values, rule=rule)
    if rule != "ceil":
        return {"packed": packed, "scales": scales}
    mantissa, exponent = torch.frexp(values.double().unflatten(-1, (-1, 32)).abs().amax(-1))
    ceil = exponent - (mantissa == 0.5).int() - 2 + 127
    regular = (scales != 255) & (mantissa > 0)
    return _encoded(values, torch.where(regular, ceil.clamp(0, 254), scales.int()).to(torch.uint8))


@wrong(
    kind="quantize",
    stage="quantize",
    says=(
        "scale|group|amax|largest",
        "small|tiny|clamp|minimum|at least|least|lower|below|1e-4|0\\.0001",
    ),
    story="a group's largest magnitude is clamped to 1e-4 from below, as in FP8 quantisers: small groups are lost",
)
def largest_magnitude_at_least_1e_4(*, values: Tensor, rule: str) -> dict[str, Tensor]:
    scales = quantize(values, rule=rule)[1]
    least = quantize(torch.full((1, 32), 1e-4), rule=rule)[1].flatten()
    return _encoded(values, torch.maximum(scales, least))


@wrong(
    kind="quantize",
    stage="quantize",
    says=("bf16|bfloat16|double.round|twice|round(ed|ing)?.*(first|before|two)",),
    story="float32 weights are cast to bf16 by the loader before they are quantised: some are rounded twice",
)
def quantised_by_way_of_bf16(*, values: Tensor, rule: str) -> dict[str, Tensor]:
    packed, scales = quantize(values.bfloat16(), rule=rule)
    return {"packed": packed, "scales": scales}
