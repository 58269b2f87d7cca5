"""A member of each family, on a small call: the sentence and the stage; and what must not be named."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from mxfp4ref.__main__ import commands
from mxfp4ref.conformance import Kernel, Options, diagnose, run
from mxfp4ref.conformance.families import FAMILIES, family_of
from mxfp4ref.conformance.families.batches import each
from mxfp4ref.conformance.families.engine import prepared
from mxfp4ref.conformance.families.hypotheses.activations import activation_hypotheses
from mxfp4ref.conformance.families.hypotheses.outputs import output_hypotheses
from mxfp4ref.conformance.families.hypotheses.tensors import value_hypotheses
from mxfp4ref.conformance.families.hypothesis import slot_outputs
from mxfp4ref.conformance.families.places import named_columns
from mxfp4ref.conformance.families.search import Search
from mxfp4ref.conformance.families.slot_kinds import position_in_expert
from mxfp4ref.conformance.findings.reduction import thread_clock
from mxfp4ref.conformance.looking import SECONDS
from mxfp4ref.defects import DEFECTS
from mxfp4ref.defects.variants.finalize import FinalizeVariant
from mxfp4ref.defects.variants.swiglu import SwigluVariant
from mxfp4ref.goldens import open_goldens, tensor_bytes
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import Stages, forward
from mxfp4ref.sm90 import fp32
from tests.held_out_kernels.by_hand import Rows, layer
from tests.helpers import layers
from tests.helpers.usual import first

EXPERTS = layers.random_experts(
    5, num_experts=4, hidden=256, inner=128, biases=True, parameters=layers.PARAMETERS
)
CALL = layers.random_call(5, EXPERTS, tokens=16, top_k=2)
EXPECTED = forward(CALL)


MOST = int(EXPERTS.fc2_scales.max())


def in_fp8(activation: Tensor) -> Tensor:
    return fp32.to_bf16(activation).to(torch.float8_e4m3fn).to(torch.bfloat16)


def having(call: MoeCall, **tensors: Any) -> Tensor:
    return forward(replace(call, experts=replace(call.experts, **tensors)))


def changed(
    name: str, where: tuple[Any, ...], change: Callable[[Tensor], Tensor]
) -> Callable[[MoeCall], Tensor]:
    """A kernel in which a part of a tensor of the experts is another."""

    def kernel(call: MoeCall) -> Tensor:
        tensor = getattr(call.experts, name).clone()
        tensor[where] = change(tensor[where])
        return having(call, **{name: tensor})

    return kernel


def rows_beyond_four(call: MoeCall) -> Tensor:
    ids = call.token_selected_experts
    position, _ = position_in_expert(ids.to(torch.int64))
    return forward(replace(call, token_selected_experts=torch.where(position >= 4, -1, ids)))


def two(call: MoeCall) -> Tensor:
    return having(replace(call, token_final_scales=call.token_final_scales**2), swiglu_limit=None)


def weighing(change: Callable[[Tensor], Tensor]) -> Callable[[MoeCall], Tensor]:
    return lambda call: forward(
        replace(call, token_final_scales=change(call.token_final_scales).contiguous())
    )


ALL = slice(None)
MEMBERS: dict[str, tuple[Callable[[MoeCall], Tensor], str, str]] = {
    "another expert's": (
        lambda call: having(call, fc2_scales=call.experts.fc2_scales.roll(-1, 0)),
        "fc2",
        "GEMM2's scales are those of the next expert",
    ),
    "values": (
        changed("fc1_scales", (3,), lambda s: s + 1),
        "fc1",
        "GEMM1's scales are 2x what they should be (every scale byte 1 too high), for slots of the last expert",
    ),
    "constant": (
        lambda call: having(call, swiglu_limit=torch.full_like(call.experts.swiglu_limit, 1.5)),
        "activation",
        "the SwiGLU limit is hard-coded as 1.5",
    ),
    "part of K": (
        changed("fc2_weights", (ALL, ALL, slice(-16, None)), torch.zeros_like),
        "fc2",
        "GEMM2: the last K group (32 of K) is left out (taken as zero)",
    ),
    "some rows": (
        changed("fc1_weights", (1, slice(32, 64)), torch.zeros_like),
        "fc1",
        "GEMM1: rows 32 to 63 of the up half are left out (taken as zero), for slots of expert 1 only",
    ),
    "columns": (
        changed("fc2_scales", (ALL, slice(64, 128)), lambda s: torch.full_like(s, 127)),
        "fc2",
        "GEMM2's scales are taken as 1 (byte 127): they are not applied, in columns 64 to 127",
    ),
    "rows": (
        lambda call: having(call, fc1_biases=call.experts.fc1_biases.roll(1, 1)),
        "fc1",
        "the fc1 biases are in each row those of the previous row",
    ),
    "ids": (
        lambda call: forward(
            replace(
                call,
                token_selected_experts=torch.where((i := call.token_selected_experts) < 0, -1, (i + 1) % 4),
            )
        ),
        "slots",
        "slots are computed by the next expert",
    ),
    "dropped slots": (
        rows_beyond_four,
        "slots",
        "the slots that are rows beyond the first 4 of their expert are left out of the sum",
    ),
    "routing weights": (
        weighing(torch.square),
        "finalize",
        "the routing weights are applied twice (squared)",
    ),
    "factor": (
        lambda call: fp32.to_bf16(fp32.mul(fp32.widen(forward(call)), torch.full(call.input.shape, 1.1))),
        "finalize",
        "a factor of 1.1 too many on the bf16 output",
    ),
    "rounding": (
        lambda call: forward(call, Stages(round_fc2=lambda x: fp32.to_bf16(x.half().float()))),
        "fc2",
        "GEMM2's output is rounded to float16 on the way",
    ),
    "sum": (
        lambda call: forward(
            call,
            Stages(
                finalize=FinalizeVariant(lambda a, w, y, b: fp32.fma(w, fp32.add(y, b), a).half().float())
            ),
        ),
        "finalize",
        "the sum over the slots is kept in float16",
    ),
    "experts of the first half": (
        lambda call: having(
            call, **{n: getattr(call.experts, n)[[0, 1, 0, 1]] for n in ("fc1_weights", "fc1_scales")}
        ),
        "fc1",
        "those of the expert at its place in the first half, for both halves",
    ),
    "scales cut off": (
        lambda call: having(call, fc2_scales=call.experts.fc2_scales.clamp(max=MOST - 2)),
        "fc2",
        f"GEMM2's scales are at most 2^{MOST - 2 - 127} (bytes cut off at {MOST - 2})",
    ),
    "an activation in FP8": (
        lambda call: forward(call, Stages(round_activation=in_fp8)),
        "activation",
        "the activation is cast to float8 e4m3 and back once it is bf16",
    ),
    "blocks of tokens in reverse": (
        lambda call: forward(
            replace(call, input=call.input.view(2, 8, -1).flip(1).reshape(call.input.shape))
        ),
        "input",
        "in reverse in each whole block of 8: token n is token n ^ 7",
    ),
    "two": (
        two,
        "activation",
        "two things: limit_ignored: SwiGLU limit dropped; and the routing weights are applied twice (squared)",
    ),
}


@pytest.fixture(autouse=True)
def _no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is found does not depend on how busy the machine is."""
    monkeypatch.setitem(SECONDS, "full", math.inf)


