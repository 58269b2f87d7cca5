"""What goes wrong in a kernel in CUDA or Triton: fragments, swizzles, pipelines, tiles' tails, atomic sums."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mxfp4ref import MoeCall, forward
from mxfp4ref.formats.mxfp4 import pack_codes, unpack_codes
from mxfp4ref.sm90.finalize import finalize
from mxfp4ref.sm90.fp32 import to_bf16
from mxfp4ref.sm90.tactics import Tactic
from tests.held_out_kernels.by_hand import Rows, layer, local_experts, right_gemm, with_experts
from tests.held_out_kernels.definition import wrong
from tests.held_out_kernels.sums_and_roundings import _split

Maybe = Tensor | None
FC1, FC2 = "GEMM ?1|fc1|first GEMM", "GEMM ?2|fc2|second GEMM"
MISSING = "drop|missing|omit|left out|not added|skipped|ignored|lost|zero|not computed|too few"
MOVED = "transpos|permut|order|swizzl|swap|exchang|shuffl|trade|another|moved|mixed"


def _rows_per_expert(rows: Rows) -> Tensor:
    """`[R]`: how many rows the expert of a row has."""
    return torch.bincount(rows.expert)[rows.expert]


def _codes_changed(packed: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    return pack_codes(change(unpack_codes(packed)).contiguous())


def _scales(call: MoeCall, which: int) -> Tensor:
    scales = (call.experts.fc1_scales, call.experts.fc2_scales)[which]
    assert scales is not None
    return scales


@wrong(
    stage=("slots", "finalize", "fc1", "fc2", "activation"),
    says=("row|expert|slot|token", "tail|last|end|beyond|tile|multiple|block", MISSING),
    story="an expert's rows beyond its last full tile of eight are not computed",
)
def row_tail_not_computed(call: MoeCall) -> Tensor:
    def fc2(rows: Rows, acc: Tensor) -> Tensor:
        kept = rows.position < _rows_per_expert(rows) // 8 * 8
        return to_bf16(acc) * kept[:, None]

    return layer(call, fc2=fc2)


@wrong(
    stage=("slots", "fc1", "fc2"),
    says=(
        "experts?\\b",
        "next|previous|before|another|shift|off by|one too|other experts|neighbou?r|of expert",
    ),
    story="experts without rows are not counted, so that those after one take the weights of an expert before",
)
def offset_after_an_empty_expert(call: MoeCall) -> Tensor:
    def expert(rows: Rows) -> Tensor:
        used, index = rows.expert.unique(return_inverse=True)
        return torch.arange(len(used))[index]

    return layer(call, expert1=expert, expert2=expert)


@wrong(
    stage="fc1",
    says=("scale", "last|tail|end", "group|\\bK\\b|tile"),
    story="in the last tile of 64 along K the two groups' scales of fc1 are exchanged",
)
def fc1_scales_exchanged_in_the_last_tile(call: MoeCall) -> Tensor:
    scales = _scales(call, 0).clone()
    scales[..., -2:] = scales[..., -2:].flip(-1)
    return forward(with_experts(call, fc1_scales=scales))


@wrong(
    stage="fc2",
    says=("scale", "group|\\bK\\b|byte|word", MOVED + "|revers|four|\\b4\\b"),
    story="the scale bytes of fc2 are read as words of the other endianness: four K groups in reverse",
)
def fc2_scale_words_of_the_other_endianness(call: MoeCall) -> Tensor:
    turned = _scales(call, 1).unflatten(-1, (-1, 4)).flip(-1).flatten(-2)
    return forward(with_experts(call, fc2_scales=turned))


@wrong(
    stage="fc1",
    says=("scale", "interleav|gate|up|order|permut|row"),
    story="fc1's scales are still interleaved gate0, up0, gate1, up1, ..., its codes are not",
)
def fc1_scales_still_interleaved(call: MoeCall) -> Tensor:
    up, gate = _scales(call, 0).chunk(2, 1)
    return forward(with_experts(call, fc1_scales=torch.stack([gate, up], 2).flatten(1, 2)))


@wrong(
    stage=("activation", "fc2"),
    says=(FC2 + "|activation|input of", MOVED, "row|column|block|8"),
    story="ldmatrix without .trans: 8 x 8 blocks of the activation are transposed on their way into GEMM2",
)
def activation_blocks_transposed(call: MoeCall) -> Tensor:
    def activation(rows: Rows, a: Tensor) -> Tensor:
        a = to_bf16(a)
        whole = rows.position // 8 * 8 + 8 <= _rows_per_expert(rows)
        blocks = a[whole].unflatten(0, (-1, 8)).unflatten(2, (-1, 8))
        a[whole] = blocks.transpose(1, 3).flatten(2).flatten(0, 1)
        return a

    return layer(call, activation=activation)


@wrong(
    stage="fc1",
    says=(FC1, MOVED + "|codes|weights"),
    story="8 x 8 blocks of fc1's codes are transposed, their scales are not",
)
def fc1_code_blocks_transposed(call: MoeCall) -> Tensor:
    def turned(codes: Tensor) -> Tensor:
        blocks = codes.unflatten(2, (-1, 8)).unflatten(1, (-1, 8))
        return blocks.transpose(2, 4).flatten(3).flatten(1, 2)

    return forward(with_experts(call, fc1_weights=_codes_changed(call.experts.fc1_weights, turned)))


@wrong(
    stage="fc2",
    says=(FC2 + "|column", "column|row|block|warp|16", MOVED + "|codes|weights"),
    story="one warp of four does not swizzle: in rows 16 to 31 of each 64 of fc2 chunks of 8 codes change places",
)
def fc2_swizzle_off_in_one_warp(call: MoeCall) -> Tensor:
    def unswizzled(codes: Tensor) -> Tensor:
        row = torch.arange(codes.shape[1])
        flip = torch.where(row // 16 % 4 == 1, row % 8, 0)
        chunk = torch.arange(codes.shape[2] // 8)[None] ^ flip[:, None]
        by_chunk = codes.unflatten(2, (-1, 8))
        return by_chunk.gather(2, chunk[None, :, :, None].expand_as(by_chunk)).flatten(2)

    return forward(with_experts(call, fc2_weights=_codes_changed(call.experts.fc2_weights, unswizzled)))


@wrong(
    stage="fc2",
    says=(
        FC2 + "|column",
        "column|tile|block",
        "stale|accum|not cleared|not reset|added|neighbou?r|previous|before",
    ),
    story="GEMM2's accumulators are not cleared between tiles: columns 64 to 127 start from those of 0 to 63",
)
def fc2_stale_accumulators(call: MoeCall) -> Tensor:
    def fc2(rows: Rows, acc: Tensor) -> Tensor:
        acc = acc.clone()
        acc[:, 64:128] += acc[:, :64]
        return to_bf16(acc)

    return layer(call, fc2=fc2)


@wrong(
    stage="fc2",
    says=(FC2, "expert", "\\bK\\b|group|column|tile", "previous|before|another|stale|next|neighbou?r|other"),
    story="the pipeline's first stage is not waited for: the first 64 of K of fc2's weights are the expert's before",
)
def fc2_first_k_tile_of_the_expert_before(call: MoeCall) -> Tensor:
    packed, scales = call.experts.fc2_weights.clone(), _scales(call, 1).clone()
    packed[1:, :, :32] = call.experts.fc2_weights[:-1, :, :32]
    scales[1:, :, :2] = _scales(call, 1)[:-1, :, :2]
    return forward(with_experts(call, fc2_weights=packed, fc2_scales=scales))


@wrong(
    stage="fc1",
    says=(FC1, "last|tail|end|group|\\bK\\b|row", "row|next|another|shift"),
    story="an asynchronous copy is one stride off: the last K group of fc1's codes is that of the row after",
)
def fc1_last_codes_of_the_next_row(call: MoeCall) -> Tensor:
    packed = call.experts.fc1_weights.clone()
    packed[..., -16:] = packed[..., -16:].roll(-1, 1)
    return forward(with_experts(call, fc1_weights=packed))


@wrong(
    stage="fc2",
    says=("split|partial|parts|K groups|halves|order|sum", "bf16|bfloat16|round"),
    story="GEMM2 is cut in four along K, and the partial sums meet in a bf16 workspace",
)
def fc2_split_k_in_bf16(call: MoeCall) -> Tensor:
    return layer(call, gemm2=_split(4, torch.bfloat16))


@wrong(
    stage="finalize",
    says=("bf16|bfloat16", "sum|accum|slot|term|add|atomic"),
    story="the slots are added by atomic adds of bf16: the sum is rounded after each",
)
def slots_added_in_bf16(call: MoeCall) -> Tensor:
    def atomic(by_slot: Tensor, local: Tensor, weights: Tensor, bias: Maybe) -> Tensor:
        total = torch.zeros(len(by_slot), by_slot.shape[2])
        for slot in range(by_slot.shape[1]):
            one = slice(slot, slot + 1)
            term = to_bf16(finalize(by_slot[:, one], local[:, one], weights[:, one], bias))
            total = to_bf16(total + term.float()).float()
        return total

    return layer(call, finalize=atomic)


@wrong(
    stage=("slots", "finalize"),
    says=("row|expert|slot|token|term", "twice|double|2x|two times|two|factor"),
    story="the scheduler hands out an expert's last, partial tile of eight rows twice, and both are added",
)
def last_row_tile_added_twice(call: MoeCall) -> Tensor:
    def fc2(rows: Rows, acc: Tensor) -> Tensor:
        out = to_bf16(acc)
        twice = rows.position >= _rows_per_expert(rows) // 8 * 8
        return torch.where(twice[:, None], 2 * out, out)

    return layer(call, fc2=fc2)


@wrong(
    stage=("slots", "finalize"),
    says=("slot|term|expert|row", MISSING),
    story="a race of plain adds: now and then a slot's term is lost in a block of 64 columns",
)
def terms_lost_in_a_race(call: MoeCall) -> Tensor:
    local = local_experts(call)
    blocks = call.experts.hidden_size // 64
    random = torch.rand(*local.shape, blocks, generator=torch.Generator().manual_seed(11))

    def lossy(by_slot: Tensor, local: Tensor, weights: Tensor, bias: Maybe) -> Tensor:
        parts = by_slot.unflatten(2, (blocks, -1))
        sums = []
        for block in range(blocks):
            kept = torch.where(random[..., block] < 0.06, -1, local)
            columns = slice(64 * block, 64 * (block + 1))
            sums.append(
                finalize(parts[:, :, block], kept, weights, None if bias is None else bias[:, columns])
            )
        return torch.cat(sums, 1)

    return layer(call, finalize=lossy)


@wrong(
    stage=("slots", "finalize"),
    says=("rows|tokens|slots", MOVED + "|permutation|other (rows|tokens|slots)|got"),
    story="the sum reads rows by the permutation that sorted them instead of its inverse",
)
def permutation_instead_of_its_inverse(call: MoeCall) -> Tensor:
    def moved(by_slot: Tensor, local: Tensor, weights: Tensor, bias: Maybe) -> Tensor:
        flat, expert = by_slot.flatten(0, 1), local.flatten()
        order = torch.argsort(torch.where(expert < 0, len(expert), expert), stable=True)
        rows = flat[order]  # as GEMM2 left them
        return finalize(rows[order].view_as(by_slot), local, weights, bias)

    return layer(call, finalize=moved)


@wrong(
    stage=("input", "slots", "fc1"),
    says=("token|row|input", MOVED + "|wrong|other|got|of token"),
    story="slots are expanded slot by slot, but the gather takes them as token by token",
)
def gathered_slot_by_slot(call: MoeCall) -> Tensor:
    def x(rows: Rows, taken: Tensor) -> Tensor:
        return call.input[(rows.token * call.top_k + rows.slot) % call.num_tokens]

    return layer(call, x=x)


@wrong(
    stage="finalize",
    says=("weight", "slot|token|\\bk\\b", MOVED + "|wrong|other|major"),
    story="the routing weights are read as [slots, tokens]",
)
def weights_read_slot_major(call: MoeCall) -> Tensor:
    def weights(local: Tensor, right: Tensor) -> Tensor:
        return right.reshape(right.shape[1], right.shape[0]).T.contiguous()

    return layer(call, weights=weights)


@wrong(
    stage=("activation", "fc1"),
    says=("gate|up|half|column|block", MOVED + "|pair|next|neighbou?r"),
    story="each 64 columns of gate meet the neighbouring 64 columns of up",
)
def gate_and_up_blocks_mispaired(call: MoeCall) -> Tensor:
    def fc1(rows: Rows, acc: Tensor) -> Tensor:
        up, gate = to_bf16(acc).chunk(2, 1)
        return torch.cat([up.unflatten(1, (-1, 2, 64)).flip(2).flatten(1), gate], 1)

    return layer(call, fc1=fc1)


@wrong(
    stage=("fc1", "fc2"),
    says=(
        "group|\\bK\\b|tile",
        "expert|row|tile",
        "previous|before|another|stale|other|left out|missing|lost|zero",
    ),
    story="the variant for up to 16 rows of an expert leaves out the last 64 of K in GEMM2",
)
def fc2_tail_of_k_lost_where_rows_are_few(call: MoeCall) -> Tensor:
    def gemm(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        if len(x) > 16:
            return right_gemm(x, packed, scales, tactic)
        cut = x.clone()
        cut[:, -64:] = 0
        return right_gemm(cut, packed, scales, tactic)

    return layer(call, gemm2=gemm)
