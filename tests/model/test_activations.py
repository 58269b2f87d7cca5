"""Every activation through the whole call: forward, trace, drop-in, layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from mxfp4ref.formats.experts import PARAMETERS
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.flashinfer import torch_ref_cutlass_fused_moe
from mxfp4ref.model.forward import forward, trace
from mxfp4ref.model.layer import moe_layer
from mxfp4ref.model.parallel import Ranks, forward_all_ranks
from mxfp4ref.routing.presets import mixtral
from mxfp4ref.sm90 import fp32
from mxfp4ref.sm90.activation import ACTIVATIONS, SITU, SWIGLU, SWIGLU_BIAS, SWIGLU_STEP, activate
from tests.helpers import bits, layers
from tests.helpers.drop_in import arguments_of

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
    return replace(CALL, experts=experts, activation_type=activation_type)


@pytest.mark.parametrize("experts", [BARE, ALL], ids=["defaults", "parameters"])
@pytest.mark.parametrize("activation_type", ACTIVATIONS)
def test_the_trace_has_this_activation(activation_type: int, experts: Any) -> None:
    call = of_type(activation_type, experts)
    rows = trace(call)
    own = experts.select(rows.expert)
    given = [getattr(own, name) for name in call.activation.defaults]
    parameters = [None if p is None else p[:, None] for p in given]
    expected = activate(call.activation, rows.fc1_output, own.fc1_biases, parameters)
    bits.assert_same(rows.activation, fp32.to_bf16(expected))
    bits.assert_same(rows.output, forward(call))


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
        arguments = arguments_of(replace(call, experts=layers.to_sm90(experts)))
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


@pytest.mark.parametrize("wrong", [0, 6, 11, "Situ", None, 3.0])
def test_unknown_activations_are_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"^activation_type: expected one of 3, 4, 5, 7, 8, 10, got "):
        of_type(wrong)