@pytest.mark.slow
def test_rows_that_begin_with_what_gemm2_gave_for_others() -> None:
    def fc2(rows: Rows, acc: Tensor) -> Tensor:
        before = acc.clone()
        for expert in rows.expert.unique():
            its = (rows.expert == expert).nonzero().flatten()
            before[its[4:]] += acc[its[:-4]]
        return fp32.to_bf16(before)

    found = diagnose("moe", CALL, {"output": layer(CALL, fc2=fc2)}, {"output": EXPECTED}).finding
    assert found.sentence.startswith(
        "rows have, added to their own as by sums not cleared, what GEMM2 gives for another row"
    )
    assert "always the row 4 before it" in found.sentence
    assert found.stages == ("fc2", "finalize")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    MEMBERS,
)
def test_a_member_is_told_in_words(name: str) -> None:
    kernel, stage, words = MEMBERS[name]
    found = diagnose("moe", CALL, {"output": kernel(CALL)}, {"output": EXPECTED}).finding
    assert any(
        words in told for told in (found.sentence, *found.hypotheses)
    )  # of a table several are the rule
    assert stage in found.stages
    assert len(found.stages) <= 2
    assert found.exact == bool(words)


def unlike(name: str) -> Callable[[MoeCall], Tensor]:
    """Random bytes for a tensor of the experts."""

    def kernel(call: MoeCall) -> Tensor:
        tensor = getattr(call.experts, name)
        random = torch.randint(
            0, 256, tensor.shape, generator=torch.Generator().manual_seed(3), dtype=torch.uint8
        )
        return having(call, **{name: random})

    return kernel


def flipped(call: MoeCall) -> Tensor:
    output = forward(call)
    chosen = torch.rand(output.shape, generator=torch.Generator().manual_seed(3)) < 0.01
    output.view(torch.int16)[chosen] ^= 1 << 6
    return output


