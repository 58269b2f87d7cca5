"""No mode of torch, numpy or the CPU changes a bit of any public computation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mxfp4ref._choices import CONVENTIONS, REDUCTIONS
from mxfp4ref.conformance import suite as conformance
from mxfp4ref.conformance.bounds.call_bounds import bound
from mxfp4ref.conformance.comparison import differing, ulp_distance
from mxfp4ref.conformance.diagnosis import diagnose
from mxfp4ref.defects import DEFECTS
from mxfp4ref.formats import layout, mxfp4, quantize, resize
from mxfp4ref.formats.experts import Experts
from mxfp4ref.formats.generations import GENERATIONS
from mxfp4ref.goldens import generator, open_goldens, tensor_bytes
from mxfp4ref.model import forward as moe
from mxfp4ref.model import layer, parallel, placement
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.dense import dense_gemm
from mxfp4ref.model.flashinfer import torch_ref_cutlass_fused_moe
from mxfp4ref.routing import presets as routing
from mxfp4ref.routing import scoring, selection
from mxfp4ref.routing.presets import RoutedScaling
from mxfp4ref.sm90 import fp32, mufu, tensor_core
from mxfp4ref.sm90.finalize import finalize
from mxfp4ref.sm90.gemm.cpu import group_scaled_gemm
from mxfp4ref.sm90.gemm.reference import group_scaled_gemm_reference
from mxfp4ref.sm90.swiglu import swiglu
from mxfp4ref.sm90.tactics import Tactic
from tests.helpers import layers
from tests.helpers.modes import MODES, all_modes, forget_constants

# --- computations, with arguments that contain what modes might change: subnormals, ties, cancellation ---------

rng = np.random.default_rng(11)
M, K, E, H, INNER = 5, 2, 4, 256, 128


def any_bits(*shape: int) -> Tensor:
    """float32 of any bits, one in eight of them subnormal."""
    patterns = rng.integers(0, 1 << 32, shape, dtype=np.uint32)
    patterns[rng.random(shape) < 0.125] &= np.uint32(0x807FFFFF)
    return torch.from_numpy(patterns.view(np.int32)).view(torch.float32)


def any_bytes(*shape: int, low: int = 0, high: int = 256) -> Tensor:
    return torch.from_numpy(rng.integers(low, high, shape, dtype=np.uint8))


def any_bf16(*shape: int) -> Tensor:
    return (any_bits(*shape).view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)


def logits(*shape: int) -> Tensor:
    """Ordinary ones, and one row so far apart that scores are subnormal."""
    values = torch.from_numpy(rng.normal(0, 3, shape).astype(np.float32))
    values[-1] = torch.linspace(-103, -87, shape[-1])
    values[-1, 0] = 0.0
    return values


F32, OTHER, THIRD = any_bits(64, 64), any_bits(64, 64), any_bits(64, 64)
BF16 = any_bf16(3, 128)
EXPERTS = layers.random_experts(
    12, num_experts=E, hidden=H, inner=INNER, biases=True, parameters=layers.PARAMETERS
)
DENSE = layers.random_experts(13, num_experts=E, hidden=96, inner=64, quantized=False)
CALL = layers.random_call(12, EXPERTS, tokens=M, top_k=K)
TINY = MoeCall(
    CALL.input * 2.0**-60, CALL.token_selected_experts, CALL.token_final_scales * 2.0**-60, EXPERTS
)
MAP = ((3, 0, 1), (2, 3))  # uneven, expert 3 redundant
CHOSEN = placement.physical_ids(CALL.token_selected_experts, MAP, replica=torch.arange(M)[:, None])
DENSE_CALL = layers.random_call(13, DENSE, tokens=M, top_k=K)
SM90 = resize.to_sm90(EXPERTS)
LOGITS, BIAS = logits(M, 16), torch.from_numpy(rng.normal(0, 1, 16).astype(np.float32))
IDS = torch.tensor([[0, 3], [2, 1], [3, 0], [1, 0], [2, 3]], dtype=torch.int32)
SCORES = scoring.softmax(LOGITS)
X, W, S = layers.random_bf16(rng, 2, 3, 256), any_bytes(2, 48, 128), any_bytes(2, 48, 8, low=90, high=150)
OUTPUTS = [layers.random_bf16(rng, M, H) * 2.0**-120 for _ in range(3)]
PACKED, SCALES = any_bytes(2, 64, 64), any_bytes(2, 64, 4)
HALF = any_bytes(4, 64, 2).view(torch.float16).squeeze(-1)
POWERS = (torch.arange(255, dtype=torch.int32) << 23).view(torch.float32).clone()
POWERS[0] = 2.0**-127
FP64 = F32.to(torch.float64) * (1 + 2.0**-24)
X_TINY = X * 2.0**-90
DENSE_W = layers.random_bf16(rng, 2, 48, 256)
FC2_BIAS = any_bf16(3, 64)
TINY_BIAS = BIAS * 2.0**-140
GOLDENS = open_goldens(Path(__file__).resolve().parents[2] / "goldens")
CASES = [GOLDENS.load(name) for name in ("routing/gpt_oss_bf16_ties", "layout/fold_scales_0_6_16")]
TOKEN_IDS = torch.tensor([2, 0, 1, 4, 4])


COMPUTATIONS: dict[str, Callable[[], Any]] = {
    "mxfp4.decode_ue8m0": lambda: [
        mxfp4.decode_ue8m0(SCALES, convention, dtype)
        for convention in CONVENTIONS
        for dtype in (torch.float32, torch.float64, torch.bfloat16)
    ],
    "mxfp4.dequantize": lambda: [
        mxfp4.dequantize(PACKED, SCALES, convention=convention, dtype=dtype)
        for convention in CONVENTIONS
        for dtype in (torch.float32, torch.float64, torch.bfloat16)
    ],
    "mxfp4.quantize": lambda: [
        quantize.quantize(values, rule=rule) for rule in quantize.SCALE_RULES for values in (F32, BF16, HALF)
    ],
    "mxfp4.fp32_to_ue8m0": lambda: quantize.fp32_to_ue8m0(POWERS),
    "mxfp4 codes": lambda: mxfp4.pack_codes(mxfp4.unpack_codes(PACKED)),
    "layout weights": lambda: [
        (layout.interleave_weights_sm90(PACKED, g), layout.deinterleave_weights_sm90(PACKED, g))
        for g in GENERATIONS
    ],
    "layout scales": lambda: [
        (layout.fold_scales_sm90(SCALES, g), layout.unfold_scales_sm90(layout.fold_scales_sm90(SCALES, g), g))
        for g in GENERATIONS
    ],
    "layout halves": lambda: [
        layout.swap_gate_up(F32),
        layout.interleaved_to_halves(F32),
        layout.halves_to_interleaved(F32),
        layout.pad_halves(F32, 40),
        layout.unpad_halves(F32, 20),
    ],
    "resize": lambda: [
        resize.to_logical(resize.to_sm90(EXPERTS)),
        resize.resize_experts(EXPERTS, 384, 256),
        parallel.split_experts(EXPERTS, 2),
        parallel.split_intermediate(EXPERTS, 1),
    ],
    "scoring": lambda: [
        scoring.raw_logits(LOGITS),
        scoring.sigmoid(LOGITS),
        scoring.softmax(LOGITS),
        scoring.softplus(LOGITS),
        *(scoring.sqrt_softplus(LOGITS, rounding=rounding) for rounding in ("each_step", "once")),
    ],
    "selection": lambda: [
        selection.select_experts(SCORES, 4, correction_bias=TINY_BIAS, n_group=4, topk_group=2),
        selection.hash_experts(TOKEN_IDS, IDS, num_experts=4),
    ],
    "routing.routing_weights": lambda: [
        routing.routing_weights(SCORES, IDS, normalize=normalize, epsilon=1e-20, factor=1e-3)
        for normalize in ("sum", "softmax", "none")
    ],
    "routing.deepseek_v3": lambda: routing.deepseek_v3(LOGITS, BIAS, top_k=K, n_group=4, topk_group=2),
    "routing.deepseek_v4": lambda: routing.deepseek_v4(LOGITS, BIAS, top_k=K, routed_scaling_factor=1.5),
    "routing.gpt_oss": lambda: routing.gpt_oss(LOGITS, top_k=K),
    "routing.mixtral": lambda: routing.mixtral(LOGITS, top_k=K),
    "routing packed": lambda: routing.unpack_top_k(routing.pack_top_k(IDS, F32[:M, :K])),
    "fp32": lambda: [
        fp32.flush(F32),
        *(function(F32, OTHER) for function in (fp32.add, fp32.mul, fp32.minimum, fp32.maximum)),
        fp32.fma(F32, OTHER, THIRD),
        fp32.to_bf16(F32),
        fp32.widen(BF16),
        fp32.bf16_to_fp64(BF16),
        fp32.round_fp64(FP64),
    ],
    "tensor_core.step": lambda: tensor_core.step(BF16[:, None, :16], BF16[:, 16:32], F32[:3, :3]),
    "mufu": lambda: [mufu.ex2(F32), mufu.rcp(F32)],
    "gemm": lambda: [
        group_scaled_gemm(x, W, S, tactic=Tactic((64, 16, tile_k)))
        for x in (X, X_TINY)
        for tile_k in (128, 256)
    ],
    "gemm_reference": lambda: [group_scaled_gemm_reference(x, W[:, :8], S[:, :8]) for x in (X, X_TINY)],
    "swiglu": lambda: [
        swiglu(BF16),
        swiglu(BF16, BF16[0], *F32[:3, :1].abs()),
    ],
    "finalize": lambda: finalize(BF16.reshape(3, 2, 64), IDS[:3] - 1, F32[:3, :2], FC2_BIAS),
    "dense_gemm": lambda: dense_gemm(X, DENSE_W),
    "bounds": lambda: [
        bound(call, storage=storage, confidence=confidence)
        for call in (CALL, TINY)
        for storage, confidence in (("wider", None), ("bf16", 0.999))
    ],
    "moe.forward": lambda: [moe.forward(call) for call in (CALL, TINY, DENSE_CALL)],
    "moe.trace": lambda: [moe.trace(call) for call in (CALL, TINY, DENSE_CALL)],
    "oracle": lambda: torch_ref_cutlass_fused_moe(
        CALL.input,
        CALL.token_selected_experts,
        CALL.token_final_scales,
        SM90.fc1_weights,
        SM90.fc2_weights,
        torch.bfloat16,
        [SM90.fc1_scales, SM90.fc2_scales],
        fc1_expert_biases=SM90.fc1_biases,
        fc2_expert_biases=SM90.fc2_biases,
        swiglu_limit=SM90.swiglu_limit,
        use_w4_group_scaling=True,
    ),
    "parallel": lambda: [
        parallel.forward_all_ranks(replace(CALL, experts=EXPERTS), parallel.Ranks(ep_size=2)),
        parallel.forward_all_ranks(
            replace(CALL, experts=EXPERTS), parallel.Ranks(ep_size=2, expert_map=MAP, physical_ids=CHOSEN)
        ),
        *(parallel.gather(OUTPUTS, reduction=reduction) for reduction in REDUCTIONS),
    ],
    "layer": lambda: [
        layer.moe_layer(CALL.input, routing.mixtral(LOGITS[:, :4], top_k=2), EXPERTS),
        *(
            layer.finish_output(
                OUTPUTS[0],
                shared_output=OUTPUTS[1],
                routed_scaling=placement,
                routed_scaling_factor=0.37,
            )
            for placement in (RoutedScaling.ON_OUTPUT_BF16, RoutedScaling.FUSED_WITH_SHARED_ADD_BF16)
        ),
    ],
    "generator": lambda: [
        generator.generate(3, "w", (4, 9), rule, low=3, high=9) for rule in ("bytes", "bf16")
    ],
    "comparison": lambda: [differing(F32, OTHER), ulp_distance(F32, OTHER)],
    "golden": lambda: [GOLDENS.load(name).tensors for name in GOLDENS.names("layout")],
    "conformance": lambda: [r.status for r in conformance.run("oracle", CASES).results],
}


# --- the tests ------------------------------------------------------------------------------------------------


def contents(value: Any) -> list[Any]:
    """The bytes, dtype and shape of every tensor of a result, and whatever else is in it."""
    if isinstance(value, Tensor):
        return [(value.dtype, tuple(value.shape), tensor_bytes(value.detach()))]
    if isinstance(value, Mapping):
        return [item for key in sorted(value) for item in (key, *contents(value[key]))]
    if isinstance(value, tuple | list):
        return [item for part in value for item in contents(part)]
    if is_dataclass(value) and not isinstance(value, type):
        return [item for field in fields(value) for item in contents(getattr(value, field.name))]
    return [value]


@cache
def expected(name: str) -> list[Any]:
    return contents(COMPUTATIONS[name]())


def check(name: str, got: Any) -> None:
    different = [
        i for i, pair in enumerate(zip(contents(got), expected(name), strict=True)) if pair[0] != pair[1]
    ]
    assert not different, f"{name}: results number {different} differ"


# What nobody compiles: numpy, files, a harness, and a stage that the forward keeps out of all graphs.
NOT_COMPILED = ("generator", "golden", "comparison", "conformance", "gemm")


# What moves bytes and computes nothing, where a compiler has nothing to round, and what is made of others of these.
MOVING = ("resize", "layout halves", "layout scales", "layout weights", "mxfp4 codes", "routing packed")
MADE_OF_OTHERS = ("parallel", "layer", "oracle", "moe.trace", "routing.mixtral", "routing.gpt_oss")
PARTS_OF_OTHERS = (
    "mxfp4.decode_ue8m0",
    "mxfp4.fp32_to_ue8m0",
    "mxfp4.dequantize",
    "fp32",
    "tensor_core.step",
)


def rarely(mode: str, name: str) -> bool:
    """Of a run of the kit and of bounds two modes are enough: what they compute is what the others do."""
    return (
        name in MOVING + MADE_OF_OTHERS + PARTS_OF_OTHERS
        if mode == "compiled"
        else name in ("conformance", "bounds") and mode not in [*MODES][:2]
    )


def names(*modes: str) -> list[Any]:
    """Pairs of a mode and a computation."""
    return [
        pytest.param(mode, name, marks=pytest.mark.slow if rarely(mode, name) else ())
        for mode in modes
        for name in COMPUTATIONS
        if mode != "compiled" or name not in NOT_COMPILED
    ]


@pytest.mark.parametrize(("mode", "name"), names(*MODES))
def test_mode(mode: str, name: str) -> None:
    expected(name)
    with MODES[mode]():
        result = COMPUTATIONS[name]()
    check(name, result)


@pytest.mark.parametrize(("_mode", "name"), names("compiled"))
def test_a_compiled_caller(_mode: str, name: str) -> None:
    expected(name)
    torch.compiler.reset()
    try:
        check(name, torch.compile(COMPUTATIONS[name], backend="eager")())
    finally:
        torch.compiler.reset()


def test_a_compiled_caller_gets_no_graph_for_each_tensor_that_is_checked() -> None:
    """Past eight of them torch warns, or raises, as here."""
    call = layers.random_call(15, layers.random_experts(15, num_experts=2), tokens=2, top_k=1)
    fields_of_experts = {field.name: getattr(call.experts, field.name) for field in fields(call.experts)}

    def caller(x: Tensor) -> Tensor:
        return moe.forward(replace(call, input=x * 1, experts=Experts(**fields_of_experts)))

    torch.compiler.reset()
    try:
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            assert torch.equal(torch.compile(caller, backend="eager")(call.input), moe.forward(call))
    finally:
        torch.compiler.reset()


def test_constants_made_in_all_modes_at_once() -> None:
    """Tables that are made in strange modes serve as well, in these modes and afterwards."""
    for name in COMPUTATIONS:
        expected(name)
    forget_constants()
    try:
        with all_modes():
            results = {name: COMPUTATIONS[name]() for name in COMPUTATIONS}
        for name, result in results.items():
            check(name, result)
            check(name, COMPUTATIONS[name]())
    finally:
        forget_constants()


@pytest.mark.slow
@pytest.mark.usefixtures("patient")
def test_diagnosis() -> None:
    """In all modes at once."""
    experts = layers.random_experts(14, num_experts=2, parameters=("swiglu_limit",))
    call = layers.random_call(14, experts, tokens=2, top_k=1)
    wrong, right = ({"output": f(call)} for f in (DEFECTS["limit_ignored"].run, moe.forward))
    wanted = diagnose("moe", call, wrong, right)
    assert "limit_ignored" in wanted.exact
    with all_modes():
        got = diagnose("moe", call, wrong, right)
    assert contents(got) == contents(wanted)
