"""Intermediates of other types, quantised operands, orders of codes in a word, and sums of slices of K."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from mxfp4ref import MoeCall, forward
from mxfp4ref.conformance import diagnose, differing
from mxfp4ref.conformance.families.engine import prepared
from mxfp4ref.conformance.families.hypotheses.code_parts import code_part_hypotheses
from mxfp4ref.conformance.families.hypotheses.orders_of_k import order_hypotheses
from mxfp4ref.conformance.families.hypotheses.quantised import quantised_hypotheses
from mxfp4ref.conformance.families.hypotheses.roundings import rounding_hypotheses
from mxfp4ref.conformance.families.hypothesis import Hypothesis
from mxfp4ref.conformance.families.search import Search
from mxfp4ref.defects.variants.gemm import GemmVariant
from mxfp4ref.formats.generations import NEWEST
from mxfp4ref.formats.mxfp4 import pack_codes, unpack_codes
from mxfp4ref.goldens import open_goldens
from mxfp4ref.sm90.fp32 import to_bf16
from tests.held_out_kernels.by_hand import Rows, layer, right_gemm, with_experts
from tests.held_out_kernels.calls import captured
from tests.helpers.usual import first

CALL = captured("odd_tokens")


def found(call: MoeCall, got: Tensor, hypotheses: Iterator[Hypothesis]) -> list[Hypothesis]:
    """Those that predict every bit, the simplest first."""
    assert bool(differing(got, forward(call)).any())
    search = Search(prepared(call), got, forward(call), float("inf"))
    return sorted((m.hypothesis for m in search.run(hypotheses) if m.exact), key=lambda h: h.cost)


def in_float16(t: Tensor) -> Tensor:
    return t.half().float()


def gemm_of_float16(x: Tensor, packed: Tensor, scales: Tensor, tactic: object) -> Tensor:
    positions = torch.arange(len(x))[None]
    given = {"tactic": tactic, "generation": NEWEST, "positions": positions}
    return GemmVariant()(x[None], packed[None], scales[None], **given)[0]  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hooks", "stage", "words"),
    first(
        1,
        [
            ({"fc1": lambda rows, acc: in_float16(acc)}, "fc1", "GEMM1's output is kept in float16"),
            ({"fc2": lambda rows, acc: in_float16(acc)}, "fc2", "GEMM2's output is kept in float16"),
            (
                {"activation": lambda rows, a: in_float16(a), "gemm2": gemm_of_float16},
                "activation",
                "the activation is kept in float16",
            ),
        ],
    ),
)
def test_a_wider_type_in_place_of_bf16(
    hooks: dict[str, Callable[..., Tensor]], stage: str, words: str
) -> None:
    best, *_ = found(CALL, layer(CALL, **hooks), rounding_hypotheses(CALL))
    assert best.stages == (stage,)
    assert best.words.startswith(words)


def mxfp8(x: Tensor) -> Tensor:
    """E4M3 with E8M0 scales by 32, as the OCP's specification has it."""
    blocks = x.view(len(x), -1, 32)
    largest = blocks.abs().amax(-1, keepdim=True)
    step = torch.where(largest > 0, torch.exp2(torch.floor(torch.log2(largest)) - 8), 1.0)
    return ((blocks / step).clamp(-448, 448).to(torch.float8_e4m3fn).float() * step).view_as(x)


def int8_by_tensor(rows: Rows, taken: Tensor) -> Tensor:
    step = CALL.input.float().abs().max() / 127
    return to_bf16((taken.float() / step).round() * step)


@pytest.mark.parametrize(
    ("hooks", "stage", "words"),
    first(
        1,
        [
            (
                {"x": int8_by_tensor},
                "input",
                "the input is quantised to int8 (8 bits) and back, with one scale for the whole",
            ),
            (
                {"activation": lambda rows, a: to_bf16(mxfp8(a))},
                "activation",
                "the activation is quantised to FP8 (float8_e4m3fn) and back, with one scale for each 32",
            ),
        ],
    ),
)
def test_operands_that_were_quantised(
    hooks: dict[str, Callable[..., Tensor]], stage: str, words: str
) -> None:
    asked = (h for h in quantised_hypotheses(CALL) if h.stages == (stage,))
    best, *_ = found(CALL, layer(CALL, **hooks), asked)
    assert best.stages == (stage,)
    assert best.words.startswith(words)


