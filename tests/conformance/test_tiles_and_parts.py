"""Tiles of columns that are others', rows behind padding, codes of one GEMM, roundings and sums of parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor

from mxfp4ref import MoeCall, forward
from mxfp4ref.conformance import differing
from mxfp4ref.conformance.families.engine import prepared
from mxfp4ref.conformance.families.hearing import Failure, refuted
from mxfp4ref.conformance.families.hypotheses.code_parts import code_part_hypotheses
from mxfp4ref.conformance.families.hypotheses.columns_of_tiles import tile_column_hypotheses
from mxfp4ref.conformance.families.hypotheses.decodings import CODE_TABLES
from mxfp4ref.conformance.families.hypotheses.memory_readings import matrix_readings
from mxfp4ref.conformance.families.hypotheses.orders_of_k import order_hypotheses, repeat_hypotheses
from mxfp4ref.conformance.families.hypotheses.outputs import output_hypotheses
from mxfp4ref.conformance.families.hypotheses.regions import half_hypotheses
from mxfp4ref.conformance.families.hypotheses.roundings import rounding_hypotheses
from mxfp4ref.conformance.families.hypotheses.tensors import layout_hypotheses
from mxfp4ref.conformance.families.hypothesis import Hypothesis
from mxfp4ref.conformance.families.search import Search
from mxfp4ref.conformance.families.solved.code_tables import code_table_hypotheses
from mxfp4ref.conformance.families.telling import told
from mxfp4ref.defects.variants.gemm import GemmVariant
from mxfp4ref.formats.mxfp4 import E2M1_VALUES
from mxfp4ref.sm90 import fp32
from mxfp4ref.sm90.fp32 import to_bf16, widen
from tests.held_out_kernels.by_hand import Rows, layer, with_experts
from tests.held_out_kernels.calls import captured
from tests.held_out_kernels.formulas_and_tiles import input_normalised_again
from tests.held_out_kernels.november_kernels import november_a_scale_for_each_sixteen
from tests.held_out_kernels.second_draw_engines import second_padded_before_the_cut
from tests.held_out_kernels.second_draw_kernels import (
    second_gate_from_the_accumulators,
    second_partial_sums_cleared_by_the_tile,
    second_split_tiles_meet_in_bf16,
    second_up_overwritten_by_the_gate,
)
from tests.helpers.usual import first


def last_tile_stale(call: MoeCall) -> Tensor:
    def x(rows: Rows, given: Tensor) -> Tensor:
        return torch.cat((given[:, :-64], given[:, -192:-128]), 1)

    return layer(call, x=x)


def fourth_tile(call: MoeCall) -> Tensor:
    def fc1(rows: Rows, acc: Tensor) -> Tensor:
        tiles = acc.unflatten(-1, (-1, 32)).clone()
        tiles[:, 3::4] = tiles[:, 2::4]
        return to_bf16(tiles.flatten(-2))

    return layer(call, fc1=fc1)


def nibbles_of_fc2(call: MoeCall) -> Tensor:
    codes = call.experts.fc2_weights
    return forward(with_experts(call, fc2_weights=codes << 4 | codes >> 4))


KERNELS: list[tuple[Callable[[MoeCall], Tensor], Callable[[MoeCall], Iterable[Hypothesis]], str, str]] = [
    (last_tile_stale, tile_column_hypotheses, "input", "the last tile of 64 columns is the one 2 before"),
    (nibbles_of_fc2, code_part_hypotheses, "fc2", "GEMM2's codes are exchanged in each byte"),
    (fourth_tile, tile_column_hypotheses, "fc1", "every fourth tile of 32 columns is the one before"),
    (input_normalised_again, output_hypotheses, "input", "divided by its root mean square"),
    (
        second_gate_from_the_accumulators,
        rounding_hypotheses,
        "fc1",
        "the gate half of GEMM1's output alone is kept",
    ),
    (second_up_overwritten_by_the_gate, half_hypotheses, "fc1", "up half are those of the other half"),
    (second_padded_before_the_cut, layout_hypotheses, "fc1", "64 further on, as behind padding"),
    (
        second_split_tiles_meet_in_bf16,
        order_hypotheses,
        "fc2",
        "stored in bf16 before they are added, in the last 64 columns",
    ),
    (november_a_scale_for_each_sixteen, matrix_readings, "fc1", "as NVFP4 has them"),
    (second_partial_sums_cleared_by_the_tile, repeat_hypotheses, "fc1", "sums are not cleared by K group"),
]


@pytest.mark.parametrize(("kernel", "every", "stage", "words"), first(4, KERNELS))
def test_changes_that_no_list_had(
    kernel: Callable[[MoeCall], Tensor],
    every: Callable[[MoeCall], Iterable[Hypothesis]],
    stage: str,
    words: str,
) -> None:
    call = captured("prefill")
    search = Search(prepared(call), kernel(call), forward(call), 1e300)
    found = search.run(every(call)) or search.almost()
    finding = told(sorted(found, key=lambda match: match.hypothesis.cost), [], [call])
    assert words in finding.sentence
    assert stage in finding.stages


@pytest.mark.parametrize("fc", first(1, ["fc1", "fc2"]))
def test_any_table_of_codes_is_solved(fc: str) -> None:
    """From all errors together, in the exact arithmetic: by its name, or by its numbers."""
    pipeline = prepared(captured("odd_tokens"))
    negative = [-1.5 * value for value in E2M1_VALUES[:8]]
    for table, words in (
        (
            list(CODE_TABLES["int4 (two's complement)"]),
            "codes are read as int4 (two's complement): 0.5 as 1, 1 as 2,",
        ),
        (
            [*E2M1_VALUES[:8], *negative],
            "weights are decoded by another table of codes: -0.5 as -0.75, -1 as -1.5,",
        ),
    ):
        values = torch.tensor(table, dtype=torch.float64)
        gemm = GemmVariant(decode_codes=lambda codes, values=values: values[codes])
        got = pipeline.staging(**{f"{fc}_gemm": gemm}).run()
        found = list(code_table_hypotheses(pipeline, got, differing(got, pipeline.run())))
        assert any(h.words.startswith(f"GEMM{fc[-1]}'s {words}") and h.predicts(pipeline, got) for h in found)
    scaled = to_bf16(widen(pipeline.call.input) * 1.5)
    got = pipeline.calling(input=scaled).run()
    found = list(code_table_hypotheses(pipeline, got, differing(got, pipeline.run())))
    assert all("table" not in h.words for h in found if "fc1" in h.stages), "a factor shows none"
    assert any(
        h.words.startswith("a factor of 1.5 too many on GEMM1's weights or scales, on the input")
        for h in found
    )
    got = pipeline.then(lambda t: t.roll(1, 1)).run()
    assert not list(code_table_hypotheses(pipeline, got, differing(got, pipeline.run())))


def test_what_makes_other_cases_worse_is_refuted() -> None:
    """A change that fits one case by chance takes others further from what came out; one of two mistakes does not."""
    calls = [prepared(captured(name)) for name in ("odd_tokens", "prefill")]
    want = [pipeline.run() for pipeline in calls]

    def halved(t: Tensor) -> Tensor:
        return to_bf16(fp32.mul(widen(t), torch.full(t.shape, 0.5)))

    moved = Hypothesis(
        "output", ("finalize",), "moved", lambda p: p.then(lambda t: t.roll(32, 1)), of_output=None
    )
    one = Hypothesis("output", ("finalize",), "halved", lambda p: p.then(halved))
    both = [Failure(str(i), p, halved(w).abs(), w) for i, (p, w) in enumerate(zip(calls, want, strict=True))]
    assert refuted((moved,), both)
    assert not refuted((one,), both)
    assert not refuted((moved, one), both)
    assert not refuted((), both)
