"""Twenty more, written without a look at what judges them: loaders, routers, GEMMs, epilogues, a combine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mxfp4ref import MoeCall, forward, quantize
from mxfp4ref.formats.mxfp4 import dequantize, pack_codes, unpack_codes
from mxfp4ref.goldens.runs import run_stage
from mxfp4ref.sm90 import fp32
from mxfp4ref.sm90.activation import sigmoid
from mxfp4ref.sm90.fp32 import to_bf16
from mxfp4ref.sm90.swiglu import swiglu
from mxfp4ref.sm90.tactics import Tactic
from tests.held_out_kernels.by_hand import Rows, layer, right_gemm, up_and_gate, with_experts
from tests.held_out_kernels.definition import wrong

Maybe = Tensor | None


def _times(x: Tensor, factor: Maybe) -> Tensor:
    return x if factor is None else fp32.mul(x, factor.expand_as(x))


def _with_sigmoid(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """The activation with another function in place of the sigmoid."""

    def act(fc1: Tensor, bias: Maybe, alpha: Maybe, beta: Maybe, limit: Maybe) -> Tensor:
        up, gate = up_and_gate(fc1, bias, limit)
        linear = up if beta is None else fp32.add(up, beta.expand_as(up))
        return fp32.mul(fp32.mul(gate, function(_times(gate, alpha))), linear)

    return act


@wrong(
    stage=("input", "fc1"),
    says=(
        "half|halves|column|hidden|\\bK\\b|k group|groups? of k|k tile",
        "zero|not (copied|read|loaded|added|summed)|missing|lost|left out|drop|skip|ignored|cut|omit|"
        "only the first",
    ),
    story="hidden states are copied into a padded buffer with cudaMemcpy2D, whose width is in bytes and is "
    "given in elements: the second half of each row stays zero",
)
def memcpy2d_width_is_in_elements(call: MoeCall) -> Tensor:
    x = call.input.clone()
    x[:, x.shape[1] // 2 :] = 0
    return forward(replace(call, input=x))


@wrong(
    stage=("input", "slots", "fc1"),
    says=(
        "\\blast\\b|\\bfinal\\b|\\bend\\b|tail|boundar",
        "row|token",
        "previous|before|preced|repeat|duplicat|twice|another|neighbou?r|copy|copies|clamp|n ?- ?2|"
        "one too (low|early)|(other|wrong) (row|token)",
    ),
    story="the gather clamps its index at the row count less two: each expert's last row is read from the "
    "row before",
)
def gather_clamps_one_row_too_early(call: MoeCall) -> Tensor:
    def x(rows: Rows, taken: Tensor) -> Tensor:
        at = torch.arange(len(taken))
        last = torch.ones_like(at, dtype=torch.bool)
        last[:-1] = rows.expert[1:] != rows.expert[:-1]
        return taken[at - (last & (rows.position > 0)).long()]

    return layer(call, x=x)


@wrong(
    stage=("slots", "finalize"),
    says=(
        "slot|expert|\\bids?\\b",
        "pair|neighbou?r|adjacent|2i|// ?2|>> ?1|lowest bit|low bit|halved|same (half|two)|two experts|twin|"
        "even and odd",
        "drop|skip|lost|left out|missing|not (added|summed|counted|computed)|ignored|zero|only the first|"
        "duplicate|omit",
    ),
    story="the check for an expert named twice compares ids without their lowest bit: of a token's slots "
    "with experts 2i and 2i+1 only the first counts",
)
def named_twice_without_the_lowest_bit(call: MoeCall) -> Tensor:
    def local(right: Tensor) -> Tensor:
        kept = right.clone()
        for slot in range(1, right.shape[1]):
            earlier = right[:, :slot]
            again = ((earlier >> 1 == right[:, slot, None] >> 1) & (earlier >= 0)).any(1)
            kept[again, slot] = -1
        return kept

    return layer(call, local=local)


@wrong(
    stage="slots",
    says=(
        "foreign|other ranks?|another rank|not (of |on |held by )?(this|its|the) rank|outside|remote|"
        "all (of )?the slots|(all|every) slots?|rank",
        "modulo|\\bmod\\b|id % |wrap|remainder|(are|is) computed|not skipped|as (if )?local|taken for",
    ),
    story="the local expert is id % experts on the rank, and nobody asks whether the id is the rank's",
)
def local_expert_is_the_remainder(call: MoeCall) -> Tensor:
    ids = call.token_selected_experts.long()
    return layer(call, local=lambda right: torch.where(ids < 0, right, ids % call.experts.num_experts))


@wrong(
    stage="slots",
    says=(
        "expert",
        "rows?\\b|capacity|load|count|beyond|overflow|after|busiest|crowded|position|first \\d+",
        "rerout|re-rout|redirect|another|other|different|moved|instead|idle|least|(goes|go|sent|given) to|"
        "wrong",
    ),
    story="what exceeds an even share of the rows is not dropped but rerouted to the least loaded expert",
)
def overflow_rerouted_to_the_idlest_expert(call: MoeCall) -> Tensor:
    def local(right: Tensor) -> Tensor:
        count = call.experts.num_experts
        loads = torch.bincount(right[right >= 0], minlength=count)
        share, idlest = -(-int(loads.sum()) // count), int(loads.argmin())
        moved = right.clone()
        for expert in range(count):
            for token, slot in (right == expert).nonzero()[share:].tolist():
                if not bool((moved[token] == idlest).any()):
                    moved[token, slot] = idlest
        return moved

    return layer(call, local=local)


@wrong(
    stage="fc1",
    says=(
        "GEMM ?1|fc1|first GEMM|gate|\\bup\\b|w1|w3",
        "\\b128\\b|(four|4|neighbouring|several) groups|groups of|block|codes|k tile",
        "requanti|re-quanti|round|max|larg|highest|share|common|merge|coars|(one|same|single) scale|"
        "small (codes|weights|values)|changed codes|other codes|twice",
    ),
    story="the loader requantises w13 for a kernel with a scale for each 128 along K: the largest of the "
    "four, and the codes of the other groups are rounded once more",
)
def w13_requantised_in_blocks_of_128(call: MoeCall) -> Tensor:
    scales = call.experts.fc1_scales
    assert scales is not None
    bytes_ = scales.view(torch.uint8)
    largest = torch.cat([b.amax(-1, keepdim=True).expand_as(b) for b in bytes_.split(4, -1)], -1).contiguous()
    codes = unpack_codes(call.experts.fc1_weights)
    lost = (largest.int() - bytes_.int()).repeat_interleave(32, -1).float()
    magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])[(codes & 7).long()] * (-lost).exp2()
    # Half-way points between codes, of which every second belongs to the upper one: ties go to even codes.
    rounded = torch.zeros_like(codes)
    for middle, up in zip((0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0), (False, True) * 4, strict=False):
        rounded += (magnitudes >= middle) if up else (magnitudes > middle)
    packed = pack_codes(rounded | codes & 8)
    return forward(with_experts(call, fc1_weights=packed, fc1_scales=largest))


@wrong(
    stage="fc1",
    says=(
        "GEMM ?1|fc1|first GEMM|gate|\\bup\\b",
        "scale",
        "256|wrap|modulo|\\bmod\\b|byte (row|index)|8.?bit|uint8|eight bit|mask|"
        "(other|another|wrong|earlier|different|first) rows?|row (index|number|r\\b)|of rows?\\b",
    ),
    story="the row of GEMM1's scales is kept in a uint8_t: rows from 256 on have the scales of the rows 256 "
    "before",
)
def fc1_scale_row_kept_in_a_byte(call: MoeCall) -> Tensor:
    scales = call.experts.fc1_scales
    assert scales is not None
    return forward(with_experts(call, fc1_scales=scales[:, torch.arange(scales.shape[1]) % 256].contiguous()))


@wrong(
    stage="activation",
    says=(
        "sigmoid|silu|swish|gate",
        "previous|before|preced|neighbou?r|shift|\\blate\\b|(another|other|wrong) (column|element|gate)|"
        "one column|off by one|[ci] ?- ?1|beside|earlier",
    ),
    story="the sigmoid is software-pipelined over a thread's eight columns and used one step late: each "
    "column but the first has that of the column before",
)
def sigmoid_of_the_column_before(call: MoeCall) -> Tensor:
    def late(z: Tensor) -> Tensor:
        column = torch.arange(z.shape[-1])
        return sigmoid(z[..., column - (column % 8 > 0).long()].contiguous())

    return layer(call, swiglu=_with_sigmoid(late))


@wrong(
    stage="activation",
    says=(
        "sigmoid|silu|swish|\\bexp",
        "table|look.?up|step|grid|coarse|approx|precis|accura|round|quanti[sz]|bits|satur|resolution",
    ),
    story="the sigmoid is looked up in a table of 1024 entries over [-8, 8), the nearest entry, not "
    "interpolated",
)
def sigmoid_from_a_table(call: MoeCall) -> Tensor:
    def nearest(z: Tensor) -> Tensor:
        return sigmoid(((z + 8) * 64).round().clamp(0, 1023) / 64 - 8)

    return layer(call, swiglu=_with_sigmoid(nearest))


@wrong(
    stage="activation",
    says=(
        "sigmoid|silu|swish",
        "bias",
        "without|before|not (added|in|part|include)|missing|left out|omit|unbiased|lacks|ignor|only|raw|"
        "no bias",
    ),
    story="the sigmoid takes GEMM1's gate as it comes, and the bias is added only to the gate that it "
    "multiplies",
)
def sigmoid_of_the_gate_without_its_bias(call: MoeCall) -> Tensor:
    def act(fc1: Tensor, bias: Maybe, alpha: Maybe, beta: Maybe, limit: Maybe) -> Tensor:
        if bias is None:
            return swiglu(fc1, bias, alpha, beta, limit)
        up, gate = up_and_gate(fc1, bias, limit)
        _, unbiased = up_and_gate(fc1, None, limit)
        linear = up if beta is None else fp32.add(up, beta.expand_as(up))
        return fp32.mul(fp32.mul(gate, sigmoid(_times(unbiased, alpha))), linear)

    return layer(call, swiglu=act)


@wrong(
    stage="activation",
    says=(
        "activation|swiglu|silu|GEMM ?2|fc2|second GEMM",
        "1 ?/ ?6|0\\.1[67]|sixth|by (six|6)|factor|constant|\\btimes\\b|multipl|divid|scaled|too small",
    ),
    story="the epilogue's quantisation factor is that of the NVFP4 build: the activation is multiplied by "
    "1/6 before it is rounded to bf16",
)
def quantisation_factor_of_another_build(call: MoeCall) -> Tensor:
    def act(fc1: Tensor, bias: Maybe, alpha: Maybe, beta: Maybe, limit: Maybe) -> Tensor:
        right = swiglu(fc1, bias, alpha, beta, limit)
        return fp32.mul(right, torch.full_like(right, 1 / 6))

    return layer(call, swiglu=act)


@wrong(
    stage="fc2",
    says=(
        "column|tile|block",
        "revers|mirror|backward|from the (end|last)|order|permut|swap|exchang|serpentine|zigzag|"
        "(another|other|wrong) (column|tile|block)|instead of|raster",
        "\\bodd\\b|every (other|second)|expert",
    ),
    story="a serpentine raster walks the column tiles of every odd expert backwards, and GEMM2's store "
    "still counts them forwards",
)
def serpentine_raster_stored_forwards(call: MoeCall) -> Tensor:
    def fc2(rows: Rows, acc: Tensor) -> Tensor:
        out = to_bf16(acc)
        tiles = out.shape[1] // 64
        column = torch.arange(out.shape[1])
        back = torch.where(column < 64 * tiles, (tiles - 1 - column // 64) * 64 + column % 64, column)
        return torch.where((rows.expert % 2 == 1)[:, None], out[:, back], out)

    return layer(call, fc2=fc2)


@wrong(
    stage="fc2",
    says=(
        "GEMM ?2|fc2|second GEMM|\\bw2\\b|down",
        "2 ?: ?4|(two|half|2) (of|in) (each |every )?(four|4)|of (each |every )?(four|4)|spars|"
        "prun|small(er|est)?\\b|magnitude|some (codes|weights)|codes? .*zero|half (of )?the (codes|weights)",
    ),
    story="a loader option packs w2 for the sparse tensor cores: of each four weights along K the two "
    "smaller ones become zero",
)
def w2_pruned_to_two_of_four(call: MoeCall) -> Tensor:
    codes = unpack_codes(call.experts.fc2_weights)
    fours = codes.unflatten(-1, (-1, 4))
    largest = torch.sort((fours & 7).int(), dim=-1, descending=True, stable=True).indices[..., :2]
    kept = torch.zeros_like(fours).scatter(-1, largest, fours.gather(-1, largest))
    return forward(with_experts(call, fc2_weights=pack_codes(kept.flatten(-2))))


@wrong(
    stage="fc2",
    says=(
        "GEMM ?2|fc2|second GEMM|down",
        "tree|pair|order|split|separate|partial|sums? of|several (sums|accumulators)|slices|two by two|"
        "accumul|rounded (more|twice|apart|alone)|not fused|flush",
    ),
    story="GEMM2's groups are scaled into accumulators of their own, which are added up as a binary tree",
)
def fc2_groups_added_as_a_tree(call: MoeCall) -> Tensor:
    def gemm(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        pieces = zip(x.split(32, 1), packed.split(16, 1), scales.split(1, 1), strict=True)
        level = [right_gemm(a.contiguous(), w.contiguous(), s.contiguous(), tactic) for a, w, s in pieces]
        while len(level) > 1:
            rest = level[len(level) // 2 * 2 :]
            level = [fp32.add(a, b) for a, b in zip(level[0::2], level[1::2], strict=False)] + rest
        return level[0]

    return layer(call, gemm2=gemm)


@wrong(
    stage="finalize",
    says=(
        "weight",
        "byte|8.?bit|eight bit|uint8|1 ?/ ?255|255|step|fixed.?point|quanti[sz]|round|precis|grid|bits|"
        "coarse",
    ),
    story="the routing weights travel with the ids as one byte each, in units of 1/255",
)
def weights_travel_as_a_byte(call: MoeCall) -> Tensor:
    def weights(local: Tensor, given: Tensor) -> Tensor:
        return (given * 255).round().clamp(0, 255) / 255

    return layer(call, weights=weights)


@wrong(
    stage="finalize",
    says=(
        "column|element|\\bline|bytes",
        "flag|constant|zero|overwrit|lost|not (written|stored|computed)|missing|garbage|subnormal|tiny|"
        "the same|unwritten|not .*(depend|right)",
        "\\b64\\b|every|last (four|4)|\\b60\\b|each|modulo|\\bmod\\b|periodic|\\b128\\b",
    ),
    story="the combine sends lines of 128 bytes that end in a flag of 8, LL128, and copies them out with "
    "the flags: of every 64 columns the last four hold the number 1 as a 64-bit integer",
)
def flags_of_the_lines_left_in_the_output(call: MoeCall) -> Tensor:
    def output(sums: Tensor) -> Tensor:
        words = to_bf16(sums).view(torch.int16).clone()
        column = torch.arange(words.shape[1]) % 64
        words[:, column >= 60] = 0
        words[:, column == 60] = 1
        return words.view(torch.bfloat16)

    return layer(call, output=output)


@wrong(
    kind="routing",
    stage="routing",
    says=(
        "weight|scale|softmax|denominator|normali[sz]",
        "one more|extra|sink|\\+ ?1\\b|plus one|1 ?\\+|zero logit|logit of (0|zero)|additional|sums? (is |"
        "are )?(to )?(less|below|<|under|not)|(less|below|smaller) than (1|one)|do(es)? not (sum|add)|"
        "too small|k ?\\+ ?1",
    ),
    story="gpt-oss's softmax over the k is the one of its attention, with a sink: a further logit of zero "
    "in the sum",
)
def expert_softmax_with_a_sink(**inputs: Any) -> dict[str, Tensor]:
    routed: dict[str, Tensor] = dict(run_stage("routing", inputs))  # type: ignore[arg-type]
    if inputs["preset"] != "gpt_oss":
        return routed
    logits = inputs["logits"].double().gather(1, routed["ids"].long().clamp(min=0))
    total = logits.exp().sum(1, keepdim=True)
    shrunk = (routed["scales"].double() * (1 / (1 + 1 / total))).float()
    return {**routed, "scales": torch.where(routed["ids"] < 0, routed["scales"], shrunk)}


@wrong(
    kind="routing",
    stage="routing",
    says=(
        "group",
        "strid|interleav|modulo|\\bmod\\b|e % |every \\w+ expert|round.?robin|contiguous|consecutive|"
        "neighbou?rs|transpos|membership|which experts|remainder|dealt|made of",
    ),
    story="the groups of DeepSeek-V3's router are taken with a stride: expert e is in group e % n_group, "
    "not in group e // (E / n_group)",
)
def expert_groups_taken_with_a_stride(**inputs: Any) -> dict[str, Tensor]:
    if inputs["preset"] != "deepseek_v3":
        return dict(run_stage("routing", inputs))  # type: ignore[arg-type]
    num_experts, groups = inputs["logits"].shape[1], inputs.get("n_group", 8)
    at = torch.arange(num_experts).view(-1, groups).T.flatten()
    moved = {
        **inputs,
        "logits": inputs["logits"][:, at].contiguous(),
        "correction_bias": inputs["correction_bias"][at].contiguous(),
    }
    routed: dict[str, Tensor] = dict(run_stage("routing", moved))  # type: ignore[arg-type]
    ids = routed["ids"]
    return {**routed, "ids": torch.where(ids < 0, ids, at[ids.long().clamp(min=0)].int())}


@wrong(
    kind="quantize",
    stage="quantize",
    says=(
        "satur|clamp|clip|larg|max|\\btop\\b|codes? 7|\\b6(\\.0)?\\b|0x7|six",
        "\\b4(\\.0)?\\b|codes? 6|nan|reserv|never|not used|missing|unused|does not occur|no (code|6)",
    ),
    story="as in E4M3 the code of all ones is taken for NaN and never written: elements saturate at 4, not "
    "at 6",
)
def code_of_all_ones_reserved_for_nan(values: Tensor, rule: Any) -> dict[str, Tensor]:
    packed, scales = quantize(values, rule=rule)
    codes = unpack_codes(packed)
    return {"packed": pack_codes(torch.where(codes & 7 == 7, codes - 1, codes)), "scales": scales}


@wrong(
    kind="dequantize",
    stage="dequantize",
    says=(
        "zeros?\\b|codes? (0|8)|[+-]0\\b",
        "exponent|\\bbits|huge|large|\\binf|nonzero|non-zero|not (a )?zero|becom|instead of|stands? for|"
        "decode|wrong|other (value|number)|power",
    ),
    story="the scale is added to the exponent field of the element's bits, and nobody has thought of zeros, "
    "which become powers of two",
)
def scale_added_to_the_exponent_of_zeros(
    packed: Tensor, scales: Tensor, convention: Any, dtype: str
) -> dict[str, Tensor]:
    kind = getattr(torch, dtype)
    integer, fraction = {
        "bfloat16": (torch.int16, 7),
        "float32": (torch.int32, 23),
        "float64": (torch.int64, 52),
    }[dtype]
    right = dequantize(packed, scales, convention=convention, dtype=kind)
    codes = unpack_codes(packed)
    sign = (codes >> 3).long() << {7: 15, 23: 31, 52: 63}[fraction]
    exponent = scales.view(torch.uint8).long().repeat_interleave(32, dim=-1) - 127
    bits = (sign + (exponent << fraction)).to(integer)
    return {"values": torch.where(codes & 7 == 0, bits.view(kind), right)}