def fp8_by_64(a: Tensor) -> Tensor:
    """E4M3, with codes by the reciprocal of the scale."""
    blocks = a.unflatten(-1, (-1, 64))  # type: ignore[no-untyped-call]
    largest = blocks.abs().amax(-1, keepdim=True)
    return ((blocks * (448 / largest)).to(torch.float8_e4m3fn).float() * (largest / 448)).flatten(-2)  # type: ignore[no-any-return]


def int8_by_row(a: Tensor) -> Tensor:
    """With scales that are held in bf16."""
    step = (a.abs().amax(-1, keepdim=True) / 127).bfloat16().float()
    return (a / step).round().clamp(-127, 127) * step


@pytest.mark.parametrize(
    ("change", "words"),
    first(
        1,
        [
            (
                fp8_by_64,
                "each 64 that is its largest number's part of the type's, codes by the type's largest number over",
            ),
            (
                int8_by_row,
                "int8 (8 bits) and back, with one scale for each row that is its largest number's part of the",
            ),
        ],
    ),
)
def test_details_of_a_quantisation(change: Callable[[Tensor], Tensor], words: str) -> None:
    got = layer(CALL, x=lambda rows, x: to_bf16(change(x.float())))
    best, *_ = found(CALL, got, (h for h in quantised_hypotheses(CALL) if h.stages == ("input",)))
    assert words in best.words
    assert best.words.endswith(("over the block's", "held in bf16"))


def test_an_activation_that_was_bf16_before_it_was_quantised() -> None:
    got = layer(CALL, activation=lambda rows, a: to_bf16(fp8_by_64(to_bf16(a).float())))
    best, *_ = found(
        CALL, got, (h for h in quantised_hypotheses(CALL) if h.words.startswith("the activation is"))
    )
    assert best.words.endswith("rounded to bf16 before, codes by the type's largest number over the block's")


@pytest.mark.parametrize(
    "order", [[0, 2, 4, 6, 1, 3, 5, 7], [0, 4, 1, 5, 2, 6, 3, 7], [7, 5, 3, 1, 6, 4, 2, 0]]
)
@pytest.mark.parametrize("fc", ["fc1", "fc2"])
def test_words_packed_in_another_order(fc: str, order: list[int]) -> None:
    codes = unpack_codes(getattr(CALL.experts, f"{fc}_weights"))
    words = codes.unflatten(-1, (-1, 8))[..., order]  # type: ignore[no-untyped-call]
    got = forward(with_experts(CALL, **{f"{fc}_weights": pack_codes(words.flatten(-2).contiguous())}))
    best, *_ = found(
        CALL, got, (h for h in code_part_hypotheses(CALL) if " ".join(map(str, order)) in h.words)
    )
    assert best.stages == (fc,)


def at(end: int) -> Callable[..., Tensor]:
    """A GEMM of two slices of K."""

    def gemm(x: Tensor, packed: Tensor, scales: Tensor, tactic: object) -> Tensor:
        parts = [
            (x[:, k], packed[:, k.start // 2 : k.stop // 2], scales[:, k.start // 32 : k.stop // 32])
            for k in (slice(0, end), slice(end, x.shape[1]))
        ]
        one, other = (right_gemm(*(t.contiguous() for t in part), tactic) for part in parts)  # type: ignore[arg-type]
        return one + other

    return gemm


@pytest.mark.slow
def test_slices_of_k_that_are_not_alike() -> None:
    call = open_goldens().load("gemm/mirrored_hidden_384").call()
    got = layer(call, gemm1=at(128))
    best, *_ = found(call, got, (h for h in order_hypotheses(call) if "slices" in h.words))
    assert best.stages == ("fc1",)
    assert best.words.startswith(
        "in GEMM1 K is split in 2 slices of whole tiles of 128 (the last ones longer"
    )


@pytest.mark.slow
def test_zeros_that_another_order_of_a_sum_leaves() -> None:
    """A possibility, told with its stages: not written is another."""
    call = open_goldens().load("gemm/mirrored_hidden_1536").call()
    got = layer(call, gemm1=at(768))
    assert not got.any()
    finding = diagnose("moe", call, {"output": got}, {"output": forward(call)}).finding
    assert "nothing was written; among what gives this: in GEMM1 K is split in 2 slices" in finding.sentence
    assert "fc1" in finding.stages
    assert finding.hedged
    assert not finding.exact
