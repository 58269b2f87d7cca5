"""Every activation through the whole call: forward, trace, drop-in, layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from mxfp4ref.formats.experts import PARAMETERS
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.flashinfer import torch_ref_cutlass_fused_moe
from mxfp4ref.model.forward import KERNEL, forward, trace
from mxfp4ref.model.layer import moe_layer
from mxfp4ref.model.parallel import Ranks, forward_all_ranks, split_intermediate
from mxfp4ref.routing.presets import mixtral
from mxfp4ref.sm90 import fp32
from mxfp4ref.sm90.activation import ACTIVATIONS, RELU2, SITU, SWIGLU, SWIGLU_BIAS, SWIGLU_STEP, activate
from tests.helpers import bits, layers
from tests.helpers.drop_in import arguments_of
from tests.helpers.forward_calls import assert_same_trace

BARE = layers.random_experts(7, hidden=128, inner=128, biases=True)
GIVEN = {
    "swiglu_alpha": torch.tensor([1.702, 0.5, 1.0, 2.0]),
    "swiglu_beta": torch.tensor([1.0, 0.0, -0.5, 0.25]),
    "swiglu_limit": torch.tensor([2.0, 0.1, 7.0, 1.0]),
    "situ_beta": torch.tensor([4.0, 0.5, 1.0, 2.0]),
    "situ_linear_beta": torch.tensor([25.0, 1.0, 0.7, 3.0]),
}
ALL = replace(BARE, **GIVEN)
CALL = layers.random_call(7, ALL, tokens=9, top_k=2)


def of_type(activation_type: int, experts: Any = ALL) -> MoeCall:
    if activation_type in ACTIVATIONS and not ACTIVATIONS[activation_type].gated:
        experts = layers.without_gate(experts)
    return replace(CALL, experts=experts, activation_type=activation_type)


@pytest.mark.parametrize("experts", [BARE, ALL], ids=["defaults", "parameters"])
@pytest.mark.parametrize("activation_type", ACTIVATIONS)
def test_the_trace_has_this_activation(activation_type: int, experts: Any) -> None:
    call = of_type(activation_type, experts)
    rows = trace(call)
    own = call.experts.select(rows.expert)
    given = [getattr(own, name) for name in call.activation.defaults]
    parameters = [None if p is None else p[:, None] for p in given]
    expected = activate(call.activation, rows.fc1_output, own.fc1_biases, parameters)
    bits.assert_same(rows.activation, fp32.to_bf16(expected))
    bits.assert_same(rows.output, forward(call))
    assert_same_trace(trace(call, KERNEL), rows)  # stage by stage


def test_each_activation_gives_other_bits() -> None:
    outputs = [
        forward(of_type(activation_type, experts))
        for activation_type in (3, 4, 7, 10)
        for experts in (BARE, ALL)
    ]
    assert len({bits.bits_of(output).tobytes() for output in outputs}) == 7  # Geglu has no parameters


@pytest.mark.parametrize("activation_type", ACTIVATIONS)
def test_parameters_that_it_does_not_read_have_no_effect(activation_type: int) -> None:
    reads = of_type(activation_type).activation.defaults
    others = {name: None for name in PARAMETERS if name not in reads}
    bits.assert_same(
        forward(of_type(activation_type)), forward(of_type(activation_type, replace(ALL, **others)))
    )


def test_swiglu_with_a_parameter_is_swiglu_bias() -> None:
    bits.assert_same(forward(of_type(SWIGLU)), forward(of_type(SWIGLU_BIAS)))
    # Without any they are two kernels: the clamp of the second turns NaN into its limit, which is Inf.
    x = CALL.input.clone()
    x[0, 0] = torch.nan
    plain, clamped = (replace(of_type(kind, BARE), input=x) for kind in (SWIGLU, SWIGLU_BIAS))
    assert trace(plain).activation.isnan().any()
    assert trace(clamped).activation.isinf().any()


@pytest.mark.parametrize("activation_type", ACTIVATIONS)
def test_drop_in(activation_type: int) -> None:
    for experts in (
        BARE,
        ALL,
        replace(BARE, swiglu_limit=GIVEN["swiglu_limit"], situ_beta=GIVEN["situ_beta"]),
    ):
        call = of_type(activation_type, experts)
        arguments = arguments_of(replace(call, experts=layers.to_sm90(call.experts)))
        assert arguments["activation_type"] == activation_type
        bits.assert_same(torch_ref_cutlass_fused_moe(**arguments)[0], forward(call))


@pytest.mark.parametrize("activation_type", [SWIGLU_STEP, SITU])
def test_ranks_and_layers_pass_it_on(activation_type: int) -> None:
    call = of_type(activation_type)
    swiglu = replace(call, activation_type=SWIGLU)
    ranks = Ranks(ep_size=2)
    got = forward_all_ranks(call, ranks)
    assert not torch.equal(got, forward_all_ranks(swiglu, ranks))
    routing = mixtral(torch.randn(9, 4, generator=torch.Generator().manual_seed(1)), top_k=2)
    layer = moe_layer(CALL.input, routing, ALL, activation_type=activation_type)
    direct = replace(call, token_selected_experts=routing.ids, token_final_scales=routing.scales)
    bits.assert_same(layer, forward(direct))


@pytest.mark.parametrize("wrong", [11, 12, None, 3.0])
def test_unknown_activations_are_refused(wrong: Any) -> None:
    with pytest.raises(
        ValueError, match=r"^activation_type: expected one of 0, 1, 2, 3, 4, 5, 6, 7, .*, got "
    ):
        replace(CALL, activation_type=wrong)


@pytest.mark.parametrize("activation_type", ACTIVATIONS)
def test_rows_of_fc1_that_do_not_fit_are_refused(activation_type: int) -> None:
    activation = ACTIVATIONS[activation_type]
    inner = ALL.intermediate_size
    rows, got = (2 * inner, inner) if activation.gated else (inner, 2 * inner)
    written = r"0 \(Gelu\), .* or 9 \(Identity\)" if activation.gated else r"3 \(Swiglu\), .* or 10 \(Situ\)"
    message = (
        rf"^activation_type: expected {rows} rows of fc1 .* for {activation.name} .*, got {got}; "
        rf"write activation_type={written} for weights of that shape$"
    )
    fitting = of_type(RELU2 if activation.gated else SWIGLU)
    with pytest.raises(ValueError, match=message):
        replace(fitting, activation_type=activation_type)
    arguments = arguments_of(fitting) | {"activation_type": activation_type}
    with pytest.raises(ValueError, match=message):
        torch_ref_cutlass_fused_moe(**arguments)


@pytest.mark.parametrize("tp_size", [1, 2, 3])
def test_an_fc1_without_gates_is_cut_into_rows(tp_size: int) -> None:
    """What the ranks have of fc1, one below the other, is the whole; 192 rows on 3 are 64, padded to 128."""
    experts = layers.without_gate(layers.random_experts(4, num_experts=2, hidden=128, inner=192, biases=True))
    shards = split_intermediate(experts, tp_size)
    width = 192 // tp_size
    for name in ("fc1_weights", "fc1_scales", "fc1_biases"):
        parts = [getattr(shard, name) for shard in shards]
        bits.assert_same(torch.cat([part[:, :width] for part in parts], 1), getattr(experts, name))
        assert not any(bool(part[:, width:].any()) for part in parts)
    assert not any(shard.gated for shard in shards)


def test_no_routing_weights_are_ones() -> None:
    """1.0f * x is x, and an FMA by one the sum."""
    arguments = arguments_of(replace(CALL, experts=layers.to_sm90(ALL)))
    got = torch_ref_cutlass_fused_moe(**arguments | {"token_final_scales": None})[0]
    bits.assert_same(got, forward(replace(CALL, token_final_scales=torch.ones_like(CALL.token_final_scales))))


@pytest.mark.parametrize("given", [False, True])
def test_all_to_all_leaves_foreign_tokens(given: bool) -> None:
    call = replace(CALL, experts=ALL.slice(0, 2), ep_size=2, ep_rank=1)
    foreign = (call.token_selected_experts < 2).all(1)
    assert 0 < int(foreign.sum()) < len(foreign)
    arguments = arguments_of(replace(call, experts=layers.to_sm90(call.experts)))
    output = torch.full_like(call.input, 3.0) if given else None
    got = torch_ref_cutlass_fused_moe(**arguments | {"enable_alltoall": True, "output": output})[0]
    expected = forward(call)
    assert not bool(expected[foreign].any())
    bits.assert_same(got[~foreign], expected[~foreign])
    assert bool((got[foreign] == (3.0 if given else 0.0)).all())
    # On one rank alone the kernel writes every row.
    alone = replace(CALL, enable_alltoall=True)
    bits.assert_same(forward(alone), forward(CALL))
    assert bool(alone.written.all())
