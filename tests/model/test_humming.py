"""The forward of W4A8 ("Humming") and flashinfer's call of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mxfp4ref.formats import humming, wordwise
from mxfp4ref.formats.humming_experts import HummingExperts, Sm90HummingExperts
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.flashinfer import torch_ref_cutlass_fused_moe
from mxfp4ref.model.forward import KERNEL, forward, trace
from mxfp4ref.model.humming import HUMMING, HummingTrace
from mxfp4ref.sm90 import fp32, row_quantize
from mxfp4ref.sm90.activation import ACTIVATIONS, activate
from mxfp4ref.sm90.finalize import finalize
from mxfp4ref.sm90.gemm.fp8 import fp8_gemm_in_order
from mxfp4ref.sm90.humming_tactics import NUM_TACTICS, runs
from tests.helpers import bits, layers
from tests.helpers.usual import first

MXFP4 = layers.random_experts(1, hidden=256, inner=128, biases=True, parameters=layers.PARAMETERS)
EXPERTS = HummingExperts.prepare(MXFP4)
CALL = layers.random_call(2, EXPERTS, tokens=7, top_k=2)


def to_sm90(experts: HummingExperts) -> Sm90HummingExperts:
    changed: dict[str, Any] = {name: getattr(experts, name) for name in experts._tensors()}
    for gemm in ("fc1", "fc2"):
        changed[f"{gemm}_weights"] = humming.interleave(changed[f"{gemm}_weights"])
        changed[f"{gemm}_scales"] = wordwise.fold(changed[f"{gemm}_scales"]).view(torch.int32)
    return Sm90HummingExperts(**changed)


def slot_by_slot(call: MoeCall) -> Tensor:
    """Each routed row alone, stage after stage, by the transcriptions."""
    experts = call.experts
    assert isinstance(experts, HummingExperts)
    shape = (*call.token_selected_experts.shape, experts.hidden_size)
    by_slot = torch.zeros(shape, dtype=call.input.dtype)
    rounded = fp32.to_fp16 if call.input.dtype == torch.float16 else fp32.to_bf16
    local = call.token_selected_experts.long() - call.ep_rank * experts.num_experts
    local = torch.where((local < 0) | (local >= experts.num_experts), -1, local)

    def gemm(name: str, expert: int, x: Tensor) -> Tensor:
        packed, offsets = experts.weights(name, expert)
        assert offsets is not None
        rows = row_quantize.quantize_rows(x, getattr(experts, f"{name}_residual")[expert, None])
        accumulators = fp8_gemm_in_order(rows.values, packed[0], offsets[0])
        return rounded(row_quantize.scale_rows(accumulators, rows.factor))

    for token, slot in (local >= 0).nonzero().tolist():
        expert = int(local[token, slot])
        fc1 = gemm("fc1", expert, call.input[token, None])
        bias = None if experts.fc1_biases is None else experts.fc1_biases[expert, None]
        parameters = (getattr(experts, name) for name in call.activation.defaults)
        given = [None if p is None else p[expert].view(1, 1) for p in parameters]
        by_slot[token, slot] = gemm("fc2", expert, activate(call.activation, fc1, bias, given))[0]
    bias = experts.fc2_biases if call.tp_rank == 0 else None
    return rounded(finalize(by_slot, local, call.token_final_scales, bias))


def in_fp16(call: MoeCall) -> MoeCall:
    names = ("fc1_biases", "fc2_biases")
    biases = {name: bias.half() for name in names if (bias := getattr(call.experts, name)) is not None}
    return replace(call, input=call.input.half(), experts=replace(call.experts, **biases))


@pytest.mark.parametrize("options", [{}, {"ep_size": 2, "ep_rank": 1}, {"tp_size": 2, "tp_rank": 1}])
def test_as_the_stages_say(options: dict[str, int]) -> None:
    call = layers.random_call(3, EXPERTS, tokens=4, top_k=3, **options)
    bits.assert_same(forward(call), slot_by_slot(call))
    plain = replace(
        EXPERTS, fc1_biases=None, fc2_biases=None, swiglu_alpha=None, swiglu_beta=None, swiglu_limit=None
    )
    call = replace(call, experts=plain)
    bits.assert_same(forward(call), slot_by_slot(call))


def test_special_rows_concern_their_own_token_alone() -> None:
    changed = CALL.input.clone()
    changed[0, 3], changed[1, 5], changed[2] = torch.nan, torch.inf, 0.0
    output = forward(replace(CALL, input=changed))
    bits.assert_same(output[3:], forward(CALL)[3:])
    bits.assert_same(output, slot_by_slot(replace(CALL, input=changed)))


def test_the_trace_has_every_intermediate() -> None:
    steps = trace(CALL)
    assert isinstance(steps, HummingTrace)
    bits.assert_same(steps.output, forward(CALL))
    assert (steps.fc1_input.dtype, steps.fc2_input.dtype) == (torch.uint8, torch.uint8)
    assert steps.activation.dtype == torch.float32
    scaled = row_quantize.scale_rows(steps.fc2_accumulators, steps.fc2_factor)
    bits.assert_same(fp32.to_bf16(scaled), steps.fc2_output)
    again = row_quantize.quantize_rows(steps.activation, EXPERTS.fc2_residual[steps.expert])
    assert torch.equal(again.values, steps.fc2_input)


def test_the_layout_does_not_matter() -> None:
    bits.assert_same(forward(replace(CALL, experts=to_sm90(EXPERTS))), forward(CALL))
    some = torch.tensor([2, 0])
    selected = to_sm90(EXPERTS).select(some)
    for name, tensor in EXPERTS.select(some)._tensors().items():
        found = getattr(selected, name)
        assert found is None if tensor is None else torch.equal(found, tensor), name


def test_close_to_w4a16() -> None:
    """It is another rounding of the same layer."""
    w4a16 = forward(replace(CALL, experts=MXFP4)).double()
    assert float((forward(CALL).double() - w4a16).norm() / w4a16.norm()) < 0.1


def test_stages_of_the_other_path_are_refused() -> None:
    with pytest.raises(TypeError, match="stages: expected HummingStages"):
        forward(CALL, KERNEL)
    with pytest.raises(TypeError, match="stages: expected Stages"):
        forward(replace(CALL, experts=MXFP4), HUMMING)  # type: ignore[arg-type]


def test_what_can_be_prepared() -> None:
    with pytest.raises(ValueError, match="experts: expected MXFP4 experts"):
        HummingExperts.prepare(EXPERTS)
    with pytest.raises(ValueError, match="experts: expected MXFP4 experts"):
        HummingExperts.prepare(layers.random_experts(1, quantized=False))
    from_sm90 = HummingExperts.prepare(layers.to_sm90(MXFP4))
    for name, tensor in from_sm90._tensors().items():
        if tensor is None:
            assert getattr(EXPERTS, name) is None
        else:
            assert torch.equal(tensor, getattr(EXPERTS, name)), name
    with pytest.raises(ValueError, match="fc2_residual: expected"):
        replace(EXPERTS, fc2_residual=torch.ones(2))
    with pytest.raises(TypeError, match="exponent offsets"):
        EXPERTS.stored("fc1", [0])


def arguments_of(call: MoeCall) -> dict[str, Any]:
    experts = call.experts
    assert isinstance(experts, HummingExperts)
    scales = [
        experts.fc1_scales,
        experts.fc1_residual,
        torch.ones(()),
        experts.fc2_scales,
        experts.fc2_residual,
    ]
    return {
        **{name: getattr(call, name) for name in ("input", "token_selected_experts", "token_final_scales")},
        **{name: getattr(call, name) for name in ("ep_size", "ep_rank", "tp_size", "tp_rank")},
        "fc1_expert_weights": experts.fc1_weights,
        "fc2_expert_weights": experts.fc2_weights,
        "output_dtype": call.input.dtype,
        "quant_scales": scales,
        "fc1_expert_biases": experts.fc1_biases,
        "fc2_expert_biases": experts.fc2_biases,
        **{name: getattr(experts, name) for name in layers.PARAMETERS},
        "use_w4_group_scaling": True,
        "use_wfp4afp8_humming": True,
    }


SM90_ARGUMENTS = arguments_of(replace(CALL, experts=to_sm90(EXPERTS)))


def oracle(**changes: Any) -> Any:
    return torch_ref_cutlass_fused_moe(**(SM90_ARGUMENTS | changes))


def test_the_drop_in() -> None:
    expected = forward(CALL)
    bits.assert_same(oracle()[0], expected)
    bits.assert_same(oracle(weight_layout="logical", **changed(arguments_of(CALL)))[0], expected)
    out = torch.empty_like(expected)
    assert oracle(output=out, profile_ids=[4, 127])[0] is out
    bits.assert_same(out, expected)
    steps = oracle(trace=True)
    assert isinstance(steps, HummingTrace)
    bits.assert_same(steps.fc1_accumulators, trace(CALL).fc1_accumulators)


def changed(arguments: dict[str, Any]) -> dict[str, Any]:
    names = ("fc1_expert_weights", "fc2_expert_weights", "quant_scales")
    return {name: arguments[name] for name in names}


def with_scale(number: int, value: Tensor) -> dict[str, Any]:
    scales = list(SM90_ARGUMENTS["quant_scales"])
    scales[number] = value
    return {"quant_scales": scales}


BF16 = torch.zeros(4, 256, 256, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"profile_ids": [4, 120]},
            ValueError,
            r"profile_ids\[1\]: expected -1 or a tactic of GEMM2 .* 126 to 251",
        ),
        (
            {"profile_ids": [117, -1]},
            ValueError,
            r"profile_ids\[0\]: .*the kernel can run for the 256 weight rows",
        ),
        ({"profile_ids": [0]}, ValueError, "profile_ids: expected two ints"),
        ({"profile_ids": "ab"}, TypeError, "profile_ids: expected two ints"),
        (
            {"quant_scales": SM90_ARGUMENTS["quant_scales"][:2]},
            ValueError,
            "five tensors with use_wfp4afp8_humming",
        ),
        (with_scale(1, torch.ones(4).double()), TypeError, r"quant_scales\[1\]: expected a float32"),
        (with_scale(4, torch.ones(3)), ValueError, r"quant_scales\[4\]: expected"),
        (
            with_scale(3, torch.ones(4, 4, 2, 16, 4, dtype=torch.int32)),
            ValueError,
            r"quant_scales\[3\]: expected folded",
        ),
        ({"use_w4_group_scaling": False}, TypeError, "fc1_expert_weights: expected bfloat16 weights"),
        (
            {"fc1_expert_weights": BF16, "fc2_expert_weights": BF16[..., :128]},
            ValueError,
            "use_wfp4afp8_humming: ",
        ),
        (
            {"weight_layout": "logical_weights_folded_scales"},
            ValueError,
            "weight_layout: expected 'sm90' or 'logical'",
        ),
        ({"use_wfp4afp8_humming": 1}, TypeError, "use_wfp4afp8_humming: expected"),
    ],
)
def test_refusals(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        oracle(**changes)


def test_tactics_that_fit() -> None:
    """Ten of one warpgroup come after the others: five for a K of up to 384, five for more."""
    for number in range(NUM_TACTICS - 10, NUM_TACTICS):
        assert runs(number, 256, 384) == (number % 2 == 0)
        assert runs(number, 256, 512) == (number % 2 == 1)
        assert not runs(number, 64, 512)
    assert runs(0, 64, 128)
    assert not runs(104, 128, 128)  # 256 rows


@pytest.mark.parametrize("dtype", first(1, [torch.bfloat16, torch.float16]))
@pytest.mark.parametrize("activation_type", ACTIVATIONS)
def test_every_activation(activation_type: int, dtype: torch.dtype) -> None:
    gated = ACTIVATIONS[activation_type].gated
    experts = HummingExperts.prepare(MXFP4 if gated else layers.without_gate(MXFP4))
    call = layers.random_call(5, experts, tokens=3, top_k=2, activation_type=activation_type)
    call = in_fp16(call) if dtype == torch.float16 else call
    expected = forward(call)
    assert expected.dtype == dtype
    bits.assert_same(expected, slot_by_slot(call))
    assert isinstance(call.experts, HummingExperts)
    arguments = arguments_of(replace(call, experts=to_sm90(call.experts)))
    given = torch_ref_cutlass_fused_moe(**arguments, activation_type=activation_type)
    bits.assert_same(given[0], expected)


def test_fp16_overflows_and_underflows() -> None:
    """Rows whose GEMM outputs leave the range of fp16 on either side: Inf, and subnormal numbers that are kept."""
    call = in_fp16(replace(CALL, experts=replace(EXPERTS, fc1_biases=None, fc2_biases=None)))
    x = call.input.clone()
    x[0] *= 2.0**13
    x[1] = (x[1].float() * 2.0**-20).half()
    call = replace(call, input=x)
    steps = trace(call)
    of = {name: steps.fc1_output[steps.token == token] for token, name in enumerate(("large", "small"))}
    assert bool(of["large"].isinf().any())
    assert bool(((of["small"] != 0) & (of["small"].abs() < 2.0**-14)).any())
    bits.assert_same(steps.output, slot_by_slot(call))


def test_fp16_all_through_or_not_at_all() -> None:
    with pytest.raises(TypeError, match=r"^experts.fc1_biases: expected a float16 tensor .*, got bfloat16"):
        replace(CALL, input=CALL.input.half())
    with pytest.raises(TypeError, match=r"^input: expected a bfloat16 tensor"):
        replace(CALL, input=CALL.input.half(), experts=MXFP4)
    with pytest.raises(
        NotImplementedError, match=r"^output_dtype: .*expected torch.float16, as the input has"
    ):
        oracle(input=CALL.input.half())
    with pytest.raises(TypeError, match=r"^fc1_expert_biases: expected a float16 tensor"):
        oracle(input=CALL.input.half(), output_dtype=torch.float16)