UNNAMED: dict[str, tuple[Callable[[MoeCall], Tensor], str, str]] = {
    "activation": (
        lambda call: forward(
            call,
            Stages(
                activate=SwigluVariant(clamp=lambda u, g, lim: (fp32.minimum(u, lim), g), sigmoid=torch.tanh)
            ),
        ),
        "activation",
        "GEMM2 is right",
    ),
    "fc2": (unlike("fc2_weights"), "", "no activation gives this output by the right GEMM2"),
    "fc1": (unlike("fc1_weights"), "fc1", "GEMM2 is right, and got another activation"),
    "bits": (flipped, "", "single elements are far off, without a pattern of columns"),
    "weights": (
        weighing(lambda w: torch.rand(w.shape, generator=torch.Generator().manual_seed(3))),
        "finalize",
        "the routing weights used are others",
    ),
}


def test_rows_of_other_tokens_are_looked_for_beyond_the_one_that_is_looked_at() -> None:
    call = prepared(open_goldens().load("finalize/slot_order").call()).call
    got = forward(replace(call, input=call.input[(torch.arange(call.num_tokens) - 1).clamp(min=0)]))
    search = Search(prepared(call), got, forward(call), thread_clock() + 60)
    assert len(search.tokens) == 1
    previous = "in the input the rows are those of the previous token, the first one keeping its own"
    some = [h for h in output_hypotheses(call) if h.words == previous]
    assert [m.hypothesis.words for m in search.run(some) if m.hypothesis.words == previous] == [previous]


@pytest.mark.parametrize("name", first(1, UNNAMED))
def test_what_is_in_no_family_gets_its_stage_and_no_name(name: str) -> None:
    kernel, stage, words = UNNAMED[name]
    output = kernel(CALL)
    found = diagnose("moe", CALL, {"output": output}, {"output": EXPECTED}, diagnosis="quick").finding
    assert words in found.sentence
    assert stage in found.stages if stage else not found.stages
    assert not found.exact


@pytest.mark.slow
def test_one_finding_for_all_cases() -> None:
    """Cases that pass, and those that the first one leaves open, decide."""
    goldens = open_goldens()
    cases = [
        goldens.load(name) for name in ("gemm/ordinary", "gemm/uneven_experts", "finalize/missing_experts")
    ]
    kernel = Kernel(
        "next scales",
        ("moe",),
        lambda kind, call: ((kind, call), {}),
        lambda kind, call: having(call, fc1_scales=call.experts.fc1_scales.roll(-1, 0)),
        True,
    )
    report = run(kernel, cases, Options(repeat=False))
    assert report.finding.sentence.startswith("GEMM1's scales are those of the next expert")
    assert (report.finding.stages, report.finding.exact) == (("fc1",), True)
    assert "Every wrong bit is predicted by this" in report.verdict
    assert all(r.ok or (r.diagnosis and r.diagnosis.finding.exact) for r in report.results)


def test_activations_that_are_computed_at_once_are_those_of_each_alone() -> None:
    part = prepared(CALL.select(slice(3, 4)))
    some = [*activation_hypotheses(part.call)][::9]
    outputs = [output for _, output, _ in each(part, some, list)]
    assert len({tensor_bytes(output) for output in outputs if output is not None}) > len(some) / 2
    for hypothesis, output in zip(some, outputs, strict=True):
        alone = hypothesis.run(part)
        assert output is not None
        assert alone is not None
        assert torch.equal(output, alone), hypothesis.words


def test_rows_that_are_seen_are_what_the_second_gemm_gives() -> None:
    part = prepared(CALL.select(slice(3, 4)))
    some = [*value_hypotheses(part.call)][::29]
    for hypothesis, _, rows in each(part, some, list):
        assert rows is not None
        assert torch.equal(rows[None], slot_outputs(hypothesis.change(part))), hypothesis.words


def test_every_named_defect_of_the_layer_has_a_family() -> None:
    assert [d.name for d in DEFECTS.values() if d.target == "moe" and family_of(d.name) is None] == []


def test_the_commands_tell_families() -> None:
    listed = CliRunner().invoke(commands, ["defects"]).output
    assert all(name in listed for name in (*FAMILIES, *DEFECTS))
    told = CliRunner().invoke(commands, ["explain", "part of K"]).output
    assert "the tail, one group, one tile" in told


@pytest.mark.parametrize("right", [5, 64, 126])
def test_all_columns_but_one_that_is_right_by_chance_are_no_part(right: int) -> None:
    columns = torch.ones(128, dtype=torch.bool)
    columns[right] = False
    assert named_columns(columns) is None
