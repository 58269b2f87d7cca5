"""Rotated columns, rows at another pitch, exchanged parameters, functions of the output; stages not proven."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mxfp4ref import forward
from mxfp4ref.conformance import differing
from mxfp4ref.conformance.families.engine import prepared
from mxfp4ref.conformance.families.evidence import gather
from mxfp4ref.conformance.families.hypotheses.misread import misread_hypotheses
from mxfp4ref.conformance.families.hypotheses.outputs import inner_hypotheses, output_hypotheses
from mxfp4ref.conformance.families.hypotheses.slots import slot_hypotheses
from mxfp4ref.conformance.families.hypotheses.tensors import constants
from mxfp4ref.conformance.families.hypothesis import Hypothesis
from mxfp4ref.conformance.families.search import Search
from mxfp4ref.conformance.families.telling import told
from mxfp4ref.conformance.findings.finding import Evidence, Finding
from mxfp4ref.model.call import MoeCall
from mxfp4ref.sm90.fp32 import to_bf16
from tests.held_out_kernels.by_hand import layer
from tests.held_out_kernels.calls import captured
from tests.helpers.usual import first


def found(call: MoeCall, got: Tensor, every: Iterable[Hypothesis]) -> Finding:
    search = Search(prepared(call), got, forward(call), 1e300)
    matches = sorted(search.run(every), key=lambda match: match.hypothesis.cost)
    return told([match for match in matches if match.exact], [], [call])


def rotated(t: Tensor, size: int) -> Tensor:
    signs = [[(-1) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    matrix = torch.tensor(signs, dtype=torch.float64) * size**-0.5
    return to_bf16((t.double().unflatten(1, (-1, size)) @ matrix).flatten(1).float())


@pytest.mark.parametrize("size", first(1, [16, 128]))
def test_rotated_columns(size: int) -> None:
    call = captured("odd_tokens")
    got = layer(call, x=lambda rows, x: rotated(x, size))
    finding = found(call, got, output_hypotheses(call))
    assert finding.sentence.startswith(
        f"in the input the columns are rotated, each block of {size} by a Hadamard"
    )
    got = layer(call, activation=lambda rows, x: rotated(to_bf16(x), size))
    finding = found(call, got, inner_hypotheses(call))
    assert finding.sentence.startswith(f"in the activation the columns are rotated, each block of {size} by")
    assert finding.stages == ("fc2", "activation")


def test_input_rows_at_another_pitch() -> None:
    call = captured("odd_tokens")
    x = call.input
    wide = torch.cat((x.flatten(), x.new_zeros(16 * len(x)))).view(len(x), -1)[:, : x.shape[1]]
    finding = found(call, forward(replace(call, input=wide.contiguous())), misread_hypotheses(call))
    assert finding.sentence == "the input is read as if its rows lay 16 elements further apart than they do"
    assert finding.stages == ("input",)


def test_parameters_in_each_others_places() -> None:
    call = captured("gpt_oss")
    e = call.experts
    exchanged = replace(e, swiglu_alpha=e.swiglu_limit, swiglu_limit=e.swiglu_alpha)
    finding = found(call, forward(replace(call, experts=exchanged)), constants(call))
    assert finding.sentence == "the SwiGLU parameters are exchanged: alpha is the limit, limit is the alpha"
    table = torch.stack([t for t in (e.swiglu_alpha, e.swiglu_beta, e.swiglu_limit) if t is not None], 1)
    alpha, beta, limit = table.view(3, -1)
    mixed = replace(e, swiglu_alpha=alpha, swiglu_beta=beta, swiglu_limit=limit)
    finding = found(call, forward(replace(call, experts=mixed)), constants(call))
    assert "alpha, beta, limit lie in one table [E, 3], which is read as [3, E]" in finding.sentence


def of_output(function: Callable[[Tensor], Tensor], name: str = "odd_tokens") -> list[Evidence]:
    call = captured(name)
    got, want = layer(call, output=lambda sums: to_bf16(function(sums))), forward(call)
    return gather(prepared(call), got, want, differing(got, want))


def test_a_function_of_the_right_output() -> None:
    (one,) = of_output(lambda y: 30 * torch.tanh(y / 30))
    assert one.stages == ("finalize",)
    assert one.final
    assert "each element of the output is a function of the right one" in one.sentence
    assert "30 tanh(y / 30)" in one.sentence
    (one,) = of_output(lambda y: y / (1 + y.abs() / 4))
    assert "function of the right one" in one.sentence
    assert "tanh" not in one.sentence


@pytest.mark.parametrize("function", [lambda y: 2 * y, lambda y: y + y.roll(1, 1), lambda y: y * 1.004])
def test_no_function_of_the_right_output(function: Callable[[Tensor], Tensor]) -> None:
    assert not any("function of the right one" in one.sentence for one in of_output(function))


@pytest.mark.slow
def test_rows_that_are_zero_in_any_stage_prove_none() -> None:
    call = captured("prefill")
    last = call.experts.num_experts - 1

    def without_last(local: Tensor) -> Tensor:
        return torch.where(local == last, -1, local)

    finding = found(call, layer(call, local=without_last), slot_hypotheses(call))
    assert finding.stages == ()
    assert finding.sentence.startswith(
        "the slots of the last expert are left out of the sum, or their rows are zero"
    )
    biased = captured("gpt_oss")
    finding = found(biased, layer(biased, local=without_last), slot_hypotheses(biased))
    assert finding.stages == ("slots",)
